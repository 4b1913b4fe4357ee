"""The versions for GPUs: constraints, the image, the page and the checks of a rank say the same."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from megatron_mimo.runtime.gpus import LEAST_CAPABILITY
from megatron_mimo.runtime.versions import PACKAGES, Package
from megatron_mimo.tools.doctor.software import DRIVERS, numbers

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/how-to/gpu.md").read_text(encoding="utf-8")
IMAGE = (ROOT / "docker/Dockerfile.gpu").read_text(encoding="utf-8")


def pins(path: str) -> dict[str, str]:
    """Pinned version of each package."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert len(found) == sum(bool(line) and not line.startswith("#") for line in lines)
    return found


HOST, GPU = pins("constraints.txt"), pins("docker/constraints-gpu.txt")


def rows() -> dict[str, tuple[str, str]]:
    """Version and lowest version of each line of the page's table."""
    table = PAGE.split("## Versions that belong together")[1].split("\n## ")[0]
    return {
        name: (version, lowest)
        for name, version, lowest in re.findall(
            r"^\| ([\w -]+) \| ([\w. ]+) \| ([\d.]+) \|", table, re.MULTILINE
        )
    }


def commands() -> list[str]:
    """Instructions of the image, each on one line."""
    text = re.sub(r"^#.*\n", "", IMAGE, flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_pins_are_recent_enough(package: Package) -> None:
    assert numbers(GPU[package.name]) >= numbers(package.least)
    assert rows()[package.name] == (GPU[package.name], package.least)


def test_no_package_has_two_pins() -> None:
    assert GPU.keys() & HOST.keys() == set()


def test_the_page_has_the_pins_of_hosts() -> None:
    for name in ("torch", "megatron-core"):
        assert rows()[name][0] == HOST[name]


def test_parts_of_transformer_engine_are_alike() -> None:
    parts = {version for name, version in GPU.items() if name.startswith("transformer-engine")}
    assert parts == {GPU["transformer-engine"]}


def test_the_image_has_the_page_s_cuda() -> None:
    (base,) = [line for line in commands() if line.startswith("FROM ")]
    version, _ = rows()["CUDA toolkit"]
    assert base == f"FROM nvidia/cuda:{version}-devel-ubuntu24.04"
    major = numbers(version)[0]
    assert f"transformer-engine-cu{major}" in GPU
    assert rows()["NVIDIA driver"] == (str(DRIVERS[major]), str(DRIVERS[major]))
    assert rows()["GPU"][1] == ".".join(map(str, LEAST_CAPABILITY))


def test_torch_asks_for_the_page_s_libraries() -> None:
    if metadata.version("torch").partition("+")[0] != HOST["torch"]:
        pytest.skip("another torch than the pinned one is installed")
    wanted = dict(
        re.findall(r"^([\w-]+)\S*==([\w.]+)", "\n".join(metadata.requires("torch") or ()), re.M)
    )
    if "nvidia-nccl-cu13" not in wanted:
        pytest.skip("this torch was built for hosts, and asks for no CUDA libraries")
    assert rows()["NCCL"] == (wanted["nvidia-nccl-cu13"],) * 2
    assert f"triton {wanted['triton']}" in PAGE
    assert f"cuDNN {'.'.join(wanted['nvidia-cudnn-cu13'].split('.')[:2])}" in PAGE
    lines = "\n".join(metadata.requires("torch") or ())
    (toolkit,) = re.findall(r"^cuda-toolkit\S*==([\d.]+)", lines, re.MULTILINE)
    assert rows()["CUDA toolkit"][0] == toolkit


def test_the_image_installs_in_the_page_s_order() -> None:
    installs = [line for line in commands() if "pip install" in line]
    constraints = "-c constraints.txt -c docker/constraints-gpu.txt"
    assert len(installs) == 3
    assert all(constraints in line for line in installs)
    assert re.search(r"gpu\.txt\s+torch setuptools", installs[0])
    assert "--no-build-isolation" not in installs[0]
    assert all("--no-build-isolation" in line for line in installs[1:])
    assert installs[2].endswith('-e ".[gpu,demo,dev]"')
    built = set(re.findall(r"[\w-]+", installs[1].rsplit("gpu.txt", 1)[1])) - {"pytorch"}
    assert built == {package.name for package in PACKAGES}


def test_all_that_the_image_copies_is_there() -> None:
    copied = [line.split()[1:-1] for line in commands() if line.startswith("COPY ")]
    assert copied and all((ROOT / name).exists() for names in copied for name in names)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".venv/", "runs/", ".cache/"} <= set(ignored)
    assert not {name.rstrip("/") for name in ignored} & {"tests", "docker", "constraints.txt"}

"""`megatron-mimo doctor`: what facts of machines mean, and this machine asked for real."""

import json
import os
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.tools.doctor import gather as gathering
from megatron_mimo.tools.doctor.command import as_text, run_doctor
from megatron_mimo.tools.doctor.diagnose import diagnose, verdict
from megatron_mimo.tools.doctor.facts import Facts, Finding, Question

ROOT = Path(__file__).parents[3]
GIB = 1 << 30


def packages(**found: str | None) -> list[dict[str, Any]]:
    """The packages of a GPU in the versions given, others as a good machine has them."""
    rows = {
        "transformer_engine": ("2.11", "transformer_engine.pytorch", "layers", "2.20.2"),
        "mamba_ssm": ("2.3", "mamba_ssm", "Mamba layers", "2.3.1"),
        "causal_conv1d": ("1.5", "causal_conv1d", "convolutions", "1.7.0"),
        "flash_linear_attention": ("0.4", "fla", "", "0.4.2"),
    }
    return [
        {
            "name": name.replace("_", "-"),
            "least": least,
            "module": module,
            "reason": "before, it computes wrongly",
            "gives": gives,
            "found": found.get(name, version),
        }
        for name, (least, module, gives, version) in rows.items()
    ]


def eight_h100() -> dict[str, Any]:
    """What the probes say on a good machine."""
    smi = {
        "driver_version": "580.95.05",
        "memory.used": "4",
        "ecc.errors.uncorrected.volatile.total": "0",
        "mig.mode.current": "Disabled",
        "compute_mode": "Default",
    }
    return {
        "host": {
            "name": "gpu007",
            "system": "Linux",
            "files": 1 << 20,
            "locked": None,
            "tasks": None,
            "cores": 96,
            "quota": None,
            "memory": 2048 * GIB,
            "encoding": "UTF-8",
            "infiniband": ["mlx5_0", "mlx5_1"],
            "gpu_files": [f"nvidia{i}" for i in range(8)],
            "driver": "580.95.05",
            "variables": {},
        },
        "network": {"name": "gpu007", "addresses": ["10.0.0.7"], "loopback": ""},
        "clock": {"synchronised": True, "error_us": 1200},
        "temporary": {"place": "/tmp", "total": 900 * GIB, "free": 800 * GIB, "writable": True},
        "save": {"place": "/runs", "total": 9000 * GIB, "free": 8000 * GIB, "writable": True},
        "shared memory": {
            "place": "/dev/shm",
            "total": 1024 * GIB,
            "free": 1020 * GIB,
            "writable": True,
        },
        "smi": {"rows": [dict(smi) for _ in range(8)], "wrong": None},
        "software": {
            "python": "3.12.9",
            "torch": "2.13.0+cu130",
            "cuda": "13.0",
            "bounds": {"python": "3.12", "torch": "2.7", "megatron-core": "0.19.2"},
            "versions": {
                "megatron-core": "0.19.2",
                "triton": "3.7.1",
                "transformer-engine-cu13": "2.20.2",
            },
            "triton_of_torch": "3.7.1",
            "packages": packages(),
            "install": "pip install 'megatron-mimo[gpu]'",
            "nccl": "2.29.7",
            "nccl_wrong": None,
            "files_needed": 1480,
        },
        "gpus": {
            "cuda": "13.0",
            "gpus": [
                {
                    "index": index,
                    "name": "NVIDIA H100 80GB HBM3",
                    "memory": 85_000_000_000,
                    "capability": [9, 0],
                    "unsuitable": None,
                }
                for index in range(8)
            ],
            "no_peer_access": [],
        },
        "collective": {"backend": "nccl", "size": 8, "gb_per_s": 140.0, "megabytes": 16},
        **{f"import {package['name']}": {"wrong": None} for package in packages()},
    }


def judged(
    answers: dict[str, Any], silent: dict[str, str] | None = None, **question: Any
) -> dict[str, Finding]:
    """Findings that are not ok, by check; and all of them are single lines."""
    asked = Question(**{"ranks": 264, "save": "/runs/a", **question})
    findings = diagnose(Facts(question=asked, answers=answers, silent=silent or {}))
    for finding in findings:
        assert "\n" not in str(finding)
        if finding.state != "ok" and finding.check not in ("gpu", "nccl"):
            assert finding.expected and finding.remedy, finding
    return {finding.check: finding for finding in findings if finding.state != "ok"}


def put(answers: dict[str, Any], path: str, value: Any) -> None:
    """Set a value by its path, such as `host/files`; of a list, in each entry."""
    *folders, last = path.split("/")
    targets = [answers]
    for name in folders:
        targets = [
            entry
            for target in targets
            for entry in (target[name] if isinstance(target[name], list) else [target[name]])
        ]
    for target in targets:
        target[last] = value


def test_a_good_machine_has_nothing_to_say() -> None:
    assert judged(eight_h100()) == {}
    findings = diagnose(Facts(question=Question(), answers=eight_h100()))
    text = as_text(findings)
    assert "ok       gpus                    8 x NVIDIA H100 80GB HBM3 (79 GiB), compute" in text
    assert "ok       all_reduce              nccl between 8 GPUs, 140.0 GB/s at 16 MiB" in text
    assert text.endswith(f"0 faults, {len(findings)} ok\n")


TRANSFORMER_ENGINE = "import transformer-engine"
NO_GPU = {"gpus/gpus": [], "gpus/no_peer_access": []}
# What is other than on the good machine; the check, its state, and words of its line.
MACHINES: dict[str, tuple[dict[str, Any], str, str, tuple[str, ...]]] = {
    "python": (
        {"software/python": "3.11.2"},
        *("python", "fault", ("3.11.2", "3.12 or newer")),
    ),
    "torch": ({"software/torch": "2.6.0+cu124"}, "torch", "fault", ("2.6.0", "2.7 or newer")),
    "core": (
        {"software/versions": {"triton": "3.7.1"}},
        *("megatron-core", "fault", ("not installed", "0.19.2 or newer")),
    ),
    "te missing": (
        {"software/packages": packages(transformer_engine=None)},
        *("transformer-engine", "fault", ("not installed", "2.11", "megatron-mimo[gpu]")),
    ),
    "te old": (
        {"software/packages": packages(transformer_engine="2.9.0")},
        *("transformer-engine", "fault", ("2.9.0", "2.11 or newer", "computes wrongly")),
    ),
    "te broken": (
        {f"{TRANSFORMER_ENGINE}/wrong": "OSError: libcublas.so.12: cannot open"},
        *("transformer-engine", "fault", ("2.20.2", "libcublas.so.12", "CUDA of this machine")),
    ),
    "te of another cuda": (
        {
            "software/versions": {
                "megatron-core": "0.19.2",
                "triton": "3.7.1",
                "transformer-engine-cu12": "2.20.2",
            }
        },
        *("transformer-engine core", "fault", ("for CUDA 12", "transformer-engine-cu13")),
    ),
    "conv of another cuda": (
        {"software/packages": packages(causal_conv1d="1.7.0+cu12torch2.8cxx11abiTRUE")},
        *("causal-conv1d", "fault", ("built for CUDA 12 and torch 2.8", "CUDA 13.0")),
    ),
    "triton": (
        {
            "software/versions": {
                "megatron-core": "0.19.2",
                "triton": "3.4.0",
                "transformer-engine-cu13": "2.20.2",
            }
        },
        *("triton", "warning", ("3.4.0", "3.7.1")),
    ),
    "nccl": (
        {"software/nccl_wrong": "NCCL 2.18.3: expected 2.29.7 or newer"},
        *("nccl", "fault", ("NCCL 2.18.3", "2.29.7")),
    ),
    "old driver": (
        {**NO_GPU, "smi/rows/driver_version": "535.183.01"},
        *("driver", "fault", ("535.183.01", "580 or newer", "CUDA 13.0")),
    ),
    "old driver without nvidia-smi": (
        {**NO_GPU, "smi/rows": [], "host/driver": "535.183.01"},
        *("driver", "fault", ("535.183.01", "580 or newer")),
    ),
    "driver crashed": (
        {"smi/wrong": "Unable to determine the device handle for GPU3"},
        *("nvidia-smi", "fault", ("GPU3", "Xid")),
    ),
    "torch of hosts": (
        {**NO_GPU, "gpus/cuda": None},
        *("gpus", "fault", ("8 here", "built for hosts")),
    ),
    "hidden": (
        {**NO_GPU, "host/variables": {"CUDA_VISIBLE_DEVICES": ""}},
        *("gpus", "fault", ("torch sees none", "CUDA_VISIBLE_DEVICES=''")),
    ),
    "ecc": (
        {"smi/rows/ecc.errors.uncorrected.volatile.total": "3"},
        *("gpu 7 memory", "fault", ("3 errors", "reset")),
    ),
    "mig": ({"smi/rows/mig.mode.current": "Enabled"}, "gpu 0 mode", "warning", ("MIG",)),
    "prohibited": (
        {"smi/rows/compute_mode": "Prohibited"},
        *("gpu 0 mode", "fault", ("Prohibited", "-c DEFAULT")),
    ),
    "in use": (
        {"smi/rows/memory.used": "40960"},
        *("gpu 0 memory", "warning", ("40,960 MiB", "in use")),
    ),
    "too old a gpu": (
        {"gpus/gpus/unsuitable": "GPU 0, V100, of compute capability 7.0: expected 8.0 or newer"},
        *("gpu", "fault", ("V100", "8.0")),
    ),
    "no peers": (
        {"gpus/no_peer_access": [[0, 1], [0, 2]]},
        *("peer access", "warning", ("2 pairs", "(0-1, 0-2)")),
    ),
    "few files": (
        {"host/files": 1024},
        *("open files", "fault", ("1,024", "1,480", "rank 0 of 264", "ulimit -Hn 1480")),
    ),
    "small shm": (
        {"shared memory/total": 64 << 20, "shared memory/free": 64 << 20},
        *("shared memory", "fault", ("64 MiB", "--shm-size")),
    ),
    "smaller shm": (
        {"shared memory/total": 512 << 20, "shared memory/free": 500 << 20},
        *("shared memory", "warning", ("512 MiB", "1 GiB")),
    ),
    "memlock": (
        {"host/locked": 8 << 20},
        *("locked memory", "fault", ("8 MiB", "mlx5_0", "memlock")),
    ),
    "tasks": (
        {"host/tasks": 1024},
        *("processes and threads", "fault", ("1,024", "2,400 for 8 ranks")),
    ),
    "cores": ({"host/quota": 4.0}, "processors", "warning", ("4 for 8 ranks", "16 or more")),
    "threads": (
        {"host/variables": {"OMP_NUM_THREADS": "96"}},
        *("OMP_NUM_THREADS", "warning", ("96 for each of 8 ranks", "12 or less")),
    ),
    "no number": (
        {"host/variables": {"OMP_NUM_THREADS": "many"}},
        *("OMP_NUM_THREADS", "fault", ("'many'",)),
    ),
    "memory": ({"host/memory": 128 * GIB}, "memory", "warning", ("128.0 GiB", "633.3 GiB")),
    "full disk": (
        {"save/free": 10 << 20},
        *("checkpoints", "fault", ("10 MiB free at /runs", "1.0 GiB")),
    ),
    "nearly full disk": ({"save/free": 5 * GIB}, "checkpoints", "warning", ("5.0 GiB free",)),
    "another's folder": (
        {"save/writable": False},
        *("checkpoints", "fault", ("/runs cannot be written to",)),
    ),
    "full tmp": ({"temporary/free": 0}, "temporary files", "fault", ("0 MiB", "TMPDIR")),
    "no name": (
        {"network/addresses": []},
        *("name of the host", "warning", ("gpu007 has no address",)),
    ),
    "loopback name": (
        {"network/addresses": ["127.0.1.1"]},
        *("name of the host", "warning", ("127.0.1.1", "GLOO_SOCKET_IFNAME")),
    ),
    "no loopback": (
        {"network/loopback": "Operation not permitted"},
        *("local port", "fault", ("Operation not permitted",)),
    ),
    "clock": ({"clock/synchronised": False}, "clock", "warning", ("not synchronised",)),
    "text": ({"host/encoding": "ANSI_X3.4-1968"}, "text", "warning", ("ANSI", "C.UTF-8")),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_wrong_is_named(name: str) -> None:
    changes, check, state, words = MACHINES[name]
    answers = eight_h100()
    for path, value in changes.items():
        put(answers, path, value)
    found = judged(answers)
    assert found[check].state == state
    missing = [word for word in words if word not in str(found[check])]
    assert missing == [], str(found[check])
    # Nothing else is blamed; GPUs that are alike are alike in what they have.
    assert {one.rstrip("0123456789").split()[0] for one in found} == {check.split()[0]}


def test_gpus_of_two_kinds() -> None:
    answers = eight_h100()
    answers["gpus"]["gpus"][5] |= {"name": "NVIDIA A100-SXM4-80GB", "capability": [8, 0]}
    (found,) = judged(answers).values()
    assert (found.state, found.check) == ("fault", "gpus")
    assert "7 x NVIDIA H100 80GB HBM3 (79 GiB), 1 x NVIDIA A100-SXM4-80GB" in found.found


def test_more_ranks_than_gpus() -> None:
    (found,) = judged(eight_h100(), local_ranks=9).values()
    assert (found.state, found.found) == ("fault", "8 for 9 ranks of this machine")


def test_a_host_needs_no_gpu_unless_it_is_asked_for() -> None:
    answers = eight_h100()
    for path, value in {**NO_GPU, "host/gpu_files": [], "host/driver": None}.items():
        put(answers, path, value)
    answers["smi"]["rows"] = []
    put(answers, "software/packages/found", None)
    assert judged(answers) == {}
    found = judged(answers, device="cuda")
    assert {one.state for one in found.values()} == {"fault"}
    assert set(found) == {"gpus", "transformer-engine", "mamba-ssm", "causal-conv1d"}
    # A broken driver does not matter to a run that is asked to leave it alone.
    put(answers, "host/gpu_files", ["nvidia0"])
    assert set(judged(answers)) == {"gpus"}
    assert judged(answers, device="cpu") == {}


def test_a_run_on_the_host_leaves_gpus_alone() -> None:
    answers = eight_h100()
    for path in ("gpus/gpus/unsuitable", "smi/wrong"):
        put(answers, path, "too old")
    put(answers, "software/nccl_wrong", "NCCL 2.18.3: expected 2.29.7 or newer")
    answers["collective"]["backend"] = "gloo"
    found = judged(answers, device="cpu")
    assert {name: one.state for name, one in found.items()} == {"nccl": "warning"}


def test_probes_that_say_nothing_are_told_of() -> None:
    answers = eight_h100()
    names = ("host", "network", "clock", "temporary", "save", "shared memory", "smi", "software")
    for name in (*names, "gpus", "collective"):
        silenced = {key: value for key, value in answers.items() if key != name}
        found = judged(silenced, {name: "took longer than 20 s"})
        assert any("took longer than 20 s" in str(one) for one in found.values()), name
    found = judged({}, {name: "was killed by SIGSEGV" for name in answers})
    assert found["torch"].state == found["gpus"].state == found["all_reduce"].state == "fault"
    assert "SIGSEGV" in str(found["torch"])


def test_a_package_that_crashes_is_named() -> None:
    answers = eight_h100()
    del answers["import mamba-ssm"]
    found = judged(answers, {"import mamba-ssm": "was killed by SIGSEGV"})
    assert "cannot be imported (was killed by SIGSEGV)" in str(found["mamba-ssm"])


def test_the_verdict_counts() -> None:
    answers = deepcopy(eight_h100())
    put(answers, "host/files", 100)
    put(answers, "clock/synchronised", False)
    findings = diagnose(Facts(question=Question(), answers=answers))
    assert verdict(findings) == f"1 fault, 1 warning, {len(findings) - 2} ok"


def test_this_machine_for_real(tmp_path: Path) -> None:
    save = tmp_path / "runs" / "a"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "megatron_mimo.cli", "doctor"),
            *("--device", "cpu", "--json", "--save", str(save)),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": "7"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.stderr == ""
    result = json.loads(done.stdout)
    states = {finding["check"]: finding["state"] for finding in result["findings"]}
    assert "fault" not in states.values(), result["findings"]
    assert done.returncode == 0
    assert result["verdict"].startswith("0 faults")
    facts = result["facts"]
    assert facts["silent"] == {}
    assert facts["answers"]["save"]["place"] == str(tmp_path)
    assert facts["answers"]["collective"]["backend"] == "gloo"
    assert states["all_reduce"] == states["torch"] == states["local port"] == "ok"
    assert not save.exists()


def test_the_exit_code_tells_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_mimo.tools.doctor import command

    answers = eight_h100()
    for files, code in ((1 << 20, 0), (100, 1)):
        put(answers, "host/files", files)
        facts = Facts(question=Question(), answers=answers)
        monkeypatch.setattr(command, "gather", lambda _question, facts=facts: facts)
        assert run_doctor(command.DoctorConfig()) == code
    assert "fault    open files" in capsys.readouterr().out


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)


def test_children_that_hang_or_crash_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_module(tmp_path, "hangs", "import time\ntime.sleep(600)")
    write_module(tmp_path, "crashes", "import os\nos.kill(os.getpid(), 11)")
    write_module(tmp_path, "fails", "raise OSError('no such device')")
    write_module(tmp_path, "chats", "print('hello')")
    write_module(tmp_path, "answers", "print('hello')\nprint('{\"a\": 1}')")
    assert gathering.children([["answers"]], 60) == [{"a": 1}]
    started = time.monotonic()
    for modules, why in (
        ([["hangs"]], r"^took longer than 0\.5 s$"),
        ([["crashes"]], r"^was killed by SIGSEGV$"),
        # Whichever fails first has the reason, wherever it stands; the others are ended.
        ([["hangs"], ["fails"]], r"^OSError: no such device$"),
        ([["chats"]], r"^printed something else"),
    ):
        limit_s = 0.5 if "longer" in why else 60
        with pytest.raises(gathering.Silent, match=why):
            gathering.children(modules, limit_s)
    assert time.monotonic() - started < 60

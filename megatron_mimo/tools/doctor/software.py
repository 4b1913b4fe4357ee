"""Judging versions: Python, torch, megatron-core, the packages of a GPU, NCCL."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from megatron_mimo.tools.doctor.facts import Facts, Finding, fault, ok, warning

DRIVERS = {11: 450, 12: 525, 13: 580}
"""Lowest driver for each major version of CUDA: docs.nvidia.com/deploy/cuda-compatibility."""


def software(facts: Facts) -> list[Finding]:
    """Findings on versions of packages."""
    found = facts.of("software")
    if found is None:
        reason = facts.silent.get("software", "not asked")
        return [fault("torch", f"cannot be imported: {reason}", "an import", "install torch again")]
    findings = [
        _least("python", found["python"], found["bounds"]),
        _least("torch", found["torch"], found["bounds"], _build(found)),
        _least("megatron-core", found["versions"].get("megatron-core"), found["bounds"]),
    ]
    findings += [_package(package, facts, found) for package in found["packages"]]
    findings += _core_of_another_cuda(found)
    findings += _triton(found)
    findings.append(_nccl(facts, found))
    return findings


def _build(found: Mapping[str, Any]) -> str:
    return f"built for CUDA {found['cuda']}" if found["cuda"] else "built for hosts"


def _least(name: str, version: str | None, bounds: Mapping[str, str], note: str = "") -> Finding:
    least = bounds.get(name)
    if version is None:
        return fault(name, "not installed", f"{least or 'a version'} or newer", f"install {name}")
    if least is not None and numbers(version) < numbers(least):
        return fault(name, version, f"{least} or newer", f"install {name}>={least}")
    return ok(name, f"{version}, {note}" if note else version)


def _package(package: Mapping[str, Any], facts: Facts, found: Mapping[str, Any]) -> Finding:
    """A package of the extra `gpu`, which hosts need not have."""
    name, version = package["name"], package["found"]
    least = f"{package['least']} or newer"
    if version is None:
        if not facts.on_gpu:
            return ok(name, "not installed, and not needed on a host")
        if not package["gives"]:
            return ok(name, "not installed; no model of this package needs it")
        return fault(name, "not installed", f"{least}, for {package['gives']}", found["install"])
    if numbers(version) < numbers(package["least"]):
        return fault(
            name,
            version,
            f"{least}: {package['reason']}",
            f"install {name}>={package['least']}, or remove it",
        )
    built = re.search(r"\+cu(\d+)torch([\d.]+\d)", version)
    if built is not None and not _same_build(built[1], built[2], found):
        return fault(
            name,
            f"{version}, built for CUDA {built[1]} and torch {built[2]}",
            f"a build for CUDA {found['cuda']} and torch {found['torch']}",
            f"build it here: {found['install']}",
        )
    importing = f"import {name}"
    wrong = (facts.of(importing) or {}).get("wrong") or facts.silent.get(importing)
    if wrong is not None:
        return fault(
            name,
            f"{version}, which cannot be imported ({wrong})",
            f"a build for torch {found['torch']} and the CUDA of this machine",
            "install it again (docs/how-to/gpu.md has the order), or remove it",
        )
    return ok(name, version)


def _same_build(cuda: str, torch: str, found: Mapping[str, Any]) -> bool:
    """Whether a package's build is for this torch; its CUDA is "12", or "123" for 12.3."""
    major = str(found["cuda"] or "").partition(".")[0]
    mine = numbers(found["torch"])
    return cuda[:2] == major and numbers(torch) == mine[: len(numbers(torch))]


def _core_of_another_cuda(found: Mapping[str, Any]) -> list[Finding]:
    """Transformer Engine's core library, which comes in one package for each version of CUDA."""
    cores = {
        name.rpartition("-cu")[2]: version
        for name, version in found["versions"].items()
        if name.startswith("transformer-engine-cu")
    }
    major = str(found["cuda"] or "").partition(".")[0]
    if not cores or major in cores:
        return []
    (cuda, version), *_ = cores.items()
    return [
        fault(
            "transformer-engine core",
            f"{version} for CUDA {cuda}",
            f"transformer-engine-cu{major}, as torch was built for CUDA {found['cuda']}",
            f"remove transformer-engine-cu{cuda}, then {found['install']}",
        )
    ]


def _triton(found: Mapping[str, Any]) -> list[Finding]:
    version, wanted = found["versions"].get("triton"), found["triton_of_torch"]
    if wanted is None:
        # A build for hosts asks for none.
        return [] if version is None else [ok("triton", version)]
    if version == wanted:
        return [ok("triton", version)]
    return [
        warning(
            "triton",
            version or "not installed",
            f"{wanted}, which torch {found['torch']} asks for",
            f"install triton=={wanted}",
        )
    ]


def _nccl(facts: Facts, found: Mapping[str, Any]) -> Finding:
    if found["nccl_wrong"] is not None:
        # It begins with the version, and has what was expected and the remedy.
        state: Literal["fault", "warning"] = "fault" if facts.on_gpu else "warning"
        return Finding(state=state, check="nccl", found=found["nccl_wrong"])
    if found["nccl"] is None:
        if not facts.on_gpu:
            return ok("nccl", "not in this build of torch, and not needed on a host")
        return fault("nccl", "not in this build of torch", "NCCL", "install torch with CUDA")
    return ok("nccl", found["nccl"])


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()

"""Judging GPUs, their driver, and the sum over local ranks."""

from collections.abc import Mapping
from typing import Any

from megatron_mimo.tools.doctor.facts import Facts, Finding, fault, ok, warning
from megatron_mimo.tools.doctor.software import DRIVERS, numbers

_USED_MIB = 2048
"""Memory that a display or a driver takes; more of it is another program's."""


def gpus(facts: Facts) -> list[Finding]:
    """Findings on GPUs; one line on a host."""
    if facts.question.device == "cpu":
        return [ok("gpus", "left alone, as --device cpu asks")]
    found = facts.of("gpus")
    if found is None:
        reason = facts.silent.get("gpus", "not asked")
        return [
            fault("gpus", f"unknown: {reason}", "an answer of CUDA", "see nvidia-smi and dmesg")
        ]
    if not found["gpus"]:
        return [*_none_seen(facts, found["cuda"]), *_smi_broken(facts)]
    return [
        *_kinds(found["gpus"]),
        _enough(facts, found["gpus"]),
        *_driver(facts, found["cuda"]),
        *_smi_broken(facts),
        *_health(facts),
        *_peers(found),
    ]


def collective(facts: Facts) -> list[Finding]:
    """What became of the sum over local ranks."""
    found = facts.of("collective")
    if found is not None:
        what = "GPUs" if found["backend"] == "nccl" else "processes"
        return [
            ok(
                "all_reduce",
                f"{found['backend']} between {found['size']} {what}, {found['gb_per_s']:.1f} GB/s "
                f"at {found['megabytes']} MiB",
            )
        ]
    if "collective" not in facts.silent:
        # Without torch there is none.
        return []
    return [
        fault(
            "all_reduce",
            f"no sum over the ranks of this machine: {facts.silent['collective']}",
            "a sum within the limit",
            "run again with NCCL_DEBUG=INFO, and see docs/how-to/gpu.md#typical-faults",
        )
    ]


def driver_of(facts: Facts) -> str | None:
    """Version of the driver; None where there is none."""
    rows = (facts.of("smi") or {}).get("rows", [])
    if rows:
        return str(rows[0]["driver_version"])
    return (facts.of("host") or {}).get("driver")


def _none_seen(facts: Facts, cuda: str | None) -> list[Finding]:
    """Why torch sees no GPU, where this machine has one."""
    host = facts.of("host") or {}
    rows = (facts.of("smi") or {}).get("rows", [])
    there = max(len(host.get("gpu_files", [])), len(rows))
    hidden = host.get("variables", {}).get("CUDA_VISIBLE_DEVICES")
    if not there:
        if facts.question.device != "cuda":
            return [ok("gpus", "none: runs compute on the host, over gloo")]
        return [
            fault(
                "gpus",
                "none on this machine",
                "at least one for --device cuda",
                "take a machine with GPUs; in a container, start it with `--gpus all`",
            )
        ]
    if cuda is None:
        return [
            fault(
                "gpus",
                f"{there} here, and torch was built for hosts",
                "torch with CUDA",
                "install torch from the index of its CUDA build (docs/how-to/gpu.md)",
            )
        ]
    findings = [finding for finding in _driver(facts, cuda) if finding.state == "fault"]
    if findings:
        return findings
    why = f", with CUDA_VISIBLE_DEVICES={hidden!r}" if hidden is not None else ""
    return [
        fault(
            "gpus",
            f"{there} here, of which torch sees none{why}",
            "GPUs that CUDA can use",
            "see nvidia-smi and dmesg; unset CUDA_VISIBLE_DEVICES",
        )
    ]


def _kinds(found: list[Mapping[str, Any]]) -> list[Finding]:
    """Which GPUs there are, whether they are alike, and whether a run can use them."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for gpu in found:
        kinds.setdefault((gpu["name"], gpu["memory"] >> 30), []).append(gpu["index"])
    described = ", ".join(
        f"{len(indices)} x {name} ({memory} GiB)" for (name, memory), indices in kinds.items()
    )
    major, minor = found[0]["capability"]
    findings = [
        ok("gpus", f"{described}, compute capability {major}.{minor}")
        if len(kinds) == 1
        else fault(
            "gpus",
            described,
            "GPUs of one kind",
            "take machines with one kind, or choose one with CUDA_VISIBLE_DEVICES",
        )
    ]
    for gpu in found:
        if gpu["unsuitable"] is not None:
            findings.append(Finding(state="fault", check="gpu", found=gpu["unsuitable"]))
    return findings


def _enough(facts: Facts, found: list[Mapping[str, Any]]) -> Finding:
    ranks = facts.local_ranks
    if facts.on_gpu and ranks > len(found):
        return fault(
            "gpu for each rank",
            f"{len(found)} for {ranks} ranks of this machine",
            "one for each",
            f"start at most {len(found)} ranks here",
        )
    return ok("gpu for each rank", f"{len(found)} for {ranks}")


def _driver(facts: Facts, cuda: str | None) -> list[Finding]:
    version = driver_of(facts)
    if version is None:
        return [
            warning(
                "driver",
                "unknown: there is neither nvidia-smi nor /proc/driver/nvidia/version",
                "its version",
                "install the driver's utilities",
            )
        ]
    least = DRIVERS.get(numbers(cuda or "0")[0])
    if least is not None and numbers(version)[0] < least:
        return [
            fault(
                "driver",
                version,
                f"{least} or newer, since torch was built for CUDA {cuda}",
                "install a newer driver, or a torch that was built for an older CUDA",
            )
        ]
    return [ok("driver", f"{version}, for torch's CUDA {cuda}")]


def _smi_broken(facts: Facts) -> list[Finding]:
    wrong = (facts.of("smi") or {}).get("wrong") or facts.silent.get("smi")
    if wrong is None:
        return []
    return [
        fault(
            "nvidia-smi",
            f"failed: {wrong}",
            "a table of GPUs",
            "see dmesg for Xid errors; restart the machine, or load the driver again",
        )
    ]


def _health(facts: Facts) -> list[Finding]:
    """What nvidia-smi says of each GPU: errors of memory, modes, who else computes."""
    findings: list[Finding] = []
    for index, row in enumerate((facts.of("smi") or {}).get("rows", [])):
        errors = row.get("ecc.errors.uncorrected.volatile.total", "")
        if errors.isdigit() and int(errors):
            findings.append(
                fault(
                    f"gpu {index} memory",
                    f"{errors} errors that could not be corrected",
                    "none",
                    "reset the GPU with nvidia-smi -r, and have it replaced if they return",
                )
            )
        if row.get("mig.mode.current") == "Enabled":
            findings.append(
                warning(
                    f"gpu {index} mode",
                    "divided into instances (MIG)",
                    "whole GPUs: ranks on instances cannot talk over NVLink",
                    "have an administrator turn MIG off",
                )
            )
        if row.get("compute_mode") == "Prohibited":
            findings.append(
                fault(
                    f"gpu {index} mode",
                    "compute mode Prohibited",
                    "Default or Exclusive_Process",
                    f"nvidia-smi -i {index} -c DEFAULT, as root",
                )
            )
        used = row.get("memory.used", "")
        if used.isdigit() and int(used) > _USED_MIB:
            findings.append(
                warning(
                    f"gpu {index} memory",
                    f"{int(used):,} MiB are in use before the run",
                    "an idle GPU",
                    "see nvidia-smi for whose they are, and end what is left of earlier runs",
                )
            )
    return findings


def _peers(found: Mapping[str, Any]) -> list[Finding]:
    count, pairs = len(found["gpus"]), found["no_peer_access"]
    if count < 2:
        return []
    if not pairs:
        return [ok("peer access", f"between all {count} GPUs")]
    shown = ", ".join(f"{one}-{other}" for one, other in pairs[:4])
    return [
        warning(
            "peer access",
            f"missing between {len(pairs)} pairs of GPUs ({shown}{', ...' * (len(pairs) > 4)})",
            "all pairs, or ranks copy through host memory",
            "see nvidia-smi topo -m; turn off ACS in the firmware; in a container see --ipc=host",
        )
    ]

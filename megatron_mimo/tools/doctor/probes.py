"""What a machine is asked, each question in a process of its own: `python -m ... NAME ARGUMENT...`.

Any of them may hang (a dead network disk), crash (a broken library) or take memory with it, so the
doctor starts them as children with a time limit and reads one line of JSON. They judge nothing.
"""

import ctypes
import json
import locale
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

_UNSYNCHRONISED = 0x40
"""STA_UNSYNC of Linux's adjtimex."""

_VERSIONS = ("megatron-core", "triton", "transformer-engine-cu12", "transformer-engine-cu13")
_SMI_FIELDS = (
    "driver_version",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "mig.mode.current",
    "compute_mode",
)


def host() -> dict[str, Any]:
    """Limits, processors, memory, variables: what the system says of this process."""
    return {
        "name": socket.gethostname(),
        "system": platform.platform(),
        "files": _limit(resource.RLIMIT_NOFILE)[1],
        "locked": _limit(getattr(resource, "RLIMIT_MEMLOCK", None))[0],
        "tasks": _tasks(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "quota": _quota(),
        "memory": _memory(),
        "encoding": locale.getpreferredencoding(False),
        "infiniband": sorted(p.name for p in _listed(Path("/sys/class/infiniband"))),
        "gpu_files": sorted(
            p.name for p in _listed(Path("/dev")) if re.fullmatch(r"nvidia\d+", p.name)
        ),
        "driver": _driver_of_the_kernel(),
        "variables": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME")
            if name in os.environ
        },
    }


def disk(folder: str) -> dict[str, Any]:
    """Space where a folder is, or would be made, and whether files can be made there.

    Args:
        folder: Path; it need not exist.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    space = shutil.disk_usage(place)
    return {
        "place": str(place),
        "total": space.total,
        "free": space.free,
        "writable": place.is_dir() and os.access(place, os.W_OK | os.X_OK),
    }


def network() -> dict[str, Any]:
    """What this machine's name leads to, and whether a local port can be had."""
    found: dict[str, Any] = {"name": socket.gethostname(), "addresses": [], "loopback": ""}
    with suppress(OSError):
        entries = socket.getaddrinfo(found["name"], None, type=socket.SOCK_STREAM)
        found["addresses"] = sorted({str(entry[4][0]) for entry in entries})
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            with socket.create_connection(server.getsockname(), timeout=5):
                pass
    except OSError as error:
        found["loopback"] = error.strerror or str(error)
    return found


def clock() -> dict[str, Any]:
    """Whether a service keeps the clock right; null where the system does not say."""

    class Timex(ctypes.Structure):
        # The front of Linux's struct timex; the rest is written to the padding.
        _fields_ = (
            ("modes", ctypes.c_uint),
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_char * 512),
        )

    found: dict[str, Any] = {"synchronised": None}
    if sys.platform == "linux":
        timex = Timex()
        if ctypes.CDLL(None).adjtimex(ctypes.byref(timex)) >= 0:
            found["synchronised"] = not timex.status & _UNSYNCHRONISED
            found["error_us"] = timex.maxerror
    return found


def software(ranks: str) -> dict[str, Any]:
    """Versions of what computes, and the open files that a rank needs.

    Args:
        ranks: Number of ranks of the run.
    """
    import torch

    from megatron_mimo.runtime import nccl
    from megatron_mimo.runtime.open_files import needed
    from megatron_mimo.runtime.versions import INSTALL, PACKAGES

    world = int(ranks)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bounds": _bounds(),
        "versions": {
            name: version for name in _VERSIONS if (version := _version(name)) is not None
        },
        "triton_of_torch": _wanted_by_torch("triton"),
        "packages": [
            {
                "name": package.name,
                "least": package.least,
                "module": package.module,
                "reason": package.reason,
                "gives": package.gives,
                "found": _version(package.name),
            }
            for package in PACKAGES
        ],
        "install": INSTALL,
        "nccl": nccl.describe(),
        "nccl_wrong": nccl.too_old(nccl.built_for(), nccl.loaded()),
        # Twice the groups of a rank of two modules, each as large as the world.
        "files_needed": needed([world] * 40, serves=world, readers=8),
    }


def importing(module: str) -> dict[str, Any]:
    """Whether a package can be imported, as megatron-core will.

    Args:
        module: Dotted name.
    """
    try:
        import_module(module)
    except BaseException as error:  # whatever a broken installation raises
        return {"wrong": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"wrong": None}


def gpus() -> dict[str, Any]:
    """GPUs that torch sees, and what their driver says of them."""
    import torch

    from megatron_mimo.runtime.gpus import (
        architectures,
        local_gpus,
        unsuitable,
        without_peer_access,
    )

    found = local_gpus()
    kernels = architectures()
    return {
        "cuda": torch.version.cuda,
        "gpus": [
            {
                "index": gpu.index,
                "name": gpu.name,
                "memory": gpu.memory,
                "capability": list(gpu.capability),
                "unsuitable": unsuitable(gpu, kernels),
            }
            for gpu in found
        ],
        "no_peer_access": [list(pair) for pair in without_peer_access(len(found))],
    }


def smi() -> dict[str, Any]:
    """What nvidia-smi says: a row for each GPU of the machine; none without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"rows": [], "wrong": None}
    done = subprocess.run(
        [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"rows": [], "wrong": " ".join((done.stdout + done.stderr).split())[:300]}
    rows = [
        dict(zip(_SMI_FIELDS, (cell.strip() for cell in line.split(",")), strict=False))
        for line in done.stdout.splitlines()
        if line.strip()
    ]
    return {"rows": rows, "wrong": None}


PROBES: Mapping[str, Callable[..., dict[str, Any]]] = {
    "host": host,
    "disk": disk,
    "network": network,
    "clock": clock,
    "software": software,
    "importing": importing,
    "gpus": gpus,
    "smi": smi,
}


def _limit(number: int | None) -> tuple[int | None, int | None]:
    """Soft and hard limit; None for no limit, and where the system has no such limit."""
    if number is None:
        return None, None
    soft, hard = resource.getrlimit(number)
    unlimited = resource.RLIM_INFINITY
    return (None if soft == unlimited else soft), (None if hard == unlimited else hard)


def _tasks() -> int | None:
    """Most processes and threads, of the user and of the group of processes; None for no limit."""
    # Root has no limit of its own.
    own = None if os.geteuid() == 0 else _limit(resource.RLIMIT_NPROC)[0]
    group = _control("pids.max", "pids")
    return min([limit for limit in (own, group) if limit is not None], default=None)


def _quota() -> float | None:
    """Processors that the control group allows; None for no limit."""
    text = _control_text("cpu.max", "cpu")
    if text is not None:
        share, _, period = text.partition(" ")
        return None if share == "max" else int(share) / int(period)
    quota, period_us = _control("cpu.cfs_quota_us", "cpu"), _control("cpu.cfs_period_us", "cpu")
    return None if not quota or quota < 0 or not period_us else quota / period_us


def _memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or what its group allows."""
    with suppress(ValueError, OSError):
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        allowed = [_control("memory.max", "memory"), _control("memory.limit_in_bytes", "memory")]
        return min([whole, *(limit for limit in allowed if limit is not None)])
    return None


def _control(file: str, controller: str) -> int | None:
    """A number of this process's control group; None where there is none, or no limit."""
    text = _control_text(file, controller)
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def _control_text(file: str, controller: str) -> str | None:
    """A file of this process's control group, or of the nearest group above that has it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            root = Path("/sys/fs/cgroup", controller if names else "")
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                with suppress(OSError):
                    return (folder / file).read_text(encoding="ascii").strip()
                if folder == root:
                    break
    return None


def _listed(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none."""
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _driver_of_the_kernel() -> str | None:
    """Version of NVIDIA's kernel module, which is there where nvidia-smi is not."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
        return None if found is None else found[1]
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bounds() -> dict[str, str]:
    """Lowest version of each package that this one asks for, and of Python."""
    try:
        own = metadata.metadata("megatron-mimo")
    except metadata.PackageNotFoundError:
        return {}
    found = {"python": (own.get("Requires-Python") or "").removeprefix(">=")}
    for line in metadata.requires("megatron-mimo") or ():
        match = re.match(r"([\w.-]+)[^;]*>=\s*([\d.]+)[^;]*$", line)
        if match:
            found[match[1]] = match[2]
    return found


def _wanted_by_torch(name: str) -> str | None:
    """Exact version of a package that this build of torch asks for."""
    for line in metadata.requires("torch") or ():
        match = re.match(rf"{re.escape(name)}\s*==\s*([\w.]+)", line)
        if match:
            return match[1]
    return None


def main(argv: list[str]) -> int:
    """Run one probe and print its values."""
    name, *arguments = argv
    answer = PROBES[name](*arguments)
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()
    # What a library has started is none of ours.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

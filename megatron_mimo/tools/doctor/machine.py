"""Judging the system around a run: limits, memory, disks, network, clock."""

from collections.abc import Mapping
from typing import Any

from megatron_mimo.tools.doctor.facts import Facts, Finding, fault, ok, warning

_GIB = 1 << 30
_TASKS_OF_A_RANK = 300
"""Threads of a rank and of what reads for it: CUDA, NCCL, gloo, autograd, data, watchers."""
_TINY_SHM = 64 << 20
"""What containers give without a flag; NCCL needs more between two GPUs."""
_SHM = 1 << 30
_LOW_DISK, _FEW_DISK = 1 << 30, 20 << 30
_RANK_MEMORY = 2 << 30
"""A rank of a host: interpreter, torch, a small model."""


def machine(facts: Facts) -> list[Finding]:
    """Findings on the system."""
    host = facts.of("host")
    if host is None:
        unknown = [_unknown("system", facts.silent.get("host", "not asked"))]
        return [*unknown, *_disks(facts), *_network(facts, {}), *_clock(facts)]
    return [
        _files(facts, host),
        _shared_memory(facts),
        _locked(facts, host),
        _tasks(facts, host),
        _cores(facts, host),
        _threads(facts, host),
        _memory(facts, host),
        *_disks(facts),
        *_network(facts, host["variables"]),
        *_clock(facts),
        _encoding(host),
    ]


def _unknown(check: str, reason: str) -> Finding:
    return warning(check, f"unknown: {reason}", "an answer", "look at it by hand")


def _files(facts: Facts, host: Mapping[str, Any]) -> Finding:
    software = facts.of("software")
    if software is None:
        return _unknown("open files", "torch cannot be imported")
    needed, ranks, may = software["files_needed"], facts.question.ranks, host["files"]
    if may is None or may >= needed:
        allowed = "no limit" if may is None else f"{may:,}"
        return ok("open files", f"{allowed}; a rank of {ranks} needs up to {needed:,}")
    return fault(
        "open files",
        f"{may:,}",
        f"{needed:,}, as rank 0 of {ranks} needs",
        f"raise the hard limit: `ulimit -Hn {needed}` as root, or nofile in "
        f"/etc/security/limits.conf",
    )


def _shared_memory(facts: Facts) -> Finding:
    found = facts.of("shared memory")
    if found is None or found["place"] != "/dev/shm":
        return _unknown("shared memory", facts.silent.get("shared memory", "no /dev/shm"))
    size = f"{_size(found['total'])}, {_size(found['free'])} free"
    remedy = "start the container with --shm-size=16g or --ipc=host, or mount /dev/shm larger"
    many = len(facts.gpus) > 1 and facts.on_gpu
    if many and found["free"] <= _TINY_SHM:
        return fault("shared memory", size, "1 GiB or more, for NCCL between GPUs", remedy)
    if found["total"] < _SHM:
        return warning("shared memory", size, "1 GiB or more", remedy)
    return ok("shared memory", size)


def _locked(facts: Facts, host: Mapping[str, Any]) -> Finding:
    limit = host["locked"]
    if limit is None:
        return ok("locked memory", "no limit")
    if not host["infiniband"]:
        return ok("locked memory", f"{_size(limit)}; no InfiniBand here that would need more")
    adapters = ", ".join(host["infiniband"][:2])
    return (fault if facts.on_gpu else warning)(
        "locked memory",
        _size(limit),
        f"no limit: NCCL registers memory with {adapters}",
        "set memlock to unlimited in /etc/security/limits.conf, or --ulimit memlock=-1 of a "
        "container; under Slurm see PropagateResourceLimits",
    )


def _tasks(facts: Facts, host: Mapping[str, Any]) -> Finding:
    limit, needed = host["tasks"], _TASKS_OF_A_RANK * facts.local_ranks
    if limit is None or limit >= needed:
        return ok("processes and threads", "no limit" if limit is None else f"{limit:,}")
    return fault(
        "processes and threads",
        f"{limit:,}",
        f"{needed:,} for {facts.local_ranks} ranks",
        "raise nproc in /etc/security/limits.conf, or --pids-limit of a container",
    )


def _cores(facts: Facts, host: Mapping[str, Any]) -> Finding:
    cores = host["cores"] if host["quota"] is None else min(host["cores"], host["quota"])
    # A rank on a GPU has a thread that feeds it and one that reads.
    needed = facts.local_ranks * (2 if facts.on_gpu else 1)
    if cores < needed:
        return warning(
            "processors",
            f"{cores:g} for {facts.local_ranks} ranks",
            f"{needed} or more",
            "ask for more: --cpus-per-task of Slurm, --cpus of a container",
        )
    return ok("processors", f"{cores:g} for {facts.local_ranks} ranks")


def _threads(facts: Facts, host: Mapping[str, Any]) -> Finding:
    text = host["variables"].get("OMP_NUM_THREADS")
    if text is None:
        return ok("OMP_NUM_THREADS", "not set; `--nproc`, torchrun and scripts/ set it")
    cores, ranks = host["cores"], facts.local_ranks
    if not text.isdigit() or int(text) < 1:
        return fault("OMP_NUM_THREADS", repr(text), "a whole number", "unset it")
    if int(text) * ranks > max(cores, ranks):
        return warning(
            "OMP_NUM_THREADS",
            f"{text} for each of {ranks} ranks on {cores} processors",
            f"{max(1, cores // ranks)} or less",
            "unset it, or set it to that",
        )
    return ok("OMP_NUM_THREADS", text)


def _memory(facts: Facts, host: Mapping[str, Any]) -> Finding:
    have = host["memory"]
    if have is None:
        return _unknown("memory", "the system does not say")
    if not facts.on_gpu:
        needed = _RANK_MEMORY * facts.local_ranks
        if have < needed:
            return warning(
                "memory",
                _size(have),
                f"{_size(needed)} for {facts.local_ranks} ranks",
                "start fewer ranks",
            )
        return ok("memory", _size(have))
    devices = sum(gpu["memory"] for gpu in facts.gpus)
    if have < devices:
        return warning(
            "memory",
            _size(have),
            f"{_size(devices)}, as much as all GPUs: --async-save holds a copy of their state",
            "ask for more, or save without --async-save",
        )
    return ok("memory", f"{_size(have)}, and {_size(devices)} on GPUs")


def _disks(facts: Facts) -> list[Finding]:
    asked = [("temporary files", "temporary", "set TMPDIR to a larger disk")]
    if facts.question.save is not None:
        asked.append(("checkpoints", "save", "free space, or name another --save"))
    return [_disk(facts, *row) for row in asked]


def _disk(facts: Facts, check: str, probe: str, remedy: str) -> Finding:
    found = facts.of(probe)
    if found is None:
        return _unknown(check, facts.silent.get(probe, "not asked"))
    text = f"{_size(found['free'])} free at {found['place']}"
    if not found["writable"]:
        return fault(check, f"{found['place']} cannot be written to", "a folder of yours", remedy)
    if found["free"] < _LOW_DISK:
        return fault(check, text, f"{_size(_LOW_DISK)} at the least", remedy)
    if probe == "save" and found["free"] < _FEW_DISK:
        return warning(
            check, text, f"{_size(_FEW_DISK)} or more, and what checkpoints take", remedy
        )
    return ok(check, text)


def _network(facts: Facts, variables: Mapping[str, str]) -> list[Finding]:
    found = facts.of("network")
    if found is None:
        return [_unknown("network", facts.silent.get("network", "not asked"))]
    name, addresses = found["name"], found["addresses"]
    others = [address for address in addresses if not address.startswith("127.")]
    interface = variables.get("GLOO_SOCKET_IFNAME")
    if not addresses:
        named = warning(
            "name of the host",
            f"{name} has no address",
            "one that other machines reach",
            "add it to /etc/hosts; on one machine --nproc does without",
        )
    elif not others and interface is None:
        named = warning(
            "name of the host",
            f"{name} is {', '.join(addresses)}, which other machines do not reach",
            "an address of the network, for runs on several machines",
            "correct /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME",
        )
    else:
        shown = ", ".join(others or addresses)
        named = ok("name of the host", f"{name} is {shown}{f' ({interface})' if interface else ''}")
    if found["loopback"]:
        local = fault(
            "local port",
            f"none can be had on 127.0.0.1: {found['loopback']}",
            "a port for ranks to meet at",
            "bring up the interface lo, and see the firewall",
        )
    else:
        local = ok("local port", "can be had on 127.0.0.1")
    return [named, local]


def _clock(facts: Facts) -> list[Finding]:
    found = facts.of("clock")
    if found is None:
        return [_unknown("clock", facts.silent.get("clock", "not asked"))]
    if found["synchronised"] is None:
        return [ok("clock", "the system does not say whether it is synchronised")]
    if found["synchronised"]:
        return [ok("clock", f"synchronised, to within {found['error_us'] / 1000:.1f} ms")]
    return [
        warning(
            "clock",
            "not synchronised",
            "a time service, so that logs of several machines can be compared",
            "start chrony or systemd-timesyncd",
        )
    ]


def _encoding(host: Mapping[str, Any]) -> Finding:
    name = host["encoding"]
    if name.lower().replace("-", "") == "utf8":
        return ok("text", name)
    return warning("text", name, "UTF-8", "set LC_ALL=C.UTF-8")


def _size(count: int) -> str:
    """Bytes in words, such as "15.5 GiB"."""
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / (1 << 20):,.0f} MiB"

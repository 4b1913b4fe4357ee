"""Starting the probes side by side, each with a time limit, and collecting what they say."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_mimo.runtime.exit_code import how_it_ended
from megatron_mimo.tools.doctor.facts import Facts, Question

_PROBES = "megatron_mimo.tools.doctor.probes"
_COLLECTIVE = "megatron_mimo.tools.doctor.collective"

# Seconds. Importing torch from a cold network disk takes a minute, Transformer Engine another.
_SHORT_S, _LONG_S = 20.0, 180.0


class Silent(Exception):
    """A child gave no values; the message has the reason."""


def gather(question: Question) -> Facts:
    """Ask this machine everything. No probe raises here, and none takes longer than its limit.

    Args:
        question: What the user means to run.
    """
    asked: dict[str, tuple[Sequence[str], float]] = {
        "host": (["host"], _SHORT_S),
        "network": (["network"], _SHORT_S),
        "clock": (["clock"], _SHORT_S),
        "temporary": (["disk", tempfile.gettempdir()], _SHORT_S),
        "shared memory": (["disk", "/dev/shm"], _SHORT_S),
        "smi": (["smi"], _SHORT_S),
        "software": (["software", str(question.ranks)], _LONG_S),
        "gpus": (["gpus"], _LONG_S),
    }
    if question.save is not None:
        asked["save"] = (["disk", question.save], _SHORT_S)
    facts = _ask_all(question, asked)
    packages = (facts.of("software") or {}).get("packages", [])
    imports: dict[str, tuple[Sequence[str], float]] = {
        f"import {package['name']}": (["importing", package["module"]], _LONG_S)
        for package in packages
        if package["found"] is not None
    }
    more = _ask_all(question, imports)
    answers = {**facts.answers, **more.answers}
    silent = {**facts.silent, **more.silent}
    backend, size = _trial_of(facts)
    if "software" in facts.answers:
        try:
            answers["collective"] = _trial(backend, size)
        except Silent as reason:
            silent["collective"] = str(reason)
    return Facts(question=question, answers=answers, silent=silent)


def _trial_of(facts: Facts) -> tuple[str, int]:
    """Backend and number of ranks of the trial: each GPU, or two processes of a host."""
    return ("nccl", len(facts.gpus)) if facts.on_gpu and facts.gpus else ("gloo", 2)


def _ask_all(question: Question, asked: Mapping[str, tuple[Sequence[str], float]]) -> Facts:
    answers: dict[str, Mapping[str, Any]] = {}
    silent: dict[str, str] = {}

    def ask(name: str) -> None:
        arguments, limit_s = asked[name]
        try:
            (answers[name],) = children([[_PROBES, *arguments]], limit_s)
        except Silent as reason:
            silent[name] = str(reason)

    with ThreadPoolExecutor(max_workers=max(1, len(asked))) as pool:
        for _ in pool.map(ask, asked):
            pass
    return Facts(question=question, answers=answers, silent=silent)


def _trial(backend: str, size: int) -> dict[str, Any]:
    """Sum over local ranks; the values of rank 0."""
    # The limit that the ranks have of each other is a little shorter, so that they can say why.
    own_s = str(0.8 * _LONG_S)
    with tempfile.TemporaryDirectory(prefix="mimo-doctor-", ignore_cleanup_errors=True) as folder:
        meeting = str(Path(folder) / "meeting")
        found = children(
            [[_COLLECTIVE, backend, str(rank), str(size), meeting, own_s] for rank in range(size)],
            _LONG_S,
        )
    return {"backend": backend, "size": size, **found[0]}


def children(modules: Sequence[Sequence[str]], limit_s: float) -> list[dict[str, Any]]:
    """Run modules as processes, together, and read what each has printed last.

    Args:
        modules: Name and arguments of each.
        limit_s: Time in seconds after which all of them are killed.

    Raises:
        Silent: One failed, was killed, or printed something else.
    """
    started = [_start(module) for module in modules]
    deadline = time.monotonic() + limit_s

    def wait(process: subprocess.Popen[str]) -> tuple[str, str]:
        return process.communicate(timeout=max(0.0, deadline - time.monotonic()))

    try:
        with ThreadPoolExecutor(max_workers=len(started)) as pool:
            waiting = {pool.submit(wait, process): process for process in started}
            # Whichever fails first has the reason; it takes the others with it.
            for done in as_completed(waiting):
                _, errors = done.result()
                if code := waiting[done].returncode:
                    for process in started:
                        _kill(process)
                    raise Silent(_why(code, errors))
            outputs = {process: done.result()[0] for done, process in waiting.items()}
        return [json.loads(outputs[process].strip().splitlines()[-1]) for process in started]
    except subprocess.TimeoutExpired:
        raise Silent(f"took longer than {limit_s:g} s") from None
    except (ValueError, IndexError):
        raise Silent("printed something else than its values") from None
    finally:
        for process in started:
            _kill(process)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _start(module: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # What a probe starts ends with it.
        start_new_session=True,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    """Environment without what a launcher has set: a probe is no rank."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {name: value for name, value in os.environ.items() if name not in launchers}


def _why(code: int, errors: str) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines and code >= 0 else how_it_ended(code)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    # One that waits for a dead disk cannot be killed, and is left to itself.
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)

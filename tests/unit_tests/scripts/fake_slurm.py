"""Stand-ins for sbatch, srun, scontrol and sacct, which do on one machine what scripts need.

`install` writes them into a folder for PATH. They share a folder of state, FAKE_SLURM: `calls`
(one line per call), and knobs that a test leaves there as files: `limit` (a regular expression:
once a rank has logged it, the batch shell gets the signal that --signal asks for), `lose` ("RANK
PATTERN": once any rank has logged the pattern, the node of that rank fails), `unaware` (the
command that does not notice), `cancel` (a regular expression: once logged, the job is cancelled),
`refuse_requeue`.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_COMMANDS = ("sbatch", "srun", "scontrol", "sacct")
_POLL_S = 0.05


def install(folder: Path) -> None:
    """Write the commands."""
    folder.mkdir(parents=True)
    for name in _COMMANDS:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -I {__file__} {name} "$@"\n')
        path.chmod(0o755)


def _state() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def _knob(name: str) -> str:
    path = _state() / name
    return path.read_text() if path.exists() else ""


def _options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Leading `--name=value` options, and the rest."""
    rest = list(argv)
    options: dict[str, str] = {}
    while rest and rest[0].startswith("--"):
        name, _, value = rest.pop(0)[2:].partition("=")
        options[name] = value
    return options, rest


def sbatch(argv: Sequence[str]) -> int:
    """Run a batch script from a spool, again for each `scontrol requeue`."""
    options, rest = _options(argv)
    script = Path(rest[0])
    header = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE)
    options = dict(header) | options
    spool = _state() / "slurm_script"
    spool.write_text(script.read_text())
    nodes = int(options["nodes"])
    for attempt in range(3):
        env = os.environ | {
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NAME": options["job-name"],
            "SLURM_JOB_NUM_NODES": str(nodes),
            # The batch script has these, though it is no task.
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NTASKS": str(nodes * int(options["ntasks-per-node"])),
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURM_SUBMIT_DIR": os.environ.get("SLURM_SUBMIT_DIR", os.getcwd()),
            "SLURM_CPUS_ON_NODE": "8",
            "SLURM_RESTART_COUNT": str(attempt),
        }
        shell = subprocess.Popen(["bash", str(spool), *rest[1:]], env=env)
        code = _watch(shell, options, attempt)
        marker = _state() / "requeued"
        if not marker.exists():
            return code
        marker.unlink()
    return 99


def _watch(shell: subprocess.Popen[bytes], options: dict[str, str], attempt: int) -> int:
    kind, _, lead = options["signal"].partition("@")
    assert kind.startswith("B:") and int(lead) > 0 and "requeue" in options
    limit, cancel = (_knob(name) if attempt == 0 else "" for name in ("limit", "cancel"))
    while (code := shell.poll()) is None:
        if limit and _logged(_logs(attempt), limit):
            shell.send_signal(signal.Signals[f"SIG{kind[2:]}"])
            limit = ""
        # Tasks may log before srun says that it listens.
        if cancel and _logged(_logs(attempt), cancel) and _knob("step"):
            shell.terminate()
            os.kill(int(_knob("step")), signal.SIGTERM)
            cancel = ""
        time.sleep(_POLL_S)
    return code


def _logs(attempt: int) -> list[Path]:
    return list(Path(os.environ["MIMO_RUN_DIR"]).glob(f"logs/4242.{attempt}/rank-*.log"))


def _logged(paths: Sequence[Path], pattern: str) -> bool:
    return any(re.search(pattern, path.read_text(errors="replace")) for path in paths)


def srun(argv: Sequence[str]) -> int:
    """Run the tasks of a step here; forward signals; say what srun says when a task fails."""
    options, command = _options(argv)
    tasks, per_node = int(options["ntasks"]), int(options.get("ntasks-per-node", "1"))
    processes = []
    outputs = []
    for rank in range(tasks):
        env = os.environ | {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": str(tasks),
            "SLURM_LOCALID": str(rank % per_node),
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": "127.0.0.1",
        }
        output = None
        if "output" in options:
            field = re.search(r"%(\d*)t", options["output"])
            assert field
            number = f"{rank:0{field[1] or 1}d}"
            outputs.append(Path(options["output"].replace(field[0], number)))
            output = outputs[-1].open("wb")
        processes.append(
            subprocess.Popen(command, env=env, stdout=output, stderr=output and subprocess.STDOUT)
        )
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda got, _: [process.send_signal(got) for process in processes])
    written = _state() / "step-written"
    written.write_text(str(os.getpid()))
    written.replace(_state() / "step")
    lost, _, pattern = _knob("lose").partition(" ")
    while any(process.poll() is None for process in processes):
        if pattern and _logged(outputs, pattern):
            rank, pattern = int(lost), ""
            node = f"node{rank // per_node + 1}"
            (_state() / "down").write_text(node)
            if _knob("unaware") != "srun":
                print(f"srun: error: Node failure on {node}", file=sys.stderr, flush=True)
            for process in processes:
                process.kill()
        if any(process.poll() for process in processes) and "kill-on-bad-exit" in options:
            time.sleep(1)  # as long as the ranks need to see each other off
            for process in processes:
                process.terminate()
            break
        time.sleep(_POLL_S)
    codes = [process.wait() for process in processes]
    for rank, code in enumerate(codes):
        if code:
            how = f"Exited with exit code {code}" if code > 0 else signal.strsignal(-code)
            line = f"srun: error: node{rank // per_node + 1}: task {rank}: {how}"
            print(line, file=sys.stderr, flush=True)
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(argv: Sequence[str]) -> int:
    """`requeue`, and `show node`."""
    if argv[0] == "requeue":
        if _knob("refuse_requeue"):
            print("Job has been disabled from requeue", file=sys.stderr)
            return 1
        (_state() / "requeued").touch()
        return 0
    assert list(argv[:3]) == ["--oneliner", "show", "node"]
    match = re.fullmatch(r"node\[1-(\d+)\]", argv[3])
    assert match
    for node in (f"node{i}" for i in range(1, int(match[1]) + 1)):
        down = _knob("down") == node and _knob("unaware") != "scontrol"
        state = "DOWN*+NOT_RESPONDING" if down else "ALLOCATED"
        reason = " Reason=Not responding [slurm@2026-01-02T03:04:05]" if down else ""
        print(f"NodeName={node} Arch=x86_64 CPUAlloc=8 State={state} ThreadsPerCore=1{reason}")
    return 0


def sacct(argv: Sequence[str]) -> int:
    """One line, of a job that failed."""
    options, _ = _options(argv)
    failed = "2026-01-01T00:00:00|2026-01-01T04:00:00|NODE_FAIL|1:0|node2"
    print(failed if "duplicates" in options else "4242.0|FAILED|1:0|node[1-3]")
    return 0


def _main(argv: Sequence[str]) -> int:
    with (_state() / "calls").open("a") as calls:
        calls.write(shlex.join(argv) + "\n")
    commands = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "sacct": sacct}
    return commands[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

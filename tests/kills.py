"""A training run that is killed again and again, against one that nobody disturbed.

    python -m tests.kills --kills 200 --seed 1 [--iterations N] [--folder DIR]

Three ranks train on digits, read by processes, and save often, in the foreground and in the
background by turns. At a random moment, also while a run starts or saves, one rank, the launcher or
all processes get SIGKILL, and the same command begins again. In the end every iteration must be
there, each with exactly the values of the undisturbed run, however often it was repeated; and each
run must go on from the last checkpoint that was announced, or a later one.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_FLAGS = (
    *("--nproc", "3", "--encoder-dp", "1", "--llm-dp", "2", "--global-batch-size", "4"),
    *("--dataset-provider", "energon", "--num-workers", "1", "--loader-processes", "1"),
    *("--shuffle-buffer-size", "20", "--log-interval", "1", "--keep-last", "2"),
    *("--override", "language.num_layers=1", "--override", "vision.num_layers=1"),
    *("--override", "language.hidden_size=32", "--override", "vision.hidden_size=32"),
    *("--lr", "1e-3", "--lr-decay-style", "constant"),
)
_SAME = ("consumed_samples", "lm_loss", "grad_norm", "learning_rate", "loss_scale")
_SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
_BEGAN = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")
_STEP = re.compile(r"^ iteration +(\d+)/")


@dataclass(slots=True)
class Tally:
    """What all attempts have shown.

    Attributes:
        kills: Number of kills, by what was killed.
        compared: Number of lines that were compared.
        differ: Lines that differ from the undisturbed run.
        announced: Iteration of the last checkpoint that was announced.
        lost: Attempts that went on from an earlier checkpoint than the one announced.
        failed: What attempts said that ended by themselves with an error.
        seen: Iterations of which a line was compared.
    """

    kills: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    differ: list[str] = field(default_factory=list)
    announced: int = 0
    lost: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


class Attempt:
    """One run of the command, whose output is followed.

    Args:
        command: Command to run.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def numbers(self, pattern: re.Pattern[str]) -> list[int]:
        """Numbers that lines so far have said."""
        return [int(found[1]) for line in list(self.lines) if (found := pattern.search(line))]

    def wait_for(self, steps: int, saving: bool) -> None:
        """Wait until so many steps are logged, and a save has begun if it is asked for."""
        while self.process.poll() is None:
            begun = any("saving checkpoint at" in line for line in self.lines[-3:])
            if len(self.numbers(_STEP)) >= steps and (begun or not saving):
                return
            time.sleep(0.002)

    def kill(self, what: str, chance: random.Random) -> None:
        """Kill one rank, the launcher, or everything."""
        try:
            processes = psutil.Process(self.process.pid).children(recursive=True)
            ranks = [one for one in processes if one.name().startswith("rank ")]
        except psutil.NoSuchProcess:
            return
        victims = {"launcher": [], "all": processes, "a rank": ranks and [chance.choice(ranks)]}
        for victim in victims[what]:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        if what != "a rank" or not ranks:
            self.process.send_signal(signal.SIGKILL)
        self.end(processes)

    def end(self, processes: Sequence[psutil.Process] = ()) -> None:
        """Wait until every process has ended."""
        self.process.wait(timeout=120)
        _, alive = psutil.wait_procs(processes, timeout=60)
        assert not alive, f"still running a minute after the kill: {alive}"
        self._follower.join(timeout=60)


def curve(folder: Path) -> list[dict[str, Any]]:
    """Lines of the metrics; a line that a kill has cut short is not there yet."""
    found = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def compare(folder: Path, straight: Mapping[int, Any], tally: Tally) -> None:
    """Compare every line with the undisturbed run's, bit for bit."""
    for line in curve(folder):
        mine = [line[name] for name in _SAME]
        tally.compared += 1
        tally.seen.add(line["iteration"])
        if mine != straight[line["iteration"]]:
            tally.differ.append(f"{line['iteration']}: {mine} != {straight[line['iteration']]}")


def attempt(command: Sequence[str], chance: random.Random, tally: Tally, *, kill: bool) -> bool:
    """Run, and kill it once if asked; whether the run came to its end."""
    background = ["--async-save"] if chance.random() < 0.5 else []
    run = Attempt([*command, *background])
    if not kill:
        run.end()
    elif chance.random() < 0.15:
        time.sleep(chance.uniform(0, 6))  # While it starts.
    else:
        run.wait_for(chance.randint(1, 8), saving=chance.random() < 0.5)
        time.sleep(chance.choice((0, chance.uniform(0, 0.05), chance.uniform(0, 0.5))))
    done = run.process.poll() is not None
    if done:
        run.end()
    else:
        what = chance.choice(("a rank", "a rank", "launcher", "all"))
        tally.kills[what] = tally.kills.get(what, 0) + 1
        run.kill(what, chance)
    if began := run.numbers(_STEP)[:1]:
        first = began[0] - 1
        if first < tally.announced:
            tally.lost.append(f"began after {first}, {tally.announced} was announced")
    tally.announced = max([tally.announced, *run.numbers(_SAVED)])
    if done and run.process.returncode:
        tally.failed.append("".join(run.lines[-5:]))
    return done and not run.process.returncode


def round_of_kills(
    command: Sequence[str],
    save: Path,
    straight: Mapping[int, Any],
    chance: random.Random,
    tally: Tally,
    most: int,
) -> int:
    """Kill a run until it comes to its end, or is left to; the number of iterations it lacks."""
    tally.announced = 0
    tally.seen.clear()
    done = False
    while not done and not tally.failed:
        done = attempt(command, chance, tally, kill=sum(tally.kills.values()) < most)
        compare(save, straight, tally)
    return len(straight.keys() - tally.seen)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, compare, and print a summary.

    Returns:
        0 where nothing was lost and nothing differs, else 1.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args(argv)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    chance, tally, start = random.Random(given.seed), Tally(), time.monotonic()
    program = [sys.executable, "-m", "megatron_mimo.cli"]
    data = folder / "digits"
    subprocess.run([*program, "data", "digits", "--out", str(data)], check=True)
    train = [*program, "train", *_FLAGS, "--data-path", str(data)]
    train += ["--train-iters", str(given.iterations)]
    subprocess.run([*train, "--save", str(folder / "straight")], check=True, capture_output=True)
    straight = {
        line["iteration"]: [line[name] for name in _SAME] for line in curve(folder / "straight")
    }
    assert len(straight) == given.iterations, f"{len(straight)} lines of {given.iterations}"
    curves, missing = 0, 0
    while sum(tally.kills.values()) < given.kills and not tally.failed:
        # A run that came to its end begins anew, in another folder.
        curves += 1
        save = folder / f"checkpoints-{curves}"
        command = [*train, "--save", str(save), "--load", str(save), "--save-interval", "2"]
        missing += round_of_kills(command, save, straight, chance, tally, given.kills)
        # After each curve, so that what was found before an early end is not lost.
        kills = ", ".join(f"{number} of {what}" for what, number in sorted(tally.kills.items()))
        print(
            f"{sum(tally.kills.values())} kills ({kills}), seed {given.seed}: {curves} curves of "
            f"{given.iterations} iterations, {missing} missing, {tally.compared} lines compared, "
            f"{len(tally.differ)} differ, {len(tally.lost)} checkpoints lost, "
            f"{len(tally.failed)} attempts failed, {time.monotonic() - start:.0f} s; {folder}",
            flush=True,
        )
    for line in (*tally.differ[:10], *tally.lost, *tally.failed):
        print(line)
    return int(bool(missing or tally.differ or tally.lost or tally.failed))


if __name__ == "__main__":
    sys.exit(main())

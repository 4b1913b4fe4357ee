"""Running the checks of a machine, one after the other, and what became of each."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.validation.page import Row
from tests.validation.plan import REFERENCES, Check, Device, Run, checks

ROOT = Path(__file__).parents[2]
LIMIT_S = 1800.0
"""Longest time of a command; kernels are compiled in a first run."""

_ACROSS = """
    --model-provider nemotron-moe-vlm-tiny --dataset-provider energon --data-path {runs}/digits
    --seq-length 48 --micro-batch-size 2 --global-batch-size 16 --lr 8e-4 --lr-decay-style cosine
    --min-lr 4e-5 --weight-decay 0.05 --adam-beta2 0.98 --clip-grad 1.0 --seed 1234
    --init topology-invariant --log-interval 1
"""
"""Flags of every run: the demo's model and data, and weights that no layout changes."""
# Where there is a choice of kernels, the one that always adds in the same order.
_REPEATABLE = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class Failed(Exception):
    """A command ended with an error; the message is the last that it said."""


@dataclass(kw_only=True)
class Validation:
    """One validation of this machine.

    Attributes:
        device: Kind of device; "cpu" tries the script itself.
        gpus: Number of GPUs to use.
        iterations: Length of a run.
        folder: Folder of all that is written.
        tests: Arguments of pytest; none runs no tests.
        limit_s: Longest time of a command in seconds.
        made: Why a run has failed, by its name; None where it did not.
    """

    device: Device
    gpus: int
    iterations: int
    folder: Path
    tests: Sequence[str] = ()
    limit_s: float = LIMIT_S
    made: dict[str, str | None] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Make every check; one that fails keeps none of the others from being made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        result, difference, facts = self._doctor()
        versions, gpu = describe_versions(facts), describe_gpus(facts, self.device, self.gpus)
        rows = [("doctor", "this machine", result, difference)]
        if self.tests:
            rows.append(("tests of the host's part", "up to 6 ranks", *self._tests()))
        self._try("digits", ["data", "digits", "--out", str(self.folder / "digits")])
        for check in checks(self.device, self.gpus, self.iterations):
            if check.against in REFERENCES:
                self._train(REFERENCES[check.against])
            self._train(check.run)
            rows.append((check.what, check.run.layout, *self._compare(check)))
            _say(" | ".join(rows[-1]))
        return [
            Row(what=what, layout=layout, result=passed, difference=why, versions=versions, gpu=gpu)
            for what, layout, passed, why in rows
        ]

    def _doctor(self) -> tuple[str, str, Mapping[str, Any]]:
        command = ["doctor", "--device", self.device, "--local-ranks", str(self.gpus), "--json"]
        try:
            output = self._command("doctor", [*command, "--save", str(self.folder)], codes=(0, 1))
            result = json.loads(output)
        except (Failed, ValueError) as error:
            return "FAIL", str(error), {}
        faults = [
            f"{found['check']}: {found['found']}"
            for found in result["findings"]
            if found["state"] == "fault"
        ]
        return (
            "FAIL" if faults else "PASS",
            "; ".join(faults) or str(result["verdict"]),
            result["facts"]["answers"],
        )

    def _tests(self) -> tuple[str, str]:
        # They check the host's part, on which a visible GPU would not be left alone.
        environment = {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *self.tests]
        try:
            output = self._run("tests", command, environment)
        except Failed as error:
            return "FAIL", str(error)
        lines = [line.strip(" =") for line in output.splitlines() if " passed" in line]
        return "PASS", lines[-1] if lines else "no test was run"

    def _train(self, run: Run) -> None:
        """Make a run, unless it was made."""
        if run.name in self.made:
            return
        _say(f"training {run.name}: {run.layout}, {run.device}")
        flags = flags_of(run, self.folder, self.iterations)
        self.made[run.name] = self._try(
            f"{run.name}.train", ["train", "--nproc", str(run.ranks), *flags]
        )

    def _compare(self, check: Check) -> tuple[str, str]:
        """Result and difference of two runs."""
        for name in (check.against, check.run.name):
            if (why := self.made.get(name, f"{name} was not run")) is not None:
                return "FAIL", why
        one, other = (self.folder / name for name in (check.against, check.run.name))
        found = self.folder / f"{check.run.name}.parity.json"
        command = ["parity"]
        if check.activations is None:
            bounds = ("--norm-tolerance", repr(check.tolerance.norm))
            command += [str(one), str(other), *bounds, "--tolerance", repr(check.tolerance.loss)]
        else:
            command += ["--tensors", str(one / "activations"), str(other / "activations")]
            command += ["--tolerance", repr(check.activations)]
        try:
            # 3 says that they part, which is a result.
            self._command(
                f"{check.run.name}.parity", [*command, "--json", str(found)], codes=(0, 3)
            )
            result = json.loads(found.read_text(encoding="utf-8"))
        except (Failed, OSError, ValueError) as error:
            return "FAIL", str(error)
        return verdict_of(result), describe_difference(result)

    def _try(self, log: str, arguments: Sequence[str]) -> str | None:
        try:
            self._command(log, arguments)
        except Failed as error:
            return str(error)
        return None

    def _command(self, log: str, arguments: Sequence[str], *, codes: Sequence[int] = (0,)) -> str:
        return self._run(log, [sys.executable, "-m", "megatron_mimo.cli", *arguments], {}, codes)

    def _run(
        self,
        log: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        codes: Sequence[int] = (0,),
    ) -> str:
        """Run a command with its output in two files; return what it printed.

        Raises:
            Failed: It ended with another code, or took too long.
        """
        outputs = [self.folder / f"{log}.{name}" for name in ("out", "err")]
        with outputs[0].open("wb") as out, outputs[1].open("wb") as err:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **_REPEATABLE, "PYTHONPATH": _python_path(), **environment},
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=self.limit_s)
            except subprocess.TimeoutExpired:
                raise Failed(f"took longer than {self.limit_s:g} s, see {outputs[1]}") from None
            finally:
                if process.poll() is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in outputs]
        if code not in codes:
            raise Failed(f"{_last_line(*texts)} (exit code {code}, see {outputs[1]})")
        return texts[0]


def flags_of(run: Run, runs: Path, iterations: int) -> list[str]:
    """Flags of a run.

    Args:
        run: The run.
        runs: Folder of all runs and of their data.
        iterations: Length of a run.
    """
    flags = f"{_ACROSS} {run.flags} --device {run.device} --train-iters {iterations}"
    return [
        *(part.replace("{runs}", str(runs)) for part in flags.split()),
        *("--tensorboard-dir", str(runs / run.name)),
    ]


def describe_difference(result: Mapping[str, Any]) -> str:
    """The largest relative differences of a comparison, from what `parity --json` writes."""
    if "steps" in result:
        (step,) = result["steps"].values()
        sizes = {
            point["point"]: _largest(sample["relative"] for sample in point["samples"])
            for point in step["points"]
        }
        return step["problem"] or ", ".join(f"{name} {size}" for name, size in sizes.items())
    found = result["quantities"]
    parts = [
        f"{words} {_largest([found[name]['worst']['relative']])}"
        for name, words in (("lm_loss", "loss"), ("grad_norm", "norm"))
        if name in found
    ]
    return f"{', '.join(parts)} over {len(found['lm_loss']['steps'])} steps"


def _largest(relative: Iterable[float | None]) -> str:
    """The largest difference in words; JSON has null where one is not finite."""
    sizes = list(relative)
    finite = [abs(size) for size in sizes if size is not None]
    return f"{max(finite):.1e}" if len(finite) == len(sizes) else "not finite"


def verdict_of(result: Mapping[str, Any]) -> str:
    """PASS or FAIL, of curves or of each step's activations."""
    verdicts = [step["verdict"] for step in result.get("steps", {}).values()]
    return str(result.get("verdict") or ("FAIL" if "FAIL" in verdicts else "PASS"))


def describe_versions(facts: Mapping[str, Any]) -> str:
    """Versions of what computes, from the doctor's facts."""
    software = facts.get("software")
    if software is None:
        return "unknown"
    parts = [f"Python {software['python']}", f"torch {software['torch']}"]
    parts.append(f"megatron-core {software['versions'].get('megatron-core', 'absent')}")
    parts += [
        f"{package['name']} {package['found']}"
        for package in software["packages"]
        if package["found"] is not None
    ]
    if software["nccl"] is not None:
        parts.append(f"NCCL {software['nccl']}")
    return ", ".join(parts)


def describe_gpus(facts: Mapping[str, Any], device: Device, count: int) -> str:
    """Number and kind of the GPUs that were used, and their driver."""
    if device == "cpu":
        return "none (host)"
    names = sorted({gpu["name"] for gpu in facts.get("gpus", {}).get("gpus", [])})
    rows = facts.get("smi", {}).get("rows", [])
    driver = f", driver {rows[0]['driver_version']}" if rows else ""
    return f"{count} x {' and '.join(names) or 'unknown'}{driver}"


def _last_line(output: str, errors: str) -> str:
    lines = [line.strip() for line in (output + errors).splitlines() if line.strip("= -\t")]
    return lines[-1][:300] if lines else "it said nothing"


def _python_path() -> str:
    earlier = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([earlier] if earlier else [])])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()

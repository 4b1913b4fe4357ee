"""Planted faults still apply, and the tool that runs them tells found from missed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.faults.run import ROOT
from tests.faults.table import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_edit_applies_and_compiles(fault: Fault) -> None:
    source = (ROOT / fault.path).read_text(encoding="utf-8")
    edited = fault.edited(source)
    assert edited != source
    compile(edited, str(fault.path), "exec")


def test_there_are_enough_and_each_has_its_name() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 36
    assert len({(fault.path, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(("text", "count"), [("b", 0), ("aa", 2)])
def test_an_edit_that_is_not_in_one_place_is_refused(text: str, count: int) -> None:
    fault = Fault("some", "cli.py", "a", "c", "It is wrong.")
    with pytest.raises(ValueError, match=f"fault some: its old text occurs {count} times"):
        fault.edited(text)


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_found_and_missed_are_told_apart(tmp_path: Path) -> None:
    name = "chunks-in-a-row"
    found = tool(name, "--against", "tests/unit_tests/topology/test_sequence.py")
    assert found.returncode == 0, found.stderr
    assert f"\n{name} " in found.stdout
    assert "tests/unit_tests/topology/test_sequence.py::test_" in found.stdout
    missed = tool(name, "--against", "tests/unit_tests/topology/test_spec.py", "--no-baseline")
    assert missed.returncode == 1, missed.stderr
    assert missed.stdout.rstrip().endswith(f"missed: {name}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-fault"], "no fault is called no-such-fault"),
        (["--against", "tests/no_such_file.py"], "nothing was found out"),
    ],
)
def test_what_says_nothing_is_an_error(arguments: list[str], message: str) -> None:
    ended = tool(*arguments)
    assert ended.returncode == 2
    assert message in ended.stderr

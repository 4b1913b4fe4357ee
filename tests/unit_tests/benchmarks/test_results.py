"""Tables of RESULTS.md: what they say, and that prose around them stays."""

from dataclasses import replace
from pathlib import Path

import pytest
from benchlib.machine import Circumstances, processor
from benchlib.report import Row
from benchlib.results import is_wide, pooled, replaced, tables

REPOSITORY = Path(__file__).resolve().parents[3]
STEADY = Row(
    table="Steps",
    line="2 to 2",
    column="time | all",
    ours=(1.0, 1.01, 0.99),
    peer=(2.0, 2.0, 2.0),
    target=0.6,
    unit="s",
)
COUNT = Row(line="2 to 2", column="messages", ours=(4,), peer=(8,), target=0.5, unit="messages")
CIRCUMSTANCES = Circumstances(
    size="quick",
    commit="0123abc",
    date="2026-01-31",
    processor="a processor",
    cores=2,
    threads=1,
    load=0.5,
    software="torch 0",
)


def test_a_block_says_what_its_figures_depend_on() -> None:
    text = tables([(CIRCUMSTANCES, [STEADY, COUNT])])
    assert text.splitlines() == [
        "*Quick run of commit 0123abc, 2026-01-31; a processor, 2 cores, one thread a process; "
        "torch 0; load before it 0.5.*",
        "",
        "**Steps**",
        "",
        "|  | time \\| all |",
        "| --- | --- |",
        "| 2 to 2 | 0.500 ± 0.005 (0.6 met) |",
        "",
        "|  | messages |",
        "| --- | --- |",
        "| 2 to 2 | 4 / 8 = 0.5 (0.5 met) |",
        "",
        "2 of 2 targets met.",
    ]


def test_runs_are_taken_together_and_told() -> None:
    other = replace(STEADY, ours=(1.0, 2.2, 3.0))
    text = tables([(CIRCUMSTANCES, [STEADY]), (replace(CIRCUMSTANCES, load=7.0), [other])])
    assert pooled([[STEADY], [other]])[0].ours == (1.0, 1.01, 0.99, 1.0, 2.2, 3.0)
    assert "load before it 0.5, 7.0." in text
    assert "The pairs of 2 runs" in text
    assert "1 of 1 ratios stayed too wide to judge" in text
    assert "| ~ 0.502 ± " in text


def test_what_is_too_wide() -> None:
    assert not is_wide(STEADY)
    assert is_wide(replace(STEADY, ours=(0.5, 1.0, 1.5), target=None))
    # Steady, but on its target.
    assert is_wide(replace(STEADY, target=0.501))
    assert not is_wide(COUNT)


def test_other_rows_are_not_taken_together() -> None:
    with pytest.raises(ValueError, match=r"differ in their rows: \['2 to 2, messages'\]"):
        pooled([[STEADY], [STEADY, COUNT]])


def test_prose_around_a_table_stays() -> None:
    text = "before\n<!-- begin a -->\nold\n\nold\n<!-- end a -->\nafter\n"
    assert replaced(text, "a", "new") == "before\n<!-- begin a -->\nnew\n<!-- end a -->\nafter\n"
    with pytest.raises(ValueError, match="0 places for b, expected one"):
        replaced(text, "b", "new")
    with pytest.raises(ValueError, match="2 places for a, expected one"):
        replaced(text + text, "a", "new")


def test_every_benchmark_has_a_place() -> None:
    text = (REPOSITORY / "benchmarks/RESULTS.md").read_text()
    for path in (REPOSITORY / "benchmarks").glob("bench_*.py"):
        replaced(text, path.stem, "")


def test_the_processor_is_told_with_its_model(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\n\nx : y\n"
    )
    assert processor(path) == "Xeon (family 6, model 143)"

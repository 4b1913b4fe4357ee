"""Rows of a benchmark: what counts as met, and what other programs read."""

import json
from pathlib import Path

import pytest
from benchlib.report import Row, median_ratio, show, write


def row(ours: float, peer: float, target: float | None) -> Row:
    return Row(case="a case", ours=ours, peer=peer, target=target, unit="ms")


@pytest.mark.parametrize(
    ("ours", "peer", "target", "ratio", "met"),
    [
        (1.0, 4.0, 0.25, 0.25, True),
        (1.1, 4.0, 0.25, 0.275, False),
        (9.0, 1.0, None, 9.0, True),
        (0.0, 0.0, 1.0, 1.0, True),
        (1.0, 0.0, 1.0, float("inf"), False),
    ],
)
def test_a_target_is_a_largest_ratio(
    ours: float, peer: float, target: float | None, ratio: float, met: bool
) -> None:
    assert row(ours, peer, target).ratio == pytest.approx(ratio)
    assert row(ours, peer, target).met is met


def test_medians_not_means() -> None:
    assert median_ratio([1, 2, 90], [4, 4, 4]) == (2, 4)


def test_rows_as_other_programs_read_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    rows = [row(1.0, 4.0, 0.5), row(3.0, 4.0, 0.5), row(3.0, 4.0, None)]
    write(rows, path)
    assert json.loads(path.read_text())[0] == {
        "case": "a case",
        "ours": 1.0,
        "peer": 4.0,
        "ratio": 0.25,
        "target": 0.5,
        "unit": "ms",
    }
    show("title", rows)
    assert "1 of 2 targets met" in capsys.readouterr().out

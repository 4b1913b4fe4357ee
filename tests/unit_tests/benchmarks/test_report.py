"""Rows of a benchmark: what counts as met, and what other programs read."""

import pytest
from benchlib.machine import Circumstances
from benchlib.report import Row, Verdict, read, show, written

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


def row(ours: float | tuple[float, ...], peer: float | tuple[float, ...], target: float | None):
    pairs = [figures if isinstance(figures, tuple) else (figures,) for figures in (ours, peer)]
    return Row(line="a case", column="time", ours=pairs[0], peer=pairs[1], target=target, unit="ms")


@pytest.mark.parametrize(
    ("ours", "peer", "target", "ratio", "verdict"),
    [
        (1.0, 4.0, 0.25, 0.25, "met"),
        (1.1, 4.0, 0.25, 0.275, "missed"),
        (9.0, 1.0, None, 9.0, None),
        (0.0, 0.0, 1.0, 1.0, "met"),
        (1.0, 0.0, 1.0, float("inf"), "missed"),
    ],
)
def test_a_target_is_a_largest_ratio(
    ours: float, peer: float, target: float | None, ratio: float, verdict: Verdict | None
) -> None:
    assert row(ours, peer, target).ratio == pytest.approx(ratio)
    assert row(ours, peer, target).verdict == verdict


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    # A slow moment hits both of its pair: medians of each side by itself would give 2 / 4.
    assert row((1, 2, 90), (2, 20, 90), None).ratio == 0.5


def test_the_margin_is_the_notch_of_a_box_plot() -> None:
    ratios = tuple(i / 10 for i in range(1, 10))
    found = row(ratios, (1.0,) * 9, None)
    # Quartiles 0.3 and 0.7, nine pairs.
    assert found.margin == pytest.approx(1.57 * 0.4 / 3)
    assert row((1, 2), (4, 4), None).margin is None
    assert row((1, 1, 1), (4, 4, 4), None).margin == 0


@pytest.mark.parametrize(("target", "verdict"), [(0.2, "missed"), (0.6, "unclear"), (0.8, "met")])
def test_a_target_within_the_margin_is_unclear(target: float, verdict: Verdict) -> None:
    ratios = tuple(i / 10 for i in range(1, 10))
    assert row(ratios, (1.0,) * 9, target).verdict == verdict


@pytest.mark.parametrize(("ours", "peer"), [((1.0, 2.0), (1.0,)), ((), ())])
def test_figures_come_in_pairs(ours: tuple[float, ...], peer: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"a case, time: \d figures of ours and \d of the peer's"):
        row(ours, peer, None)


def test_a_run_as_other_programs_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1.0, 4.0, 0.5), row((3.0, 3.0, 3.0), (4.0, 4.0, 4.0), 0.5), row(3.0, 4.0, None)]
    text = written(CIRCUMSTANCES, rows)
    assert read(text) == (CIRCUMSTANCES, rows)
    assert '"ratio": 0.25' in text
    show("title", rows)
    assert "1 of 2 targets met" in capsys.readouterr().out

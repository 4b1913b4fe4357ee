"""From a run to its report in a browser: a run that was resumed on another layout."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.cli import main
from megatron_mimo.tools.plan.draw import compute_colors
from megatron_mimo.tools.report import charts
from megatron_mimo.watch.start_record import read_starts
from tests.browser import show
from tests.integration.test_train_cli import train

ITERATIONS = 8
WIDTH, HEIGHT = 1200, 4200


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two starts, on three ranks and on two; the second one is traced."""
    folder = tmp_path_factory.mktemp("run")
    flags = (
        *("--global-batch-size", "8", "--train-iters", str(ITERATIONS), "--log-interval", "1"),
        *("--eval-interval", "4", "--eval-iters", "1", "--tensorboard-dir", str(folder / "logs")),
        *("--save", str(folder / "saved"), "--load", str(folder / "saved")),
        *("--exit-interval", "4", "--peak-tflops", "0.5"),
    )
    first = train(*flags, "--encoder-dp", "1", "--llm-dp", "2", nproc=3)
    assert first.returncode == 0, first.stderr
    second = train(
        *flags,
        *("--encoder-dp", "1", "--timeline-profile", "--timeline-ranks", "all"),
        *("--timeline-dir", str(folder / "traces")),
        *("--profile-step-start", "6", "--profile-step-end", "8"),
        nproc=2,
    )
    assert second.returncode == 0, second.stderr
    return folder


def test_every_start_is_kept(run: Path) -> None:
    first, second = read_starts(run / "logs")
    assert (first.iteration, second.iteration) == (0, 4)
    assert (first.consumed_samples, second.consumed_samples) == (0, 32)
    assert (first.world_size, second.world_size) == (3, 2)
    assert (first.flags["llm-dp"], second.flags["llm-dp"]) == (2, 1)
    assert "--timeline-profile" in second.command
    assert {"megatron-core", "torch", "python"} <= set(second.software)
    assert second.variables["OMP_NUM_THREADS"] == "1"
    assert "PATH" not in second.variables


def test_the_report_in_a_browser(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(run / "logs"), "--out", str(page), "--title", "A <run>"]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    shown = show(page, tmp_path / "report.png", width=WIDTH, height=HEIGHT)
    assert shown.complaints == []
    # Scripts are left out: what is found below was drawn.
    document = re.sub(r"<script.*?</script>", "", shown.document, flags=re.DOTALL)
    assert "<h1>A &lt;run&gt;</h1>" in document
    for heading in (
        *("In short", "Curves", "Speed", "Where the time of a step goes", "Timeline"),
        *("Balance, data and memory", "Configuration", "Environment"),
    ):
        assert f"<h2>{heading}</h2>" in document, heading
    figures = document.split("<figure")[1:]
    assert len(figures) > 12
    for figure in figures:
        assert 'class="main-svg"' in figure, figure[:200]
    for text in (
        *("8 of 8", "2; again after iteration 4", "--llm-dp", "OMP_NUM_THREADS"),
        *("rank 0: encoder dp 0", "rank 1: llm dp 0", "held out", "encoder forward"),
        *("Too short to judge", "tokens/s per rank"),
    ):
        assert text in document, text
    # Those of two steps of eight microbatches on each of two ranks.
    events = json.loads((run / "traces" / "timeline.json").read_text())["traceEvents"]
    computed = [event for event in events if event.get("cat") in ("forward", "backward")]
    assert len(computed) == 2 * 2 * 2 * 8
    timeline = next(figure for figure in figures if "What each rank did when" in figure)
    assert timeline.count('class="point"') >= len(computed)
    check_picture(shown.picture)


def check_picture(path: Path) -> None:
    """The colours of curves and of both modules' work are there, on both ranks."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)

    def area(color: str) -> int:
        wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        return int(np.all(pixels == wanted, axis=-1).sum())

    for color in (charts.BLUE, charts.ORANGE, charts.GREEN):
        assert area(color) > 100, color
    colors = compute_colors(("encoder", "llm"))
    for module in ("encoder", "llm"):
        for backward in (False, True):
            assert area(colors[module, backward]) > 50, (module, backward)


def test_it_needs_nothing_beside_it(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(run / "logs"), "--out", str(page)]) == 0
    body = re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', body) == []
    assert "@import" not in body and "url(" not in body
    # Nor do the scripts come from elsewhere.
    assert not re.search(r"<script[^>]+src=", page.read_text(encoding="utf-8"))

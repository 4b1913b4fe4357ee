"""The demo with pictures, calls and videos: from its start to its page and its last line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mimo.data.samples.omni.questions import KINDS


def megatron_mimo(*words: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "megatron_mimo.cli", *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.slow
def test_the_demo_trains_asks_and_shows(tmp_path: Path) -> None:
    size = ("--train-iters", "4", "--num-train", "300", "--num-questions", "28", "--llm-dp", "1")
    said = megatron_mimo("demo-omni", "--out", str(tmp_path), *size)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["world_size"] == 3
    assert set(summary["val_exact_match"]) == set(KINDS)
    for kind, facts in KINDS.items():
        assert facts.label in said
        assert set(summary["val_exact_match_swapped"][kind]) == set(facts.chances)
    page = (tmp_path / "report.html").read_text()
    # Four questions of each kind; some have several files.
    assert page.count("<audio controls") == 4 * sum("audio" in k.chances for k in KINDS.values())
    pictures = sum(("image" in k.chances) + ("video" in k.chances) for k in KINDS.values())
    assert page.count('<img src="data:image/png') == 4 * pictures
    (line,) = (line for line in said.splitlines() if line.startswith("ask it yourself: "))
    program, *words = shlex.split(line.removeprefix("ask it yourself: "))
    assert program == "megatron-mimo"
    megatron_mimo(*words, "--max-new-tokens", "8")

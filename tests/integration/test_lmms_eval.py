"""lmms-eval's own command asks our model class a task on disk."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.pool import REPOSITORY
from tests.integration.asked import pictures, save
from tests.integration.test_evaluate import QUESTIONS, RUN, answers_of
from tests.lmms import folder

TASK = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {place}/asked.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function seen.images
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 3
  temperature: 0
  until: ["\\n\\n\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
SEEN = """\
from pathlib import Path

from PIL import Image


def images(document):
    return [Image.open(Path(__file__).parent / document["image"]).convert("RGB")]
"""


def installed(place: Path) -> Path:
    """What an installation says of the package, with the entry points of this checkout."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = place / f"megatron_mimo-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: megatron-mimo\nVersion: {project['version']}\n"
    )
    group = "lmms_eval.models"
    points = "".join(f"{name} = {of}\n" for name, of in project["entry-points"][group].items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{points}")
    return place


@pytest.mark.slow
def test_its_command_scores_a_run(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    from PIL import Image

    run_ranks(1, save, RUN, str(tmp_path / "run"))
    task, image = tmp_path / "task", str(tmp_path / "task/a.png")
    task.mkdir()
    Image.fromarray(pictures()[0]).save(image)
    (answers,) = run_ranks(1, answers_of, str(tmp_path / "run"), image)
    # Wrong about the last.
    expected = [*answers[:-1], "nothing"]
    samples = [
        {"image": "a.png", "question": question, "answer": answer}
        for question, answer in zip(QUESTIONS, expected, strict=True)
    ]
    (task / "asked.jsonl").write_text("\n".join(map(json.dumps, samples)))
    (task / "colours.yaml").write_text(TASK.format(place=task))
    (task / "seen.py").write_text(SEEN)
    paths = [str(REPOSITORY), str(installed(tmp_path / "installed")), str(folder())]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "megatron_mimo"),
            *("--model_args", f"run={tmp_path / 'run'}", "--device", "cpu", "--batch_size", "1"),
            *("--tasks", "colours", "--include_path", str(task)),
            *("--output_path", str(tmp_path / "out"), "--log_samples"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").glob("*_results.json")
    found = json.loads(results.read_text())["results"]["colours"]
    assert found["exact_match,none"] == pytest.approx(3 / 4)
    (logged,) = (tmp_path / "out").glob("*_samples_colours.jsonl")
    lines = [json.loads(line) for line in logged.read_text().splitlines()]
    assert [line["filtered_resps"] for line in lines] == answers

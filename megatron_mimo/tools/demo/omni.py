"""The demo with three kinds of media: a small model sees, hears and watches, on three grids."""

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from megatron_mimo.data.samples.omni.dataset import (
    ENDINGS,
    StoredQuestion,
    read_omni_digits,
    write_omni_digits,
)
from megatron_mimo.data.samples.omni.questions import (
    KINDS,
    Kind,
    Medium,
    OmniDigitsConfig,
)
from megatron_mimo.data.samples.omni.vocabulary import write_tokenizer
from megatron_mimo.settings import Within
from megatron_mimo.settings.ranges import MOST_ITERATIONS, MOST_RANKS
from megatron_mimo.tools.cards import STYLE, Card, Sound
from megatron_mimo.tools.demo.moving import animated
from megatron_mimo.tools.demo.page import omni_examples_section, omni_results_section, picture
from megatron_mimo.tools.demo.ranks import forget_earlier_run, train_and_ask
from megatron_mimo.tools.report.command import run_sections, write_run_page

_EXAMPLES = 42
_MEDIA: Mapping[Medium, str] = {"image": "pictures", "audio": "calls", "video": "videos"}
PRESET = "omni-tiny"
TOKENIZER = "tokenizer"
"""Name of its folder in that of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniDemoConfig:
    """Train a small model on pictures, calls and videos of digits, and report what it learned.

    Attributes:
        out: Folder of the run; dataset, checkpoint, logs, summary.json and report.html go there.
        encoder_dp: Ranks of the vision encoder, which takes pictures and videos.
        audio_dp: Ranks of the audio encoder.
        llm_dp: Ranks of the language model.
        train_iters: Number of iterations.
        num_train: Number of samples to train on; they are seen several times.
        num_questions: Number of held-out questions, of all kinds together.
        device: Kind of device of the ranks; cuda needs a GPU for each rank.
    """

    out: Annotated[str, arg(metavar="DIR")] = "runs/demo-omni"
    encoder_dp: Annotated[int, Within(1, MOST_RANKS)] = 1
    audio_dp: Annotated[int, Within(1, MOST_RANKS)] = 1
    llm_dp: Annotated[int, Within(1, MOST_RANKS)] = 2
    train_iters: Annotated[int, Within(1, MOST_ITERATIONS)] = 1100
    num_train: Annotated[int, Within(1, 10_000_000)] = 12_000
    num_questions: Annotated[int, Within(14, 10_000_000)] = 840
    device: Literal["cpu", "auto", "cuda"] = "cpu"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.encoder_dp + self.audio_dp + self.llm_dp


@dataclass(frozen=True, kw_only=True, slots=True)
class KindScores:
    """Exact match on the held-out questions of one kind, 0 to 1.

    Attributes:
        all_there: Score with their own files.
        swapped: Medium -> score with its files swapped among the questions; only media that the
            kind needs.
    """

    all_there: float
    swapped: Mapping[Medium, float]


def run_omni_demo(config: OmniDemoConfig) -> int:
    """Write the dataset, train and save, ask held-out questions, write summary.json and a page.

    Returns:
        The exit code of the training run.
    """
    out = Path(config.out)
    Console().print(
        f"The demo writes a dataset of digits that are shown, dialled, and that move, trains "
        f"{PRESET} on it for {config.train_iters} iterations on {config.encoder_dp} vision, "
        f"{config.audio_dp} audio and {config.llm_dp} language ranks of this machine, and asks "
        f"about files that it has never seen: about six minutes on two cores with its defaults. "
        f"Everything goes to {out}.",
        highlight=False,
        markup=False,
    )
    dataset = out / "omni-digits"
    if not (dataset / ".nv-meta").is_dir():
        shutil.rmtree(dataset, ignore_errors=True)
        size = OmniDigitsConfig(num_train=config.num_train, num_val=config.num_questions)
        write_omni_digits(dataset, size)
    write_tokenizer(out / TOKENIZER)
    forget_earlier_run(out, [f"example.{ending}" for ending in ENDINGS.values()])
    run = train_and_ask(
        out,
        config.world_size,
        training_flags(config, dataset, out),
        "megatron_mimo.tools.demo.omni_worker",
        device=config.device,
    )
    if isinstance(run, int):
        return run
    return _conclude(config, out, dataset, run)


def training_flags(config: OmniDemoConfig, dataset: Path, out: Path) -> list[str]:
    """Command line of the training run.

    Args:
        config: Settings of the demo.
        dataset: Folder of the dataset.
        out: Folder of the run.
    """
    middle = max(1, config.train_iters // 2)
    flags = {
        "encoder-dp": config.encoder_dp,
        "grid": f"audio.dp={config.audio_dp}",
        "llm-dp": config.llm_dp,
        "model-provider": PRESET,
        "tokenizer-model": out / TOKENIZER,
        "dataset-provider": "energon",
        "data-path": dataset,
        "video-fps": 1,
        "video-target-num-patches": 16,
        "seq-length": 1024,
        "packing-buffer-size": 64,
        "micro-batch-size": 1,
        "global-batch-size": config.llm_dp,
        "train-iters": config.train_iters,
        "lr": 1e-3,
        "min-lr": 4e-5,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": min(50, config.train_iters // 10),
        "weight-decay": 0.05,
        "adam-beta2": 0.98,
        "clip-grad": 1.0,
        "log-interval": max(1, min(10, config.train_iters // 10)),
        "eval-interval": max(1, config.train_iters // 5),
        "eval-iters": 4,
        "save": out,
        "tensorboard-dir": out / "tensorboard",
        "timeline-ranks": "all",
        "profile-step-start": middle,
        "profile-step-end": middle + 2,
        "device": config.device,
    }
    valued = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*valued, "--timeline-profile"]


def score(
    questions: Sequence[StoredQuestion],
    answers: Mapping[str, str],
    others: Mapping[Medium, Mapping[str, str]],
) -> dict[Kind, KindScores]:
    """Exact match by kind of question; only kinds with a question.

    Args:
        questions: The held-out questions.
        answers: Answers of the model by key.
        others: Medium -> answers by key, of the questions that need it, with its files swapped.
    """
    scores: dict[Kind, KindScores] = {}
    for kind, facts in KINDS.items():
        of_kind = [question for question in questions if question.kind == kind]
        if of_kind:
            scores[kind] = KindScores(
                all_there=_exact_match(of_kind, answers),
                swapped={m: _exact_match(of_kind, others[m]) for m in facts.chances},
            )
    return scores


def _exact_match(questions: Sequence[StoredQuestion], answers: Mapping[str, str]) -> float:
    return sum(answers[q.key] == q.answer for q in questions) / len(questions)


def score_rows(scores: Mapping[Kind, KindScores]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heading and rows of the table of scores: a line for each kind, a column for each medium."""
    head = ("exact match", "all there", *(f"{name} swapped" for name in _MEDIA.values()))
    rows = []
    for kind, of_kind in scores.items():
        facts = KINDS[kind]
        cells = [
            f"{of_kind.swapped[medium]:.0%} ({facts.chances[medium]:.0%})"
            if medium in facts.chances
            else ""
            for medium in _MEDIA
        ]
        rows.append((facts.label, f"{of_kind.all_there:.1%}", *cells))
    return head, rows


REMARK = (
    "Swapped: every question is asked about the file of another one, of that medium alone. In "
    "brackets is chance, the most that is possible without that medium."
)


def _conclude(config: OmniDemoConfig, out: Path, dataset: Path, run: Mapping[str, Any]) -> int:
    questions = read_omni_digits(dataset, "val")
    scores = score(questions, run["answers"], run["swapped"])
    summary = {
        "val_exact_match": {kind: scores[kind].all_there for kind in scores},
        "val_exact_match_swapped": {kind: scores[kind].swapped for kind in scores},
        "chance_without": {kind: KINDS[kind].chances for kind in scores},
        "train_seconds": run["train_seconds"],
        "final_lm_loss": run["final_lm_loss"],
        "world_size": run["world_size"],
        "train_iters": config.train_iters,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    head, rows = score_rows(scores)
    write_run_page(
        out / "report.html",
        title="Digits that are shown, dialled, and that move, on three grids",
        lead=f"{config.encoder_dp} vision, {config.audio_dp} audio and {config.llm_dp} "
        f"language-model ranks trained for {config.train_iters} iterations in "
        f"{run['train_seconds']:.0f} s. Nothing below was seen or heard in training.",
        parts=(
            omni_results_section(head, rows, REMARK),
            omni_examples_section(_examples(questions, run["answers"])),
            *run_sections(out / "tensorboard"),
        ),
        style=STYLE,
    )
    table = Table(*head, box=None)
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(REMARK, style="dim", highlight=False, markup=False)
    console.print(f"trained in {run['train_seconds']:.0f} s; see {out / 'report.html'}")
    everything = next((q for q in questions if q.kind == "all"), None)
    if everything is not None:
        # Not wrapped, so that it can be copied.
        line = asking_line(out, everything)
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return 0


def asking_line(out: Path, question: StoredQuestion) -> str:
    """Write the files of a held-out question, and the line that asks the model about them.

    Args:
        out: Folder of the run.
        question: The question.
    """
    text = question.question
    flags: list[str] = []
    for medium, content in question.files.items():
        file = out / f"example.{ENDINGS[medium]}"
        file.write_bytes(content)
        flags += [f"--{medium}", str(file)]
        text = text.replace(f"<{medium}>", "")
    command = ("megatron-mimo", "generate", str(out), text.strip(), *flags)
    return f"ask it yourself: {shlex.join(command)}"


def _examples(questions: Sequence[StoredQuestion], answers: Mapping[str, str]) -> list[Card]:
    """Examples of every kind in turn, as they are stored."""
    return [_card(question, answers[question.key]) for question in questions[:_EXAMPLES]]


def _card(question: StoredQuestion, answer: str) -> Card:
    files, text = question.files, question.question
    for medium in files:
        text = text.replace(f"<{medium}>", "")
    pictures = []
    if "image" in files:
        pictures.append(picture(files["image"]))
    if "video" in files:
        pictures.append(animated(files["video"]))
    return Card(
        pictures=tuple(pictures),
        sounds=(Sound(content=files["audio"], media_type="audio/flac"),)
        if "audio" in files
        else (),
        question=text.strip(),
        expected=question.answer,
        answer=answer,
        is_right=answer == question.answer,
    )

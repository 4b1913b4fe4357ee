"""The demo: a small vision-language model learns to read handwritten digits, on two grids."""

import io
import json
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from megatron_mimo.data import RawSample
from megatron_mimo.data.samples.digits import read_digits_split, write_digits_dataset
from megatron_mimo.settings import Number, Within
from megatron_mimo.settings.ranges import MOST_ITERATIONS, MOST_RANKS
from megatron_mimo.tools.cards import STYLE, Card, Picture
from megatron_mimo.tools.demo.page import examples_section, results_section
from megatron_mimo.tools.demo.ranks import forget_earlier_run, train_and_ask
from megatron_mimo.tools.report.command import run_sections, write_run_page

_EXAMPLES = 48
EXAMPLE = "example.png"
"""Name of the held-out image that the last line asks about."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Train a small vision-language model on handwritten digits and report what it learned.

    Attributes:
        out: Folder of the run; dataset, checkpoint, logs, summary.json and report.html go there.
        encoder_dp: Ranks of the vision encoder.
        llm_dp: Ranks of the language model.
        llm_ep: Ranks that share the experts of a hybrid model; divides --llm-dp; left out: 2
            where it does, else 1.
        model_provider: Architecture: Mamba, experts and attention, or a dense language model.
        train_iters: Number of iterations.
        device: Kind of device of the ranks; cuda needs a GPU for each rank.
    """

    out: Annotated[str, arg(metavar="DIR")] = "runs/demo"
    encoder_dp: Annotated[int, Within(1, MOST_RANKS)] = 2
    llm_dp: Annotated[int, Within(1, MOST_RANKS)] = 2
    llm_ep: Annotated[Number, Within(1, MOST_RANKS)] = None
    model_provider: Literal["nemotron-moe-vlm-tiny", "mock"] = "nemotron-moe-vlm-tiny"
    train_iters: Annotated[int, Within(1, MOST_ITERATIONS)] = 700
    device: Literal["cpu", "auto", "cuda"] = "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Exact match on the held-out questions, 0 to 1.

    Attributes:
        single: Exact match on single digits.
        shuffled: Exact match on single digits, with each question asked about another sample's
            image.
        text_only: Best exact match without images, from always giving the most frequent answer.
        mixed: Exact match on questions of every kind about one to four digits.
    """

    single: float
    shuffled: float
    text_only: float
    mixed: float


def run_demo(config: DemoConfig) -> int:
    """Write the dataset, train and save, ask held-out questions, write summary.json and a page.

    Returns:
        The exit code of the training run.
    """
    out = Path(config.out)
    Console().print(
        f"The demo writes a dataset of handwritten digits, trains {config.model_provider} on it "
        f"for {config.train_iters} iterations on {config.encoder_dp} + {config.llm_dp} ranks of "
        f"this machine, and asks about images that it has never seen: about five minutes on two "
        f"cores with its defaults. Everything goes to {out}.",
        highlight=False,
        markup=False,
    )
    dataset = out / "digits"
    if not (dataset / ".nv-meta").is_dir():
        shutil.rmtree(dataset, ignore_errors=True)
        write_digits_dataset(dataset)
    forget_earlier_run(out, (EXAMPLE,))
    run = train_and_ask(
        out,
        config.encoder_dp + config.llm_dp,
        training_flags(config, dataset, out),
        "megatron_mimo.tools.demo.worker",
        device=config.device,
    )
    if isinstance(run, int):
        return run
    return _conclude(config, out, dataset, run)


def training_flags(config: DemoConfig, dataset: Path, out: Path) -> list[str]:
    """Command line of the training run.

    Args:
        config: Settings of the demo.
        dataset: Folder of the digits dataset.
        out: Folder of the run.
    """
    flags = {
        "encoder-dp": config.encoder_dp,
        "llm-dp": config.llm_dp,
        "llm-ep": _expert_ranks(config),
        "model-provider": config.model_provider,
        "dataset-provider": "energon",
        "data-path": dataset,
        "seq-length": 64,
        "micro-batch-size": 16,
        "global-batch-size": 16 * config.llm_dp,
        "train-iters": config.train_iters,
        "lr": 8e-4,
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
        "profile-step-start": max(1, config.train_iters // 2),
        "profile-step-end": max(1, config.train_iters // 2) + 2,
        "device": config.device,
    }
    valued = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*valued, "--timeline-profile"]


def _expert_ranks(config: DemoConfig) -> int:
    if config.llm_ep is not None:
        return config.llm_ep
    return 1 if config.model_provider == "mock" or config.llm_dp % 2 else 2


def _conclude(config: DemoConfig, out: Path, dataset: Path, run: Mapping[str, Any]) -> int:
    single = read_digits_split(dataset, "val", kind="single")
    mixed = read_digits_split(dataset, "val")
    scores = Scores(
        single=exact_match(single, run["answers"]),
        shuffled=exact_match(single, run["single_shuffled_images"]),
        text_only=most_frequent_answer(read_digits_split(dataset, "train", kind="single"), single),
        mixed=exact_match(mixed, run["answers"]),
    )
    rows = [
        ("held-out single digits", f"{scores.single:.1%}"),
        ("the same, images shuffled", f"{scores.shuffled:.1%}"),
        ("best guess from the text alone", f"{scores.text_only:.1%}"),
        ("all held-out questions, one to four digits", f"{scores.mixed:.1%}"),
    ]
    summary = {
        "val_exact_match": scores.single,
        "val_exact_match_shuffled_images": scores.shuffled,
        "text_only_baseline": scores.text_only,
        "val_exact_match_all_questions": scores.mixed,
        "train_seconds": run["train_seconds"],
        "final_lm_loss": run["final_lm_loss"],
        "world_size": run["world_size"],
        "train_iters": config.train_iters,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_run_page(
        out / "report.html",
        title="Reading handwritten digits on two grids",
        lead=f"{config.encoder_dp} encoder ranks and {config.llm_dp} language-model ranks trained "
        f"for {config.train_iters} iterations in {run['train_seconds']:.0f} s. No handwritten "
        f"digit below was seen in training.",
        parts=(
            results_section(rows),
            examples_section(_examples(mixed, run["answers"])),
            *run_sections(out / "tensorboard"),
        ),
        style=STYLE,
    )
    table = Table(box=None, show_header=False, title="exact match", title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for label, value in rows:
        table.add_row(label, value)
    console = Console()
    console.print(table)
    console.print(f"trained in {run['train_seconds']:.0f} s; see {out / 'report.html'}")
    # Not wrapped, so that it can be copied.
    console.print(asking_line(out, single[0]), soft_wrap=True, highlight=False, markup=False)
    return 0


def asking_line(out: Path, sample: RawSample) -> str:
    """Write the image of a held-out question, and the line that asks the model about it.

    Args:
        out: Folder of the run.
        sample: The question.
    """
    image = out / EXAMPLE
    image.write_bytes(_png(sample))
    question = sample.question.replace("<image>", "").strip()
    command = ("megatron-mimo", "generate", str(out), question, "--image", str(image))
    return f"ask it yourself: {shlex.join(command)}"


def exact_match(samples: Sequence[RawSample], answers: Mapping[str, str]) -> float:
    """Fraction of the samples whose answer equals the expected one."""
    return sum(answers[s.key] == s.answer for s in samples) / len(samples)


def most_frequent_answer(train: Sequence[RawSample], val: Sequence[RawSample]) -> float:
    """Exact match from always giving the question's most frequent answer in training."""
    counts: dict[str, Counter[str]] = {}
    for sample in train:
        counts.setdefault(sample.question, Counter())[sample.answer] += 1
    right = 0
    for sample in val:
        seen = counts.get(sample.question)
        right += seen is not None and seen.most_common(1)[0][0] == sample.answer
    return right / len(val)


def _examples(samples: Sequence[RawSample], answers: Mapping[str, str]) -> list[Card]:
    """Examples, spread evenly over the split."""
    step = max(1, len(samples) // _EXAMPLES)
    return [
        Card(
            pictures=(Picture(content=_png(sample), media_type="image/png"),),
            question=sample.question.replace("<image>", "").strip(),
            expected=sample.answer,
            answer=answers[sample.key],
            is_right=answers[sample.key] == sample.answer,
        )
        for sample in samples[::step][:_EXAMPLES]
    ]


def _png(sample: RawSample) -> bytes:
    image = sample.items["encoder"][0]
    if isinstance(image, bytes):
        return image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()

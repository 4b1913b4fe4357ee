import shlex
from pathlib import Path

import pytest

from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.resolve import resolve
from megatron_mimo.data import RawSample
from megatron_mimo.tools.cards import Card, Picture
from megatron_mimo.tools.demo.command import (
    DemoConfig,
    asking_line,
    exact_match,
    most_frequent_answer,
    training_flags,
)
from megatron_mimo.tools.demo.page import examples_section, results_section
from megatron_mimo.tools.demo.worker import shuffle_images


def sample(key: str, answer: str, question: str = "<image>Which?", image: bytes = b"") -> RawSample:
    return RawSample.asking(key=key, question=question, answer=answer, items={"encoder": (image,)})


def test_exact_match_is_to_the_letter() -> None:
    samples = [sample("a", "7 3"), sample("b", "1"), sample("c", "5")]
    assert exact_match(samples, {"a": "7 3", "b": "1 ", "c": "5"}) == pytest.approx(2 / 3)


def test_the_blind_guess_is_the_most_frequent_answer_to_the_question() -> None:
    train = [sample("a", "1"), sample("b", "1"), sample("c", "2"), sample("d", "4", "<image>Many?")]
    val = [sample("e", "1"), sample("f", "2"), sample("g", "4", "<image>Many?"), sample("h", "9")]
    assert most_frequent_answer(train, val) == pytest.approx(2 / 4)


def test_shuffling_moves_every_image_and_nothing_else() -> None:
    samples = [sample(str(i), str(i), image=bytes([i])) for i in range(50)]
    shuffled = shuffle_images(samples)
    assert [(s.key, s.answer) for s in shuffled] == [(s.key, s.answer) for s in samples]
    assert sorted(s.items["encoder"] for s in shuffled) == [s.items["encoder"] for s in samples]
    moved = sum(s.items != t.items for s, t in zip(samples, shuffled, strict=True))
    assert moved > 40


def test_the_report_shows_results_and_answers() -> None:
    picture = Picture(content=b"PNG", media_type="image/png")
    example = {"pictures": (picture,), "question": "Which <digit>?"}
    _, results = results_section([("held-out single digits", "93.1%")])
    _, answers = examples_section(
        [
            Card(**example, expected="7", answer="7", is_right=True),
            Card(**example, expected="3", answer="<b>", is_right=False),
        ]
    )
    assert "<td class=number>93.1%</td>" in results
    assert "1 of 2 shown are right" in answers
    assert answers.count("<figure") == 2 and answers.count('class="wrong"') == 1
    assert "Which &lt;digit&gt;?" in answers and "&lt;b&gt;" in answers


@pytest.mark.parametrize(
    ("config", "shared"),
    [
        (DemoConfig(), 2),
        (DemoConfig(train_iters=1), 2),
        (DemoConfig(encoder_dp=1, llm_dp=3), 1),
        (DemoConfig(model_provider="mock"), 1),
    ],
    ids=["as it is", "one iteration", "three replicas", "dense"],
)
def test_the_training_flags_fit_together(config: DemoConfig, shared: int, tmp_path: Path) -> None:
    (tmp_path / "digits" / ".nv-meta").mkdir(parents=True)
    flags = training_flags(config, tmp_path / "digits", tmp_path)
    world_size = config.encoder_dp + config.llm_dp
    resolved = resolve(parse(flags, CommandLine, prog="megatron-mimo train").train, world_size)
    assert resolved.layout.target.ep == shared
    assert resolved.train_iters == config.train_iters
    assert resolved.global_batch_size == 16 * config.llm_dp
    assert resolved.save is not None and resolved.save.root == str(tmp_path)


def test_the_last_line_asks_about_a_held_out_image(tmp_path: Path) -> None:
    line = asking_line(tmp_path, sample("a", "7", "<image>Which digit is this?", image=b"PNG"))
    image = tmp_path / "example.png"
    assert shlex.split(line.removeprefix("ask it yourself: ")) == [
        "megatron-mimo",
        "generate",
        str(tmp_path),
        "Which digit is this?",
        "--image",
        str(image),
    ]
    assert image.read_bytes() == b"PNG"

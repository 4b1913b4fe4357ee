"""Tokens in front of an answer: those of training, and of transformers' own generation prompt."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from megatron_mimo.data import ByteTokenizer
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.samples.question import Source, encode_question, place_items
from megatron_mimo.data.text.chat_template import HuggingFaceChatTemplate
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.prompt import write_prompt
from megatron_mimo.data.text.question import answer_ends, write_question
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer
from tests.unit_tests.data.text.chats import (
    OPENS,
    TEMPLATES,
    laid_out,
    save_tokenizer,
    template,
)

QUESTION = [Turn("user", "<image>Which colour?")]
TALK = [*QUESTION, Turn("assistant", "Red."), Turn("user", "And <image> now?")]
ROWS = {"encoder": [3, 2]}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HuggingFaceTokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")

    @cache
    def load(name: str) -> HuggingFaceTokenizer:
        save_tokenizer(name, str(root / name))
        return HuggingFaceTokenizer(str(root / name), {"encoder": "<image>"})

    return load


def with_template(tokenizer: HuggingFaceTokenizer, text: str) -> HuggingFaceTokenizer:
    tokenizer._tokenizer.chat_template = text
    tokenizer.chat_template = HuggingFaceChatTemplate(tokenizer._tokenizer, "a folder")
    return tokenizer


def in_training(turns: list[Turn], config: DataConfig, tokenizer: Any) -> list[int]:
    """What stands in front of the first token of the last answer that is learnt."""
    rows = {"encoder": ROWS["encoder"][: sum(turn.text.count("<image>") for turn in turns)]}
    prompt = write_prompt([*turns, Turn("assistant", "Green")], laid_out(rows), config, tokenizer)
    last = len(prompt.targets) - 1 - prompt.targets[::-1].index(True)
    while prompt.targets[last]:
        last -= 1
    return prompt.tokens[: last + 1]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte-level", "metaspace always"])
def test_chats_begin_as_in_training(
    kind: str, name: str, marked: bool, load: Callable[[str], HuggingFaceTokenizer]
) -> None:
    tokenizer = with_template(load(kind), template(name, marked=marked))
    found = write_question(QUESTION, laid_out({"encoder": [3]}), DataConfig(), tokenizer)
    assert found == in_training(QUESTION, DataConfig(), tokenizer)


@pytest.mark.parametrize("format", ["plain", "nemotron6-moe"])
def test_so_do_other_formats(format: Any, load: Callable[[str], HuggingFaceTokenizer]) -> None:
    config, tokenizer = DataConfig(prompt_format=format), load("byte-level")
    assert write_question(TALK, laid_out(ROWS), config, tokenizer) == in_training(
        TALK, config, tokenizer
    )


def test_bytes_begin_as_in_training() -> None:
    tokenizer = ByteTokenizer()
    found = write_question(TALK, laid_out(ROWS), DataConfig(), tokenizer)
    assert found == in_training(TALK, DataConfig(), tokenizer)
    assert found[:4] == [258] * 3 + [ord("W")]


@pytest.mark.parametrize("turns", [QUESTION, TALK], ids=["question", "talk"])
def test_the_generation_prompt_is_that_of_transformers(
    turns: list[Turn], load: Callable[[str], HuggingFaceTokenizer]
) -> None:
    tokenizer = with_template(load("byte-level"), template("chatml", marked=False) + OPENS)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    theirs = tokenizer._tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    image, rows, wanted = tokenizer.placeholder_ids["encoder"], iter(ROWS["encoder"]), []
    for token in theirs:
        wanted += [token] * (next(rows) if token == image else 1)
    given = {"encoder": ROWS["encoder"][: theirs.count(image)]}
    assert write_question(turns, laid_out(given), DataConfig(), tokenizer) == wanted


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama-3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("phi", "</s>"),
    ],
)
def test_answers_end_with_what_ends_a_turn(
    name: str, end: str, load: Callable[[str], HuggingFaceTokenizer]
) -> None:
    tokenizer = with_template(load("byte-level"), template(name, marked=False))
    ends = answer_ends(DataConfig(), tokenizer)
    assert ends == {tokenizer.eos_id, tokenizer.token_id(end)}


def test_other_formats_end_with_their_tokens(load: Callable[[str], HuggingFaceTokenizer]) -> None:
    tokenizer = load("byte-level")
    assert answer_ends(DataConfig(prompt_format="plain"), tokenizer) == {tokenizer.eos_id}
    ends = answer_ends(DataConfig(prompt_format="nemotron6-moe"), tokenizer)
    assert ends == {tokenizer.eos_id, tokenizer.token_id("<|im_end|>")}
    assert answer_ends(DataConfig(), ByteTokenizer()) == {ByteTokenizer.eos_id}


def test_placeholders_are_put_in_front_or_counted() -> None:
    inputs = DataConfig().inputs
    assert place_items("Which?", {"encoder": 2}, inputs) == "<image><image>Which?"
    assert place_items("Is <image> it?", {"encoder": 1}, inputs) == "Is <image> it?"
    assert place_items("Which?", {}, inputs) == "Which?"
    with pytest.raises(ValueError, match="has 1 <image> and 2 images: expected one for each"):
        place_items("Is <image> it?", {"encoder": 2}, inputs)
    with pytest.raises(ValueError, match="has 1 <image> and 0 images"):
        place_items("Is <image> it?", {}, inputs)


def test_damaged_images_are_named() -> None:
    turns = [Turn("user", "<image>Which?")]
    for content in (b"no image", b""):
        given = {"encoder": [Source("a.png", content)]}
        with pytest.raises(ValueError, match=r"^a\.png cannot be used: ") as caught:
            encode_question(turns, given, DataConfig(), ByteTokenizer())
        assert len(str(caught.value).splitlines()) == 1


def test_half_a_character_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        encode_question([Turn("user", "\ud800")], {}, DataConfig(), ByteTokenizer())

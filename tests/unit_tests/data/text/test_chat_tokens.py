"""Tokens and targets of chats against transformers: templates, tokenizers, conversations."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.text.chat_template import HuggingFaceChatTemplate
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.prompt import write_prompt
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer
from tests.properties import examples
from tests.unit_tests.data.text.chats import (
    TEMPLATES,
    TOKENIZERS,
    laid_out,
    save_tokenizer,
    template,
)

Load = Callable[[str], tuple[Any, HuggingFaceTokenizer]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A tokenizer as transformers loads it, and as we do."""

    @cache
    def load(name: str) -> tuple[Any, HuggingFaceTokenizer]:
        from transformers import AutoTokenizer

        path = str(tmp_path_factory.mktemp("tokenizer"))
        save_tokenizer(name, path)
        return (
            AutoTokenizer.from_pretrained(path),
            HuggingFaceTokenizer(path, {"encoder": "<image>"}),
        )

    return load


# White space at the ends and alone, letters that a tokenizer lacks or cuts into bytes, words that
# templates write too.
pieces = st.sampled_from(
    [
        "a", "b", " ", "  ", "\n", "\n\n", "\t", "5", ".", "Red", "é", "😀", "ﬁ", "\u00a0", "日本",
        "user", "assistant", "ASSISTANT: ", "USER:", "<image>", "<b>", "|", "m",
    ]
)  # fmt: skip
texts = st.lists(pieces, max_size=6).map("".join)
talks = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def expected(
    theirs: Any, turns: Sequence[Turn], name: str, rows: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Tokens and mask by transformers, from the template with marks; rows in place of images."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    theirs.chat_template = template(name, marked=True)
    encoded = theirs.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    marks = encoded["assistant_masks"]
    _, (spans,) = render_jinja_template(
        conversations=[messages],
        chat_template=theirs.chat_template,
        return_assistant_tokens_mask=True,
        **theirs.special_tokens_map,
    )
    if any(encoded.char_to_token(start) is None for start, _ in spans):
        # Their mask ends at an answer whose first character the tokenizer drops.
        marks = [
            any(start <= char < stop for start, stop in spans for char in range(*place))
            for place in encoded["offset_mapping"]
        ]
    image = theirs.convert_tokens_to_ids("<image>")
    left = iter(rows)
    tokens: list[int] = []
    mask: list[bool] = []
    for token, learnt in zip(encoded["input_ids"], marks, strict=True):
        number = next(left) if token == image else 1
        tokens += [token] * number
        mask += [bool(learnt) and token != image] * number
    return tokens, [False, *mask[1:]]


@examples(500)
@given(st.sampled_from(TEMPLATES), st.sampled_from(TOKENIZERS), st.booleans(), talks, st.booleans())
def test_tokens_and_targets_are_those_of_transformers(
    load: Load, name: str, kind: str, marked: bool, talk: list[tuple[str, str]], asked_last: bool
) -> None:
    theirs, ours = load(kind)
    turns = [t for asked, said in talk for t in (Turn("user", asked), Turn("assistant", said))]
    if asked_last:
        turns.append(Turn("user", "and?"))
    rows = [1 + number % 3 for number in range(sum(t.text.count("<image>") for t in turns))]
    tokens, mask = expected(theirs, turns, name, rows)
    theirs.chat_template = template(name, marked=marked)
    ours.chat_template = HuggingFaceChatTemplate(theirs, "here")
    prompt = write_prompt(turns, laid_out({"encoder": rows}), DataConfig(), ours)
    assert prompt.tokens == tokens
    assert prompt.targets == mask


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_beside_an_item_keeps_its_tokens_in_the_plain_format(load: Load, kind: str) -> None:
    theirs, ours = load(kind)
    image = theirs.convert_tokens_to_ids("<image>")
    config = DataConfig(prompt_format="plain")
    for asked in ("<image>\nRed", "Red<image> a<image>", "<image>"):
        turns = [Turn("user", asked), Turn("assistant", "a")]
        rows = [1] * asked.count("<image>")
        prompt = write_prompt(turns, laid_out({"encoder": rows}), config, ours)
        whole = theirs.encode(f"{asked}\n", add_special_tokens=False)
        assert whole.count(image) == len(rows)
        assert prompt.tokens[: len(whole)] == whole

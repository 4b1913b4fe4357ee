"""One question with its items, from texts and files to the tokens that a model continues."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Inputs, Item, ItemInput
from megatron_mimo.data.samples.sample import (
    RawSample,
    UnusableError,
    encode_item,
    require_placeholders,
)
from megatron_mimo.data.samples.written import write_out
from megatron_mimo.data.text.clean import MalformedError, require_unicode
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.placeholders import count_placeholders
from megatron_mimo.data.text.question import write_question
from megatron_mimo.data.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Source:
    """An item of a question.

    Attributes:
        name: Its name in messages, such as the path of its file.
        content: Contents of a file, or an array, as the module's input takes it.
    """

    name: str
    content: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedQuestion:
    """A question ready for the model.

    Attributes:
        tokens: Tokens, int64 [n], with placeholders expanded to the rows of their items.
        items: Module -> its items in token order; only modules with items.
    """

    tokens: NDArray[np.int64]
    items: Mapping[str, tuple[Item, ...]]


def place_items(question: str, numbers: Mapping[str, int], inputs: Inputs) -> str:
    """A question with a placeholder for each of its items.

    Where it has none of a kind, they are put in front of it.

    Args:
        question: Text of the question.
        numbers: Kind -> number of its items in the question.
        inputs: Kinds of items, with their placeholders.

    Raises:
        ValueError: The question has placeholders, and more or fewer than there are items.
    """
    found = count_placeholders([question], inputs)
    front = ""
    for module, kind in inputs.items():
        number = numbers.get(module, 0)
        if not found[module]:
            front += kind.placeholder * number
        elif found[module] != number:
            raise ValueError(
                f"the question has {found[module]} {kind.placeholder} and {number} "
                f"{kind.words.plural}: expected one for each {kind.words.noun}, or none, which "
                f"puts them in front"
            )
    return front + question


def encode_question(
    turns: Sequence[Turn],
    items: Mapping[str, Sequence[Source]],
    config: DataConfig,
    tokenizer: Tokenizer,
) -> EncodedQuestion:
    """Tokenise a conversation that ends with a question, and encode its items.

    Args:
        turns: Turns with one placeholder for each item.
        items: Kind -> its items, in the order of its placeholders.
        config: Prompt format and kinds of items.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: An item is damaged (the message names it), placeholders and items differ in
            number, or the chat template cannot write the conversation.
    """
    try:
        for turn in turns:
            require_unicode(turn.text, "text")
    except MalformedError as error:
        raise ValueError(f"a question or answer cannot be used: {error}") from error
    given = {module: tuple(s.content for s in sources) for module, sources in items.items()}
    require_placeholders(RawSample(key="question", turns=tuple(turns), items=given), config.inputs)
    encoded = {
        module: tuple(_encoded(source, kind.among(len(sources))) for source in sources)
        for module, kind in config.inputs.items()
        if (sources := items.get(module))
    }
    written = write_out(turns, encoded, config.inputs)
    tokens = write_question(written.turns, written.layouts, config, tokenizer)
    if not tokens:
        raise ValueError("the question is empty: expected a text, or an item with one")
    return EncodedQuestion(tokens=np.array(tokens, dtype=np.int64), items=written.items)


def _encoded(source: Source, kind: ItemInput) -> Item:
    try:
        item, flaw = encode_item(source.content, kind, with_content=True)
    except UnusableError as error:
        raise ValueError(f"{source.name} cannot be used: {error}") from error
    if flaw is not None:
        # In training a blank stands for it; an answer about a blank would be made up.
        raise ValueError(f"{source.name} cannot be used: {flaw.partition(';')[0]}")
    return item

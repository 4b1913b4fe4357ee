"""Where items stand in a text: placeholders, one for each item."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from megatron_mimo.data.inputs import Inputs


def split_text(text: str, inputs: Inputs) -> list[tuple[str, str | None]]:
    """Cut a text at the placeholders of all modules.

    Returns:
        The pieces of text, each with the module whose placeholder follows it; None at the end.
    """
    return _split(text, {kind.placeholder: module for module, kind in inputs.items()})


def split_written(text: str, inputs: Inputs) -> list[tuple[str, str | None]]:
    """`split_text` of a text that has each module's token in place of its placeholder."""
    return _split(text, {kind.token: module for module, kind in inputs.items()})


def _split(text: str, modules: Mapping[str, str]) -> list[tuple[str, str | None]]:
    if not modules:
        return [(text, None)]
    cut = _any_of(tuple(modules)).split(text)
    followed: list[str | None] = [modules[mark] for mark in cut[1::2]]
    return list(zip(cut[::2], [*followed, None], strict=True))


@cache
def _any_of(placeholders: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of every placeholder; writing it takes longer than cutting a text with it."""
    return re.compile(f"({'|'.join(map(re.escape, placeholders))})")


def count_placeholders(texts: Sequence[str], inputs: Inputs) -> Counter[str]:
    """Module -> number of its placeholders in texts."""
    return Counter(
        module for text in texts for _, module in split_text(text, inputs) if module is not None
    )


def write_inline(text: str, inputs: Inputs) -> str:
    """A text with each placeholder as its module's items are written without a chat template."""
    return "".join(
        piece if module is None else f"{piece}{inputs[module].inline}"
        for piece, module in split_text(text, inputs)
    )


def require_no_tokens(texts: Sequence[str], inputs: Inputs) -> None:
    """Refuse texts with a token of rows that is no placeholder.

    Raises:
        ValueError: A text has one.
    """
    for kind in inputs.values():
        if kind.token != kind.placeholder and any(kind.token in text for text in texts):
            raise ValueError(
                f"its text contains {kind.token}, the {kind.words.noun} token, outside of "
                f"placeholders: remove it; {kind.placeholder} stands for {kind.words.one}"
            )

"""The text of tokens as they come, in pieces that never split a character."""

from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that is needed here; `data.Tokenizer` has it."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens."""
        ...


class Pieces:
    """Turns tokens into pieces of text, which together are the text of all tokens.

    A token may be a part of a character, and may look otherwise at the beginning of a text. So the
    tokens of the last piece are decoded again with each new one, and what ends in the mark of an
    incomplete character waits for the next token.

    Args:
        tokenizer: Decodes tokens.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        # Tokens of the last piece, whose text is out, then those that wait.
        self._tokens: list[int] = []
        self._out = 0

    def push(self, token: int) -> str:
        """The piece that a token completes; empty where it completes none."""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._tokens = self._tokens[self._out :]
        self._out = len(self._tokens)
        return new

    def flush(self) -> str:
        """What still waits, after the last token; incomplete characters are marked."""
        new = self._new_text()
        self._tokens, self._out = [], 0
        return new

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._out])
        return self._tokenizer.decode(self._tokens)[len(before) :]

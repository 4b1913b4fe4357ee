"""Tokenizers: a byte tokenizer that needs no file, and those of Hugging Face."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_mimo.border import border
from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.text.chat_template import ChatTemplate, HuggingFaceChatTemplate
from megatron_mimo.data.text.placeholders import split_written

_VOCAB_MULTIPLE = 128
# Flag that chooses a module's placeholder, for messages.
_FLAGS = {ENCODER: "--image-token"}


@dataclass(frozen=True, slots=True)
class Spelled:
    """Tokens of a text, with the characters that each stands for.

    Attributes:
        tokens: Numbers of the tokens, in their order.
        starts: First character of each. Tokens of one character, such as its bytes, or a blank that
            the tokenizer adds in front of it, share its place.
        stops: One past the last character of each.
    """

    tokens: list[int]
    starts: list[int]
    stops: list[int]


class Tokenizer(Protocol):
    """Interface of a tokenizer for the data and the model.

    Attributes:
        num_tokens: Number of tokens; ids of tokens are smaller.
        vocab_size: Number of rows of the embedding table, padded for tensor parallelism.
        placeholder_ids: Module -> id of the token that its rows replace.
        pad_id: Id of the token that fills sequences.
        eos_id: Id of the token that ends an answer.
        chat_template: Format of the tokenizer for conversations; None without one.
    """

    num_tokens: int
    vocab_size: int
    placeholder_ids: Mapping[str, int]
    pad_id: int
    eos_id: int
    chat_template: ChatTemplate | None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens around it."""
        ...

    def encode_with_items(self, text: str, inputs: Inputs) -> list[int]:
        """Tokens of a text in which the token of each module stands for an item."""
        ...

    def spell(self, text: str) -> Spelled | None:
        """Tokens of a text with placeholders, and their places in it.

        Returns:
            None if the tokenizer does not tell places.
        """
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of the token that is exactly a text, or None."""
        ...


class ByteTokenizer:
    """UTF-8 bytes, two special tokens, and one for each module that has items.

    Args:
        modules: Names of the modules, which get their tokens in this order.
    """

    pad_id = 256
    eos_id = 257
    # Three multiples, which are enough for any realistic number of modules.
    vocab_size = 3 * _VOCAB_MULTIPLE
    chat_template: ChatTemplate | None = None

    def __init__(self, modules: Sequence[str] = (ENCODER,)) -> None:
        first = self.eos_id + 1
        self.placeholder_ids: Mapping[str, int] = {
            module: first + number for number, module in enumerate(modules)
        }
        self.num_tokens = first + len(modules)
        self.vocab_size = max(self.vocab_size, _padded(self.num_tokens))

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of a text."""
        return list(text.encode())

    def encode_with_items(self, text: str, inputs: Inputs) -> list[int]:
        """The bytes of the text between tokens of modules, which have numbers of their own."""
        tokens: list[int] = []
        for piece, follows in split_written(text, inputs):
            tokens += self.encode(piece)
            if follows is not None:
                tokens.append(self.placeholder_ids[follows])
        return tokens

    def spell(self, text: str) -> Spelled | None:
        """None: no format that asks for places can be written in bytes alone."""
        return None

    def decode(self, tokens: list[int]) -> str:
        """Text of the bytes, without special tokens; invalid UTF-8 is marked."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """Byte of one ASCII character; None for other texts."""
        return ord(token) if len(token) == 1 and token.isascii() else None


class HuggingFaceTokenizer:
    """A tokenizer from a folder that `transformers` wrote.

    Args:
        path: Path to the folder.
        placeholders: Module -> placeholder, a token of the vocabulary that its rows replace.

    Raises:
        ValueError: The folder has no tokenizer, or a placeholder or the end-of-sequence token is
            missing.
    """

    def __init__(self, path: str, placeholders: Mapping[str, str]) -> None:
        # transformers takes seconds to import; only runs that use it import it.
        from transformers import AutoTokenizer

        if not Path(path).is_dir():
            raise ValueError(
                f"--tokenizer-model {path} is not a folder: expected one with tokenizer.json, as "
                f"save_pretrained writes it; leave the flag out for the built-in byte tokenizer"
            )
        with border(lambda why: f"--tokenizer-model {path} holds no tokenizer: {why}"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self._tokenizer.chat_template = (
                _template_of(Path(path)) or self._tokenizer.chat_template
            )
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        for module, placeholder in placeholders.items():
            if placeholder not in vocabulary:
                flag = _FLAGS.get(module, f"the placeholder of module {module}")
                raise ValueError(
                    f"{flag} {placeholder!r} is not in the vocabulary of --tokenizer-model "
                    f"{path}{_resembling(placeholder, vocabulary)}: name a token of it, or add one "
                    f"to the tokenizer"
                )
        eos_id = self._tokenizer.eos_token_id
        if eos_id is None:
            raise ValueError(
                f"--tokenizer-model {path} has no end-of-sequence token, which answers need: set "
                f"eos_token in its tokenizer_config.json"
            )
        self._read_placeholders(placeholders.values())
        # These take the white space beside them away; it is not what they stand for.
        self._stripping = frozenset(
            token_id
            for token_id, token in self._tokenizer.added_tokens_decoder.items()
            if token.lstrip or token.rstrip
        )
        pad_id = self._tokenizer.pad_token_id
        self._vocabulary = vocabulary
        self.placeholder_ids: Mapping[str, int] = {
            module: vocabulary[placeholder] for module, placeholder in placeholders.items()
        }
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.num_tokens = max(vocabulary.values()) + 1
        self.vocab_size = _padded(self.num_tokens)
        self.chat_template: ChatTemplate | None = (
            HuggingFaceChatTemplate(self._tokenizer, path)
            if self._tokenizer.chat_template
            else None
        )

    @property
    def pretrained(self) -> Any:
        """The tokenizer of `transformers`, which reads each placeholder as one token."""
        return self._tokenizer

    @property
    def eos_token(self) -> str:
        """Text of the token that ends an answer."""
        token: str = self._tokenizer.eos_token
        return token

    def _read_placeholders(self, placeholders: Iterable[str]) -> None:
        """Make the tokenizer read each placeholder as one token wherever it stands.

        Those that are words of the vocabulary only would be read with the letters around them.
        """
        from transformers import AddedToken

        words = [p for p in placeholders if p not in self._tokenizer.added_tokens_encoder]
        self._tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
        if self._tokenizer.is_fast:
            # Special tokens around a text are never asked for, and what else a post-processor does
            # is to take white space out of the places of tokens.
            self._tokenizer.backend_tokenizer.post_processor = None

    def encode(self, text: str) -> list[int]:
        """Tokens of the text, without special tokens around it."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def encode_with_items(self, text: str, inputs: Inputs) -> list[int]:
        """Tokens of the text as a whole; placeholders are tokens of the vocabulary."""
        return self.encode(text)

    def spell(self, text: str) -> Spelled | None:
        """Tokens of the text as a whole, those of `apply_chat_template` for what it writes."""
        if not self._tokenizer.is_fast:
            return None
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, places = encoded["input_ids"], encoded["offset_mapping"]
        starts, stops = map(list, zip(*places, strict=True)) if places else ([], [])
        spelled = Spelled(tokens, starts, stops)
        for at, token in enumerate(tokens if self._stripping else ()):
            if token in self._stripping:
                start, stop = places[at]
                kept = text[start:stop].lstrip()
                spelled.starts[at] = stop - len(kept)
                spelled.stops[at] = stop - len(kept) + len(kept.rstrip())
        return spelled

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens, without special tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int | None:
        """Id in the vocabulary, or None."""
        return self._vocabulary.get(token)


def _template_of(folder: Path) -> str | None:
    """The chat template in a file that transformers reads for processors only, before others."""
    file = folder / "chat_template.json"
    if not file.is_file():
        return None
    template: str | None = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return template


def _padded(num_tokens: int) -> int:
    return -(-num_tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def _resembling(wanted: str, vocabulary: Iterable[str]) -> str:
    """The special tokens most similar to a missing one, for an error message."""
    marked = {token.lower(): token for token in vocabulary if token[:1] in ("<", "[")}
    close = difflib.get_close_matches(wanted.lower(), marked, n=5)
    return f"; it has {', '.join(marked[token] for token in close)}" if close else ""


def read_image_tokens(path: str, token_id: int) -> tuple[str | None, tuple[str, str]]:
    """How the tokenizer of a folder writes an image.

    Returns:
        The text of the token with this id, None where the vocabulary has none; and what
        transformers' processor writes before and after an image.

    Raises:
        ValueError: The folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    with border(lambda why: f"{path} holds no tokenizer: {why}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
    found = (token for token, number in tokenizer.get_vocab().items() if number == token_id)
    before = getattr(tokenizer, "image_start_token", "<img>")
    return next(found, None), (before, getattr(tokenizer, "image_end_token", "</img>"))


def build_tokenizer(path: str | None, placeholders: Mapping[str, str]) -> Tokenizer:
    """The byte tokenizer, or the one in a folder.

    Args:
        path: Path to the folder of a Hugging Face tokenizer; None for the byte tokenizer.
        placeholders: Module -> placeholder of its items in texts.

    Raises:
        ValueError: The folder has no tokenizer, or this lacks a placeholder.
    """
    if path is None:
        return ByteTokenizer(tuple(placeholders))
    return HuggingFaceTokenizer(path, placeholders)

"""Text to tokens: a byte tokenizer that needs no file, or a Hugging Face one."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_VOCAB_MULTIPLE = 128


class ChatTemplate(Protocol):
    """How a tokenizer writes conversations; a message has a role and a content, both texts."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Write messages out.

        Raises:
            ValueError: The template refuses them.
        """
        ...

    def render_marked(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Write messages out, with where its generated parts begin and end.

        Returns:
            The text, and its generated parts; None where the template does not mark any.

        Raises:
            ValueError: The template refuses them.
        """
        ...


class Tokenizer(Protocol):
    """What the data and the model need from a tokenizer.

    Attributes:
        num_tokens: Numbers of tokens are below.
        vocab_size: Size of the embedding table, padded for tensor parallelism.
        image_token_id: Token that rows replace.
        pad_id: Fills sequences up.
        eos_id: Ends an answer.
        chat_template: How it writes conversations, if it says so.
    """

    num_tokens: int
    vocab_size: int
    image_token_id: int
    pad_id: int
    eos_id: int
    chat_template: ChatTemplate | None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens around it."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without special tokens."""
        ...

    def token_id(self, token: str) -> int | None:
        """The token that a text is by itself, or None."""
        ...


class ByteTokenizer:
    """UTF-8 bytes and three special tokens."""

    pad_id = 256
    eos_id = 257
    image_token_id = 258
    num_tokens = 259
    vocab_size = 384
    chat_template: ChatTemplate | None = None

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """Text of the bytes; special tokens are dropped, broken UTF-8 is marked."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """The byte of one ASCII character; None of anything else."""
        return ord(token) if len(token) == 1 and token.isascii() else None


class HuggingFaceTokenizer:
    """A tokenizer from a folder that `transformers` wrote.

    Args:
        path: The folder.
        image_token: Token that rows replace; must be in the vocabulary.

    Raises:
        ValueError: The folder holds no tokenizer, or the image or end-of-sequence token is missing.
    """

    def __init__(self, path: str, image_token: str) -> None:
        # transformers takes seconds to import; only runs that use it pay.
        from transformers import AutoTokenizer

        if not Path(path).is_dir():
            raise ValueError(
                f"--tokenizer-model {path} is not a folder: expected one with tokenizer.json, as "
                f"save_pretrained writes it; leave the flag out for the built-in byte tokenizer"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer-model {path} holds no tokenizer: {error}") from error
        vocabulary = self._tokenizer.get_vocab()
        if image_token not in vocabulary:
            close = sorted(token for token in vocabulary if "image" in token.lower())[:5]
            known = f"; it has {', '.join(close)}" if close else ""
            raise ValueError(
                f"--image-token {image_token!r} is not in the vocabulary of --tokenizer-model "
                f"{path}{known}: name a token of it, or add one to the tokenizer"
            )
        eos_id = self._tokenizer.eos_token_id
        if eos_id is None:
            raise ValueError(
                f"--tokenizer-model {path} has no end-of-sequence token, which answers need: set "
                f"eos_token in its tokenizer_config.json"
            )
        pad_id = self._tokenizer.pad_token_id
        self._vocabulary: dict[str, int] = vocabulary
        self.image_token_id: int = vocabulary[image_token]
        self.eos_id: int = eos_id
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.num_tokens = max(vocabulary.values()) + 1
        self.vocab_size = -(-self.num_tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
        self.chat_template: ChatTemplate | None = (
            HuggingFaceChatTemplate(self._tokenizer) if self._tokenizer.chat_template else None
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of the text, without special tokens around it."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Text of the tokens, without special tokens."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def token_id(self, token: str) -> int | None:
        """Its number in the vocabulary, if it is there."""
        return self._vocabulary.get(token)


class HuggingFaceChatTemplate:
    """The template in a `transformers` tokenizer's folder.

    Args:
        tokenizer: Of `transformers`, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template: str = tokenizer.get_chat_template()
        self._marks = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Write messages out."""
        return self._render(messages)[0]

    def render_marked(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """Write messages out, with what stands in `generation` blocks."""
        text, marked = self._render(messages)
        return text, marked if self._marks else None

    def _render(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), marked = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marks,
                # Thoughts of earlier turns are learnt too; templates that do not know the name
                # pass it over.
                truncate_history_thinking=False,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of {roles} ({error}): "
                f"change the sample, or choose another --tokenizer-prompt-format"
            ) from error
        return text, [(start, stop) for start, stop in marked[0]] if marked else []


def build_tokenizer(path: str | None, image_token: str) -> Tokenizer:
    """The byte tokenizer, or the one in a folder.

    Args:
        path: Folder of a Hugging Face tokenizer, or None.
        image_token: Placeholder of images in texts.
    """
    return ByteTokenizer() if path is None else HuggingFaceTokenizer(path, image_token)

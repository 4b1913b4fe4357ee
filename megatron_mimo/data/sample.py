"""One sample: from turns and images to tokens, a target mask and patches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.conversation import Turn
from megatron_mimo.data.prompt import write_prompt
from megatron_mimo.data.tokenizer import Tokenizer
from megatron_mimo.images import (
    BrokenImageError,
    EncodedImage,
    ImageSource,
    blank_image,
    decode_image,
    encode_image,
    examine_image,
    image_grids,
    rows_of,
)

SkipKind = Literal[
    "broken image",
    "missing file",
    "malformed text",
    "no answer",
    "too long",
    "unreadable shard",
    "blank for an image",
]
_SHARD = ", shard "


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """A conversation as it was stored; a plain document is one turn of the assistant's.

    Attributes:
        key: Names the sample within its dataset.
        turns: In order.
        images: Encoded files, or uint8 [H, W, 3] pixels, in the order of the placeholders.
        source: Dataset and shard, as `name_source` writes them.
    """

    key: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    source: str = "memory"

    @classmethod
    def asking(
        cls,
        *,
        key: str,
        question: str,
        answer: str,
        images: tuple[ImageSource, ...] = (),
        source: str = "memory",
    ) -> Self:
        """A question and its answer."""
        turns = (Turn("user", question), Turn("assistant", answer))
        return cls(key=key, turns=turns, images=images, source=source)

    @property
    def question(self) -> str:
        """What the users say, a line for each turn."""
        return "\n".join(turn.text for turn in self.turns if turn.role == "user")

    @property
    def answer(self) -> str:
        """The last turn."""
        return self.turns[-1].text


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A sample ready for collation.

    Attributes:
        key: As stored.
        tokens: int64 [n]; image tokens already expanded.
        targets: bool [n], the tokens to learn; never the first, which nothing predicts.
        images: In token order.
        flaw: Of an image that a blank stands for, where pixels are read; the sample is used.
    """

    key: str
    tokens: NDArray[np.int64]
    targets: NDArray[np.bool_]
    images: tuple[EncodedImage, ...]
    flaw: "SkippedSample | None" = None

    @property
    def num_positions(self) -> int:
        """Tokens that it takes of a sequence; the last one is a target only."""
        return len(self.tokens) - 1

    @property
    def target_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.targets.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """A sample that cannot be used; every reader of its lane leaves it out.

    Attributes:
        key: As stored.
        source: Dataset and shard.
        kind: Of damage, for counts.
        reason: What is wrong with it.
    """

    key: str
    source: str
    kind: SkipKind
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedSample:
    """A sample that contradicts itself or the settings; it stops the run.

    Attributes:
        message: For the user.
    """

    message: str


# Outcomes travel as values: a reader process hands them to the training process, which counts
# skips and raises errors, in the order of the samples.
Outcome = EncodedSample | SkippedSample | RejectedSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One sequence, and what was left out on the way to it.

    Attributes:
        documents: The samples that share the sequence, in order; one without packing.
        skipped: Unusable samples, in order.
    """

    documents: tuple[EncodedSample, ...]
    skipped: tuple[SkippedSample, ...] = ()


Draw = Drawn | RejectedSample


def draw(
    outcomes: Iterator[Outcome | tuple[EncodedSample, ...]], where: str, max_skips_in_row: int
) -> Draw | None:
    """The next sequence; None at the end of the outcomes.

    Args:
        outcomes: Samples, or the samples of one sequence.
        where: Names the source in the error.
        max_skips_in_row: Unusable samples in a row that mean a broken dataset.
    """
    skipped: list[SkippedSample] = []
    for outcome in outcomes:
        match outcome:
            case RejectedSample():
                return outcome
            case SkippedSample():
                skipped.append(outcome)
                if len(skipped) >= max_skips_in_row:
                    return RejectedSample(
                        message=f"{where}: {len(skipped)} unusable samples in a row, the last "
                        f"one {outcome.key!r} of {outcome.source} ({outcome.reason}): the dataset "
                        f"is broken; check or rewrite it"
                    )
            case EncodedSample():
                return Drawn(documents=(outcome,), skipped=tuple(skipped))
            case _:
                return Drawn(documents=outcome, skipped=tuple(skipped))
    return None


class UnusableError(Exception):
    """A sample to leave out.

    Args:
        kind: Of damage.
        reason: What is wrong with it.
    """

    def __init__(self, kind: SkipKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def name_source(dataset: object, shard: str) -> str:
    """How errors name where a sample is from."""
    return f"dataset {dataset}{_SHARD}{shard}"


def dataset_of(source: str) -> str:
    """The dataset of a source."""
    return source.rpartition(_SHARD)[0] or source


def try_encode(
    raw: RawSample, config: DataConfig, tokenizer: Tokenizer, *, with_patches: bool
) -> Outcome:
    """`encode_sample`, with its failures as values."""
    try:
        return encode_sample(raw, config, tokenizer, with_patches=with_patches)
    except UnusableError as error:
        return SkippedSample(key=raw.key, source=raw.source, kind=error.kind, reason=str(error))
    except ValueError as error:
        return RejectedSample(message=f"sample {raw.key!r} of {raw.source}: {error}")


def encode_sample(
    raw: RawSample, config: DataConfig, tokenizer: Tokenizer, *, with_patches: bool
) -> EncodedSample:
    """Tokenise a sample and cut its images up.

    Each placeholder becomes as many image tokens as its image has rows. All that decides whether a
    sample is used, and how long it is, comes from its text and from the headers of its images:
    readers with and without patches skip the same samples. An image that looks whole and does not
    decode therefore becomes a blank of its size.

    Readers with patches tokenise too, although they feed no tokens to a model: where the rows of an
    image go, how many tokens are learnt, whether a sample fits and with which others it is packed
    all depend on every token in front of it.

    Args:
        raw: The sample.
        config: Prompt format, image sizes and sequence length.
        tokenizer: Of the texts.
        with_patches: Keep the pixels; without, images are not decoded.

    Raises:
        UnusableError: An image is broken, there is nothing to learn, or the sample is too long.
        ValueError: Placeholders and images differ in number, the text holds a stray image token,
            or the chat template cannot write the conversation.
    """
    placeholders = sum(turn.text.count(config.image_token) for turn in raw.turns)
    if placeholders != len(raw.images):
        raise ValueError(
            f"{placeholders} {config.image_token} placeholders and {len(raw.images)} images: "
            f"expected one placeholder for each image"
        )
    _require_answers(raw.turns, config.image_token)
    sizes = [_examine(image) for image in raw.images]
    grids = [image_grids(width, height, config.image) for width, height in sizes]
    rows = [rows_of(grid, config.image) for grid in grids]
    prompt = write_prompt(raw.turns, rows, config, tokenizer)
    _check_tokens(prompt.tokens, prompt.targets, sum(rows), config, tokenizer)
    sample = EncodedSample(
        key=raw.key,
        tokens=np.array(prompt.tokens, dtype=np.int64),
        targets=np.array(prompt.targets, dtype=np.bool_),
        images=tuple(
            EncodedImage(grid, count, None) for grid, count in zip(grids, rows, strict=True)
        ),
    )
    return add_patches(sample, raw, config) if with_patches else sample


def add_patches(sample: EncodedSample, raw: RawSample, config: DataConfig) -> EncodedSample:
    """Decode the images of a sample that was encoded without patches.

    Args:
        sample: Of `encode_sample`.
        raw: What it was encoded from.
        config: Image sizes.
    """
    images, flaw = [], None
    for image in raw.images:
        pixels, reason = _pixels(image, _examine(image))
        images.append(encode_image(pixels, config.image, with_patches=True))
        if reason is not None:
            flaw = SkippedSample(
                key=raw.key, source=raw.source, kind="blank for an image", reason=reason
            )
    return replace(sample, images=tuple(images), flaw=flaw)


def _require_answers(turns: Sequence[Turn], image_token: str) -> None:
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not answers:
        raise UnusableError("no answer", "it has no answer to learn")
    if not all(answer.replace(image_token, "").strip() for answer in answers):
        raise UnusableError("no answer", "it has an answer without text")


def _examine(image: ImageSource) -> tuple[int, int]:
    try:
        return examine_image(image)
    except BrokenImageError as error:
        raise UnusableError("broken image", str(error)) from error


def _pixels(image: ImageSource, size: tuple[int, int]) -> tuple[Image, str | None]:
    """The picture; or a blank of its size, and why."""
    try:
        decoded = decode_image(image)
    except BrokenImageError as error:
        return blank_image(*size), f"{error}; a blank stands in its place"
    if decoded.size != size:
        found = "decodes to {} x {} pixels".format(*decoded.size)
        return blank_image(*size), f"image of {size[0]} x {size[1]} pixels {found}: a blank stands"
    return decoded, None


def _check_tokens(
    tokens: Sequence[int],
    targets: Sequence[bool],
    num_rows: int,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> None:
    image_tokens = tokens.count(tokenizer.image_token_id)
    if image_tokens != num_rows:
        raise ValueError(
            f"{image_tokens} image tokens for {num_rows} rows of its images: its text "
            f"contains the image token (id {tokenizer.image_token_id}) outside of placeholders; "
            f"remove it, or choose another --image-token"
        )
    if not any(targets):
        raise UnusableError("no answer", "none of its tokens can be learnt")
    # The last token is a target only, so a sequence holds one token more than it has positions.
    if len(tokens) - 1 > config.seq_length:
        text = len(tokens) - num_rows
        raise UnusableError(
            "too long",
            f"needs {len(tokens) - 1} positions ({num_rows} rows of images and {text} "
            f"tokens of text), more than --seq-length {config.seq_length}: raise --seq-length, "
            f"lower --dynamic-resolution-max-patches, or shorten the sample",
        )

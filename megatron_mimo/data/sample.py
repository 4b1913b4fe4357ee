"""One sample: from a question, an answer and images to tokens, a target mask and patches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.tokenizer import Tokenizer
from megatron_mimo.images import BrokenImageError, EncodedImage, decode_image, encode_image

_END_OF_QUESTION = "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """One conversation turn as it was stored.

    Attributes:
        key: Names the sample within its dataset.
        question: Prompt, with one placeholder for each image.
        answer: What the model learns to write.
        images: Encoded files, or uint8 [H, W, 3] pixels, in the order of the placeholders.
        source: Dataset and shard, for errors.
    """

    key: str
    question: str
    answer: str
    images: tuple[bytes | NDArray[np.uint8], ...] = ()
    source: str = "memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A sample ready for collation.

    Attributes:
        key: As stored.
        tokens: int64 [n]; image tokens already expanded.
        targets: bool [n], the tokens to learn; never the first, which nothing predicts.
        images: In token order.
    """

    key: str
    tokens: NDArray[np.int64]
    targets: NDArray[np.bool_]
    images: tuple[EncodedImage, ...]

    @property
    def target_tokens(self) -> int:
        """Tokens that count in the loss."""
        return int(self.targets.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """A sample that cannot be read; every reader of its lane leaves it out.

    Attributes:
        key: As stored.
        source: Dataset and shard.
        reason: What is broken.
    """

    key: str
    source: str
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
        skipped: Unreadable samples, in order.
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
        max_skips_in_row: Unreadable samples in a row that mean a broken dataset.
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
                        message=f"{where}: {len(skipped)} unreadable samples in a row, the last "
                        f"one {outcome.key!r} of {outcome.source} ({outcome.reason}): the dataset "
                        f"is broken; check or rewrite it"
                    )
            case EncodedSample():
                return Drawn(documents=(outcome,), skipped=tuple(skipped))
            case _:
                return Drawn(documents=outcome, skipped=tuple(skipped))
    return None


def try_encode(
    raw: RawSample, config: DataConfig, tokenizer: Tokenizer, *, with_patches: bool
) -> Outcome:
    """`encode_sample`, with its failures as values."""
    try:
        return encode_sample(raw, config, tokenizer, with_patches=with_patches)
    except BrokenImageError as error:
        return SkippedSample(key=raw.key, source=raw.source, reason=str(error))
    except ValueError as error:
        return RejectedSample(message=str(error))


def encode_sample(
    raw: RawSample, config: DataConfig, tokenizer: Tokenizer, *, with_patches: bool
) -> EncodedSample:
    """Tokenise a sample and cut its images up.

    Each placeholder becomes as many image tokens as its image has rows. Only the answer and the end
    of sequence are targets. Every reader decodes the images, whether or not it needs the patches,
    so that all of them skip the same samples.

    Args:
        raw: The sample.
        config: Placeholder, image sizes and sequence length.
        tokenizer: Of the texts.
        with_patches: Keep the pixels; without, only the rows are counted.

    Raises:
        BrokenImageError: An image does not decode.
        ValueError: Placeholders and images differ in number, the text holds a stray image token,
            the answer is empty, or the sample is too long.
    """
    where = f"sample {raw.key!r} of {raw.source}"
    segments = raw.question.split(config.image_token)
    if len(segments) - 1 != len(raw.images):
        raise ValueError(
            f"{where} has {len(segments) - 1} {config.image_token} placeholders in its question "
            f"and {len(raw.images)} images: expected one placeholder for each image"
        )
    if config.image_token in raw.answer:
        raise ValueError(
            f"{where} has the placeholder {config.image_token} in its answer: images belong into "
            f"the question"
        )
    if not raw.answer:
        raise ValueError(f"{where} has an empty answer: expected text to learn")
    images = tuple(
        encode_image(decode_image(image), config.image, with_patches=with_patches)
        for image in raw.images
    )
    prompt: list[int] = []
    for index, segment in enumerate(segments):
        if index:
            prompt += [tokenizer.image_token_id] * images[index - 1].rows
        prompt += tokenizer.encode(segment)
    prompt += tokenizer.encode(_END_OF_QUESTION)
    tokens = prompt + tokenizer.encode(raw.answer) + [tokenizer.eos_id]
    num_rows = sum(image.rows for image in images)
    _check_tokens(tokens, num_rows, where, config, tokenizer)
    return EncodedSample(
        key=raw.key,
        tokens=np.array(tokens, dtype=np.int64),
        targets=np.arange(len(tokens)) >= len(prompt),
        images=images,
    )


def _check_tokens(
    tokens: list[int],
    num_rows: int,
    where: str,
    config: DataConfig,
    tokenizer: Tokenizer,
) -> None:
    image_tokens = tokens.count(tokenizer.image_token_id)
    if image_tokens != num_rows:
        raise ValueError(
            f"{where} has {image_tokens} image tokens for {num_rows} rows of its images: its text "
            f"contains the image token (id {tokenizer.image_token_id}) outside of placeholders; "
            f"remove it, or choose another --image-token"
        )
    # The last token is a target only, so a sequence holds one token more than it has positions.
    if len(tokens) - 1 > config.seq_length:
        text = len(tokens) - num_rows
        raise ValueError(
            f"{where} needs {len(tokens) - 1} positions ({num_rows} rows of images and {text} "
            f"tokens of text), more than --seq-length {config.seq_length}: raise --seq-length, "
            f"lower --dynamic-resolution-max-patches, or shorten the sample"
        )

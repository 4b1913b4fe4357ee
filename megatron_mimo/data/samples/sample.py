"""One sample: from turns and items to tokens, a target mask and encoded items."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_mimo.border import TRACEBACK_FLAG, reason_of, show_traceback
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import BrokenItemError, Inputs, Item, ItemInput, module_of
from megatron_mimo.data.samples.written import by_module, write_out
from megatron_mimo.data.text.clean import MalformedError, require_unicode
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.placeholders import count_placeholders, split_text
from megatron_mimo.data.text.prompt import write_prompt
from megatron_mimo.data.text.tokenizer import Tokenizer

TOO_LONG = "too long"
_BLANK = "blank for "
_SHARD = ", shard "


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """A conversation as it was stored; a plain document is one turn of the assistant.

    Attributes:
        key: Key of the sample within its dataset.
        turns: Turns of the conversation in order.
        items: Kind -> sources of its items, files or arrays, in the order of its placeholders.
        source: Dataset and shard, as `name_source` writes them.
    """

    key: str
    turns: tuple[Turn, ...]
    items: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    source: str = "memory"

    @classmethod
    def asking(
        cls,
        *,
        key: str,
        question: str,
        answer: str,
        items: Mapping[str, tuple[Any, ...]] | None = None,
        source: str = "memory",
    ) -> Self:
        """A sample of a question and its answer."""
        turns = (Turn("user", question), Turn("assistant", answer))
        return cls(key=key, turns=turns, items=items or {}, source=source)

    def has_items(self, modules: Collection[str], inputs: Inputs) -> bool:
        """Whether one of the modules has an item in the sample."""
        return any(
            sources and name in inputs and module_of(name, inputs) in modules
            for name, sources in self.items.items()
        )

    @property
    def question(self) -> str:
        """Text of the users' turns, a line for each."""
        return "\n".join(turn.text for turn in self.turns if turn.role == "user")

    @property
    def answer(self) -> str:
        """Text of the last turn."""
        return self.turns[-1].text


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A sample ready for collation.

    Attributes:
        key: Key of the stored sample.
        tokens: Tokens, int64 [n], with placeholders expanded to the rows of their items.
        targets: Whether each token is learnt, bool [n]; never the first, which has no context.
        items: Module -> its items in token order; only modules with items in this sample.
        flaw: Damage of an item that a blank replaces, where content is read; the sample is used.
    """

    key: str
    tokens: NDArray[np.int64]
    targets: NDArray[np.bool_]
    items: Mapping[str, tuple[Item, ...]]
    flaw: "SkippedSample | None" = None

    @property
    def num_positions(self) -> int:
        """Number of positions that it takes in a sequence; the last token is only a target."""
        return len(self.tokens) - 1

    @property
    def target_tokens(self) -> int:
        """Number of tokens that count in the loss."""
        return int(self.targets.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """A sample that cannot be used; every reader of its lane skips it.

    Attributes:
        key: Key of the stored sample.
        source: Dataset and shard of the sample.
        kind: Kind of damage, for counts.
        reason: Description of the damage.
    """

    key: str
    source: str
    kind: str
    reason: str

    @property
    def is_blank(self) -> bool:
        """Whether the sample is used, with a blank for an item that cannot be decoded."""
        return self.kind.startswith(_BLANK)


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedSample:
    """A sample that contradicts itself or the settings; it stops the run.

    Attributes:
        message: Error message for the user.
    """

    message: str


# Outcomes are values: a reader process sends them to the training process, which counts skips and
# raises errors in the order of the samples.
Outcome = EncodedSample | SkippedSample | RejectedSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One sequence, and the samples that were skipped before it.

    Attributes:
        documents: Samples that share the sequence, in order; one without packing.
        skipped: Unusable samples in order.
    """

    documents: tuple[EncodedSample, ...]
    skipped: tuple[SkippedSample, ...] = ()


Draw = Drawn | RejectedSample


def draw(
    outcomes: Iterator[Outcome | tuple[EncodedSample, ...]], where: str, max_skips_in_row: int
) -> Draw | None:
    """The next sequence; None at the end of the outcomes.

    Args:
        outcomes: Iterator over samples, or over the samples of one sequence.
        where: Name of the source for error messages.
        max_skips_in_row: Number of unusable samples in a row that means a broken dataset.
    """
    skipped: list[SkippedSample] = []
    for outcome in outcomes:
        match outcome:
            case RejectedSample():
                return outcome
            case SkippedSample():
                skipped.append(outcome)
                if len(skipped) >= max_skips_in_row:
                    return RejectedSample(message=f"{where}: {_all_unusable(skipped)}")
            case EncodedSample():
                return Drawn(documents=(outcome,), skipped=tuple(skipped))
            case _:
                return Drawn(documents=outcome, skipped=tuple(skipped))
    return None


def _all_unusable(skipped: Sequence[SkippedSample]) -> str:
    """What is wrong with samples of which none can be used, and what to do."""
    last, kinds = skipped[-1], Counter(sample.kind for sample in skipped)
    if set(kinds) == {TOO_LONG}:
        # The reason ends with what to do.
        return (
            f"--seq-length is too short for {len(skipped)} samples in a row: the last one, "
            f"{last.key!r} of {last.source}, {last.reason}"
        )
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    remedy = "raise --seq-length, and " if TOO_LONG in kinds else ""
    return (
        f"{len(skipped)} unusable samples in a row, the last one {last.key!r} of {last.source} "
        f"({last.reason}); in all {counts}: {remedy}correct or rewrite the dataset"
    )


class UnusableError(Exception):
    """A sample that must be skipped.

    Args:
        kind: Kind of damage, for counts.
        reason: Description of the damage.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def name_source(dataset: object, shard: str) -> str:
    """Name of a sample's dataset and shard in error messages."""
    return f"dataset {dataset}{_SHARD}{shard}"


def dataset_of(source: str) -> str:
    """The dataset of a source."""
    return source.rpartition(_SHARD)[0] or source


def try_encode(
    raw: RawSample, config: DataConfig, tokenizer: Tokenizer, *, content: Collection[str]
) -> Outcome:
    """`encode_sample`, with its failures as values."""
    try:
        return encode_sample(raw, config, tokenizer, content=content)
    except UnusableError as error:
        return SkippedSample(key=raw.key, source=raw.source, kind=error.kind, reason=str(error))
    except MalformedError as error:
        return SkippedSample(
            key=raw.key, source=raw.source, kind="malformed text", reason=str(error)
        )
    except ValueError as error:
        return RejectedSample(message=f"sample {raw.key!r} of {raw.source}: {error}")
    # Tokenizers and codecs raise nearly anything.
    except Exception as error:
        show_traceback(error)
        return RejectedSample(
            message=f"sample {raw.key!r} of {raw.source} cannot be encoded ({reason_of(error)}): "
            f"{TRACEBACK_FLAG} shows where it failed"
        )


def encode_sample(
    raw: RawSample, config: DataConfig, tokenizer: Tokenizer, *, content: Collection[str]
) -> EncodedSample:
    """Tokenise a sample and encode its items.

    Each placeholder becomes as many tokens of its module as its item has rows. All that decides
    whether a sample is used, and how long it is, comes from its text and from the headers of its
    items: readers with and without content skip the same samples. An item that appears complete but
    cannot be decoded therefore becomes a blank of its shape.

    Readers of items tokenise too, although they give no tokens to a model: the positions of rows,
    the number of tokens to learn, whether a sample fits, and the samples it is packed with all
    depend on every token before it.

    Args:
        raw: Stored sample.
        config: Prompt format, kinds of items and sequence length.
        tokenizer: Tokenizer of the texts.
        content: Names of the modules whose items are decoded; only headers are read of others.

    Raises:
        UnusableError: An item is broken, there is nothing to learn, or the sample is too long.
        MalformedError: A text is not valid Unicode.
        ValueError: Placeholders and items differ in number, an item is of an unknown kind, the
            text holds a stray token of a module, or the chat template cannot write the
            conversation.
    """
    for turn in raw.turns:
        require_unicode(turn.text, "text")
    require_placeholders(raw, config.inputs)
    _require_answers(raw.turns, config.inputs)
    encoded = {
        name: tuple(
            encode_item(source, config.inputs[name].among(len(sources)), with_content=False)[0]
            for source in sources
        )
        for name, sources in _by_kind(raw, config.inputs)
    }
    written = write_out(raw.turns, encoded, config.inputs)
    prompt = write_prompt(written.turns, written.layouts, config, tokenizer)
    _check_tokens(prompt.tokens, prompt.targets, encoded, config)
    sample = EncodedSample(
        key=raw.key,
        tokens=np.array(prompt.tokens, dtype=np.int64),
        targets=np.array(prompt.targets, dtype=np.bool_),
        items=written.items,
    )
    return add_content(sample, raw, config, content)


def add_content(
    sample: EncodedSample, raw: RawSample, config: DataConfig, content: Collection[str]
) -> EncodedSample:
    """Decode the items of a sample that was encoded without content.

    Args:
        sample: Sample that `encode_sample` made.
        raw: Stored sample that it was encoded from.
        config: Settings with the kinds of items.
        content: Names of the modules whose items are decoded.
    """
    decoded: dict[str, list[Item]] = {}
    flaw = sample.flaw
    for name, sources in _by_kind(raw, config.inputs):
        if module_of(name, config.inputs) not in content:
            continue
        kind = config.inputs[name].among(len(sources))
        of_kind = decoded.setdefault(name, [])
        for source in sources:
            item, reason = encode_item(source, kind, with_content=True)
            of_kind.append(item)
            if reason is not None:
                flaw = SkippedSample(
                    key=raw.key,
                    source=raw.source,
                    kind=f"{_BLANK}{kind.words.one}",
                    reason=reason,
                )
    if not decoded:
        return sample
    found = by_module(raw.turns, _with_others(decoded, raw), config.inputs)
    items = {
        module: found[module] if module in content else of_module
        for module, of_module in sample.items.items()
    }
    return replace(sample, items=items, flaw=flaw)


def _with_others(decoded: Mapping[str, Sequence[Item]], raw: RawSample) -> dict[str, Sequence[Any]]:
    """Every kind that the sample has, so that places in the text can be counted."""
    return {name: decoded.get(name, sources) for name, sources in raw.items.items() if sources}


def _by_kind(raw: RawSample, inputs: Inputs) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The sources of each kind that has any, kinds in the order of the settings."""
    for name in inputs:
        sources = raw.items.get(name, ())
        if sources:
            yield name, sources


def require_placeholders(raw: RawSample, inputs: Inputs) -> None:
    """Refuse a sample whose texts have more or fewer placeholders of a kind than it has items.

    Raises:
        ValueError: They differ, or an item is of an unknown kind.
    """
    unknown = [name for name, sources in raw.items.items() if sources and name not in inputs]
    if unknown:
        raise ValueError(
            f"it has items of module {unknown[0]!r}: expected items of {', '.join(inputs)}"
        )
    found = count_placeholders([turn.text for turn in raw.turns], inputs)
    for module, kind in inputs.items():
        number = len(raw.items.get(module, ()))
        if found[module] != number:
            raise ValueError(
                f"{found[module]} {kind.placeholder} placeholders and {number} "
                f"{kind.words.noun if number == 1 else kind.words.plural}: expected one "
                f"placeholder for each {kind.words.noun}"
            )


def _require_answers(turns: Sequence[Turn], inputs: Inputs) -> None:
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    if not answers:
        raise UnusableError("no answer", "it has no answer to learn")
    for answer in answers:
        if not "".join(text for text, _ in split_text(answer, inputs)).strip():
            raise UnusableError("no answer", "it has an answer without text")


def encode_item(source: Any, kind: ItemInput, *, with_content: bool) -> tuple[Item, str | None]:
    """Encode an item as `ItemInput.encode` does, from its source alone.

    Raises:
        UnusableError: The item is damaged.
    """
    try:
        shape = kind.examine(source)
    except BrokenItemError as error:
        raise UnusableError(f"broken {kind.words.noun}", str(error)) from error
    return kind.encode(source, shape, with_content=with_content)


def _check_tokens(
    tokens: Sequence[int],
    targets: Sequence[bool],
    items: Mapping[str, Sequence[Item]],
    config: DataConfig,
) -> None:
    if not any(targets):
        raise UnusableError("no answer", "none of its tokens can be learnt")
    # The last token is a target only, so a sequence holds one token more than it has positions.
    if len(tokens) - 1 > config.seq_length:
        rows = {name: sum(item.rows for item in of_kind) for name, of_kind in items.items()}
        raise UnusableError(TOO_LONG, _too_long(len(tokens), rows, config))


def _too_long(num_tokens: int, rows: Mapping[str, int], config: DataConfig) -> str:
    # The message for a text without any item names the first kind.
    kinds = {name: config.inputs[name].words for name in rows or list(config.inputs)[:1]}
    parts = [f"{rows.get(name, 0)} rows of {words.plural}" for name, words in kinds.items()]
    text = num_tokens - sum(rows.values())
    remedies = ["raise --seq-length", *(words.smaller for words in kinds.values())]
    return (
        f"needs {num_tokens - 1} positions ({', '.join(parts)} and {text} tokens of text), more "
        f"than --seq-length {config.seq_length}: {', '.join(remedies)}, or shorten the sample"
    )

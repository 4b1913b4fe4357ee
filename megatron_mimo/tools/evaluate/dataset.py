"""Samples of a dataset as questions with the answers that they expect."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mimo.border import reason_of
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import Inputs
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.data.samples.sample import RawSample, RejectedSample, SkippedSample
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.conversation import Turn, parse_json
from megatron_mimo.data.text.placeholders import count_placeholders
from megatron_mimo.data.text.tokenizer import Tokenizer
from megatron_mimo.tools.data.sources import array_items
from megatron_mimo.tools.evaluate.metrics import Expected
from megatron_mimo.tools.evaluate.place import ARRAY, DatasetPlace

_TASK_FIELDS = ("task", "category")
_DIGEST_LENGTH = 32  # characters
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A sample that can be asked.

    Attributes:
        key: Key of the sample.
        where: Sample, and file or shard, for messages.
        turns: Turns up to the question, with one placeholder for each item.
        items: Module -> sources of its items, in the order of its placeholders.
        expected: What a right answer is.
        task: Task that it belongs to; None for none.
    """

    key: str
    where: str
    turns: tuple[Turn, ...]
    items: Mapping[str, tuple[Any, ...]]
    expected: Expected
    task: str | None

    def digest(self) -> str:
        """Digest of what is asked and expected, by which it is known again."""
        turns = [[turn.role, turn.text] for turn in self.turns]
        expected = [self.expected.references, self.expected.choices]
        found = hashlib.sha256(json.dumps([self.key, turns, expected]).encode())
        for module, sources in self.items.items():
            for source in sources:
                data = source if isinstance(source, bytes) else np.asarray(source).tobytes()
                found.update(f"\n{module} {len(data)}\n".encode())
                found.update(data)
        return found.hexdigest()[:_DIGEST_LENGTH]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unusable:
    """A sample that cannot be asked.

    Attributes:
        key: Key of the sample.
        message: The sample, where it is, and what is wrong with it, in one line.
    """

    key: str
    message: str

    def digest(self) -> str:
        """Digest of its key; the message may name its place in another way."""
        found = hashlib.sha256(json.dumps([self.key]).encode())
        return found.hexdigest()[:_DIGEST_LENGTH]


@dataclass(frozen=True, slots=True)
class Stored:
    """A sample as training reads it.

    Attributes:
        key: Key of the sample.
        parsed: The sample, or why training would not take it.
        fields: Fields of its JSON; none where that is not an object.
    """

    key: str
    parsed: RawSample | SkippedSample | RejectedSample
    fields: Mapping[str, Any]


def read_dataset(
    place: DatasetPlace, data: DataConfig, tokenizer: Tokenizer
) -> Iterator[Asked | Unusable]:
    """Every sample once, in stored order.

    Args:
        place: Where they are.
        data: Settings of the model's prompts and items.
        tokenizer: Tokenizer of the texts.

    Raises:
        ValueError: The dataset cannot be read.
    """
    for stored in _stored(place, data, tokenizer):
        yield ask(stored, data.inputs, place.task_field)


def _stored(place: DatasetPlace, data: DataConfig, tokenizer: Tokenizer) -> Iterator[Stored]:
    if place.is_file:
        yield from _read_file(place, data.inputs)
    else:
        yield from _read_prepared(place, data, tokenizer)


# -- prepared datasets -----------------------------------------------------------------------------


def _read_prepared(place: DatasetPlace, data: DataConfig, tokenizer: Tokenizer) -> Iterator[Stored]:
    # It imports energon, which a file does not need.
    from megatron_mimo.tools.evaluate.prepared import read_prepared

    config = replace(
        data,
        provider="energon",
        path=place.path,
        media_root=place.media_root,
        trust_dataset_code=place.trust_dataset_code,
        packing_buffer_size=None,
    )
    try:
        yield from read_prepared(config, place.split or "val", tokenizer)
    except ValueError as error:
        # Training's own words; its flag for a dataset has another name.
        raise ValueError(str(error).replace("--data-path", "--data")) from error


# -- files -----------------------------------------------------------------------------------------


def _read_file(place: DatasetPlace, inputs: Inputs) -> Iterator[Stored]:
    from megatron_mimo.data.reading.task_encoder import read_sample

    path = Path(place.path)
    media = MediaFolder(place.image_root or path.parent, place.media_root)
    is_array = path.suffix.lower() == ARRAY
    unit, number = ("item" if is_array else "line"), 0
    try:
        for number, text in _texts(path, is_array=is_array):
            key, source = f"{path.stem}-{number:08d}", f"{path}, {unit} {number}"
            try:
                content = parse_json(text)
            except MalformedError as error:
                bad = SkippedSample(key=key, source=source, kind="", reason=str(error))
                yield Stored(key, bad, {})
                continue
            parts = {"json": completed(content)}
            sample = read_sample(key, source, parts, media, inputs)
            yield Stored(key, sample, fields_of(content))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {path} cannot be read: {reason_of(error)}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        why = getattr(error, "msg", None) or reason_of(error)
        raise ValueError(
            f"--data {path}, item {number + 1}: malformed JSON: {why}; expected an array of "
            f"samples, [...]"
        ) from error


def _texts(path: Path, *, is_array: bool) -> Iterator[tuple[int, bytes]]:
    """Number and source text of each sample; empty lines are passed over."""
    if is_array:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, item in enumerate(array_items(file), 1):
                yield number, item.encode()
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if text := line.strip():
                yield number, text


# -- fields ----------------------------------------------------------------------------------------


def fields_of(content: object) -> Mapping[str, Any]:
    """Fields of a sample's JSON; none for anything but an object."""
    return content if isinstance(content, dict) else {}


def completed(content: object) -> object:
    """A sample's JSON in a form that training reads: a question always has a text as its answer."""
    if not isinstance(content, dict) or "question" not in content:
        return content
    if isinstance(content.get("answer"), str):
        return content
    try:
        found = _texts_of(content, "answers", "answer")
    except ValueError:  # `ask` says it, and names the sample.
        found = []
    return {**content, "answer": found[0] if found else ""}


def ask(stored: Stored, inputs: Inputs, task: str | None) -> Asked | Unusable:
    """The question of a stored sample.

    The last turn of the assistant is the reference, and the turns before it are asked. A field
    answers, or answer, has the references in its place; then a conversation may end with the
    question.

    Args:
        stored: The sample.
        inputs: Kinds of items, with their placeholders.
        task: Field with the task's name; None for task, else category.
    """
    found = stored.parsed
    if isinstance(found, RejectedSample):
        return Unusable(key=stored.key, message=found.message)
    where = f"sample {found.key!r} of {found.source}"
    if isinstance(found, SkippedSample):
        return Unusable(key=stored.key, message=f"{where}: {found.reason}")
    try:
        turns, expected = _expected(found.turns, stored.fields)
        return Asked(
            key=found.key,
            where=where,
            turns=_placed(turns, found.items, inputs),
            items=found.items,
            expected=expected,
            task=_task(stored.fields, task),
        )
    except ValueError as error:
        return Unusable(key=found.key, message=f"{where}: {error}")


def _expected(
    turns: Sequence[Turn], fields: Mapping[str, Any]
) -> tuple[tuple[Turn, ...], Expected]:
    answered = [at for at, turn in enumerate(turns) if turn.role == "assistant"]
    references, asked = _texts_of(fields, "answers", "answer"), tuple(turns)
    if answered and (asked[-1].role == "assistant" or not references):
        references = references or [turns[answered[-1]].text]
        asked = asked[: answered[-1]]
    references = [text for text in references if text.strip()]
    if not references:
        raise ValueError(
            'it has no answer: expected a text as "answer", a list of them as "answers", or a turn '
            "of the assistant"
        )
    if not asked or asked[-1].role == "assistant":
        raise ValueError("it has no question: expected a turn of the user before the answer")
    return asked, Expected(
        references=tuple(references), choices=tuple(_texts_of(fields, "choices", "options"))
    )


def _texts_of(fields: Mapping[str, Any], *names: str) -> list[str]:
    """Texts of the first of some fields that is there.

    Each may be a text or a number, or a list of them; as VQA stores them, a list of objects with
    "answer"; or an object of letters and texts.
    """
    value: Any = next((fields[name] for name in names if fields.get(name) is not None), [])
    if isinstance(value, dict):
        value = [value[letter] for letter in _LETTERS if value.get(letter) is not None]
    texts = []
    for one in value if isinstance(value, list) else [value]:
        text = one.get("answer") if isinstance(one, dict) else one
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise ValueError(f"its {names[0]} hold {str(one)[:60]!r}: expected texts or numbers")
        texts.append(str(text))
    return texts


def _task(fields: Mapping[str, Any], field: str | None) -> str | None:
    value = next(
        (fields[name] for name in ((field,) if field else _TASK_FIELDS) if name in fields), None
    )
    return None if value is None else str(value)


def _placed(
    turns: Sequence[Turn], items: Mapping[str, Sequence[Any]], inputs: Inputs
) -> tuple[Turn, ...]:
    """The turns with placeholders; those of a module without any go in front of the question."""
    found = count_placeholders([turn.text for turn in turns], inputs)
    front = "".join(
        kind.placeholder * len(items.get(module, ()))
        for module, kind in inputs.items()
        if not found[module]
    )
    asked = turns[-1]
    return (*turns[:-1], Turn(asked.role, f"{front}{asked.text}"))

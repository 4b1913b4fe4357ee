"""A local dataset of Hugging Face's as a source of `megatron-mimo data prepare`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.samples.media import MediaFolder
from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.tools.data.columns import Role, Roles, RowSample, find_roles, to_sample
from megatron_mimo.tools.data.hub_folder import choose, splits_of
from megatron_mimo.tools.data.sources import Found, Problem, Split, stored_key
from megatron_mimo.tools.data.table_files import Row, Unreadable, read_columns, read_rows

_Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFlags:
    """What is read of a dataset of parquet or arrow files.

    Attributes:
        split: Split to read; left out: the only one.
        val_split: Split that becomes the val split, instead of --val-fraction of the other.
        subset: Subset to read, of those that the dataset's card names; left out: the default one.
        image_column: Column of images; give it once for each; left out: image, images or img.
        question_column: Column of questions; left out: question or query.
        answer_column: Column of answers, texts or lists of them, or of numbers of choices; left
            out: answer, label, multiple_choice_answer, correct_choice_idx or answers.
        choices_column: Column of the choices of questions; left out: choices or options.
        conversation_column: Column of whole conversations; left out: conversations, conversation,
            messages or texts.
    """

    split: _Name = None
    val_split: _Name = None
    subset: _Name = None
    image_column: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = ()
    question_column: _Name = None
    answer_column: _Name = None
    choices_column: _Name = None
    conversation_column: _Name = None

    @property
    def given(self) -> list[str]:
        """The flags that are given, as they are typed."""
        return [f"--{name.replace('_', '-')}" for name in self.__slots__ if getattr(self, name)]

    @property
    def columns(self) -> dict[Role, tuple[str, ...]]:
        """Columns that are named, by what they are."""
        one: dict[Role, str | None] = {
            "question": self.question_column,
            "answer": self.answer_column,
            "choices": self.choices_column,
            "conversation": self.conversation_column,
        }
        named: dict[Role, tuple[str, ...]] = {role: (name,) for role, name in one.items() if name}
        return {"image": self.image_column, **named}


@dataclass(frozen=True, slots=True)
class _Part:
    """A split of the source.

    Attributes:
        name: Its name.
        becomes: The split that all of its samples belong to; None where each is chosen by itself.
        files: Its files, each with the columns that are read.
    """

    name: str
    becomes: Split | None
    files: tuple[tuple[Path, Roles], ...]


class TableSource:
    """The samples of one split of a dataset, or of two.

    Args:
        source: Path to the folder, or to one file.
        flags: What is read of it.
        media: Files that rows may name.
        inputs: Kinds of items that samples may have.

    Raises:
        ValueError: A file cannot be opened, or the split or a column leaves a choice.
    """

    def __init__(self, source: Path, flags: TableFlags, media: MediaFolder, inputs: Inputs) -> None:
        self._media, self._inputs = media, inputs
        splits = splits_of(source, flags.subset)
        chosen = [choose(splits, flags.split, source, "--split")]
        if flags.val_split is not None:
            chosen.append(choose(splits, flags.val_split, source, "--val-split"))
            if chosen[0][0] == chosen[1][0]:
                raise ValueError(f"--val-split {flags.val_split} is the split to train on too")
        become: Sequence[Split | None] = (None,)
        become = ("train", "val") if flags.val_split is not None else become
        self._parts = [
            _Part(
                name,
                becomes,
                tuple(
                    (file, find_roles(read_columns(file), flags.columns, file)) for file in files
                ),
            )
            for (name, files), becomes in zip(chosen, become, strict=True)
        ]

    def read(self) -> Iterator[Found | Problem]:
        """The samples, in the order of the files."""
        for part in self._parts:
            number = 0  # As `datasets` counts the rows of a split, from 0.
            for file, roles in part.files:
                for row in read_rows(file, roles.columns):
                    if isinstance(row, Unreadable):
                        where = f"{part.name} row {number}" if row.is_row else str(file)
                        yield Problem(where=where, reason=row.reason)
                        number += row.rows
                        continue
                    yield self._sample(row, roles, part, number)
                    number += 1

    def _sample(self, row: Row, roles: Roles, part: _Part, number: int) -> Found | Problem:
        where = f"{part.name} row {number}"
        try:
            found = to_sample(row, roles, self._inputs)
            text = json.dumps(found.content, ensure_ascii=False).encode()
        except (MalformedError, ValueError) as error:
            return Problem(where=where, reason=str(error))
        return Found(
            where=where,
            key=stored_key(f"{part.name}-{number:08d}"),
            identity=_identity(found, text),
            text=text,
            ending="json",
            items={ENCODER: found.images} if found.images else {},
            files=self._media,
            split=part.becomes,
        )


def _identity(sample: RowSample, text: bytes) -> str:
    """Text that is the same for all questions about the same images."""
    digests = [
        image if isinstance(image, str) else blake2b(image, digest_size=16).hexdigest()
        for image in sample.images
    ]
    return "\n".join(digests) or text.decode()

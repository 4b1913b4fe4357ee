"""Rows of a table to samples: which column is what, by its name or a flag, and in which form.

Nothing is guessed: a name that is not in the table below is named by a flag, and a column of two
meanings or of another form is refused.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_mimo.data.inputs import ENCODER, Inputs
from megatron_mimo.data.samples.media import shortened
from megatron_mimo.data.samples.question import place_items
from megatron_mimo.data.text.conversation import Turn, parse_conversation
from megatron_mimo.data.text.placeholders import count_placeholders

# Form of the values of a column: the name of a plain type, a list, or fields by name.
Form = str | list["Form"] | dict[str, "Form"]
TEXT, NUMBER, BINARY, NOTHING = "text", "number", "binary", "null"

Role = Literal["image", "question", "answer", "answers", "label", "choices", "conversation"]
# Role -> names of columns, as public datasets have them.
KNOWN: Mapping[Role, tuple[str, ...]] = {
    "image": ("image", "images", "img"),
    "question": ("question", "query"),
    "answer": ("answer", "multiple_choice_answer", "correct_choice_idx"),
    "answers": ("answers",),
    # Where there is neither: a label may be anything.
    "label": ("label",),
    "choices": ("choices", "options"),
    "conversation": ("conversations", "conversation", "messages", "texts"),
}
_NUMBER_OF_IMAGE = "index"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Fields of a sample's JSON that say what it is; columns of these names are not copied.
_TAKEN = {"question", "answer", "conversations", "messages", "caption", "text", "image", "images"}
_TAKEN |= {"answers", "choices", "options"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: Name of the column.
        form: Form of its values.
        shown: Its type, for messages.
        classes: Names of the classes that its numbers stand for; empty where they are numbers.
    """

    name: str
    form: Form
    shown: str
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The columns that samples are made of.

    Attributes:
        images: Columns of images, in order.
        question: Column of the question; None where the text is a conversation.
        answer: Column of the answer, or of all answers, as a text, a number or a list.
        answers: Column of all answers, where another one has the answer.
        choices: Column of the choices of a question.
        conversation: Column of whole conversations; None where there are questions.
        others: Columns of plain values, which are copied, of labels by their names.
    """

    images: tuple[str, ...] = ()
    question: str | None = None
    answer: Column | None = None
    answers: str | None = None
    choices: str | None = None
    conversation: str | None = None
    others: tuple[Column, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns that are read."""
        answer = None if self.answer is None else self.answer.name
        one = (self.question, answer, self.answers, self.choices, self.conversation)
        used = (name for name in one if name is not None)
        return (*self.images, *used, *(column.name for column in self.others))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSample:
    """A row as a sample.

    Attributes:
        content: What its JSON holds.
        images: Contents of its images in order, or the path of a file as the row names it.
    """

    content: Mapping[str, Any]
    images: tuple[str | bytes, ...] = field(repr=False)


# -- which column is what --------------------------------------------------------------------------


def find_roles(
    columns: Sequence[Column], named: Mapping[Role, tuple[str, ...]], where: object
) -> Roles:
    """Find what each column is.

    Args:
        columns: Columns of the table.
        named: Role -> columns that the user has named for it; none for those to be found by name.
        where: Path of the table, for messages.

    Raises:
        ValueError: A column is missing, is of another form, or two could be meant; the message
            lists all columns.
    """
    table = _Table(columns, named, where)
    question, conversation = table.find("question"), table.find("conversation")
    if question and conversation:
        both = f"{question[0].name} and {conversation[0].name}"
        if bool(named.get("question")) == bool(named.get("conversation")):
            raise table.error(f"has {both}: choose by --question-column or --conversation-column")
        question, conversation = (question, []) if named.get("question") else ([], conversation)
    answer: list[Column] = []
    answers: list[Column] = []
    choices: list[Column] = []
    if question:
        answer, answers = table.find("answer"), table.find("answers")
        choices = table.find("choices")
        if not answer or answer == answers:
            answer, answers = answers or table.find("label"), []
        if not answer:
            raise table.error("has no column of answers by a known name: give --answer-column")
    elif not conversation:
        raise table.error(
            "has no column of questions or conversations by a known name: give --question-column "
            "and --answer-column, or --conversation-column"
        )
    elif named.get("answer") or named.get("choices"):
        flag = "--answer-column" if named.get("answer") else "--choices-column"
        raise table.error(f"has whole conversations in {conversation[0].name}: leave out {flag}")
    images = table.find("image")
    unnamed = [
        column.name
        for column in columns
        if isinstance(_element(column.form), dict) and _is_image(column.form)
    ]
    if not images and unnamed:
        raise table.error(f"has images in {' and '.join(unnamed)}: give --image-column")
    used = (*images, *question, *answer, *answers, *choices, *conversation)
    taken = {*_TAKEN, *(column.name for column in used)}
    return Roles(
        images=tuple(column.name for column in images),
        question=_name(question),
        answer=answer[0] if answer else None,
        answers=_name(answers),
        choices=_name(choices),
        conversation=_name(conversation),
        others=tuple(
            column
            for column in columns
            if column.name not in taken and column.form in (TEXT, NUMBER)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    columns: Sequence[Column]
    named: Mapping[Role, tuple[str, ...]]
    where: object

    def find(self, role: Role) -> list[Column]:
        """Columns of a role: those that the user has named, else the one with a known name."""
        by_name = {column.name: column for column in self.columns}
        flag = f"--{'answer' if role in ('answers', 'label') else role}-column"
        for name in self.named.get(role, ()):
            if name not in by_name:
                raise self.error(f"has no column {shortened(name)}, which {flag} names")
        names = self.named.get(role) or [name for name in KNOWN[role] if name in by_name]
        if len(names) > 1 and not self.named.get(role):
            raise self.error(f"has the columns {' and '.join(names)}: choose by {flag}")
        found = [by_name[name] for name in names]
        for column in found:
            if not _FORMS[role](column.form):
                raise self.error(
                    f"has {column.shown} in {column.name}: expected {_EXPECTED[role]}; give {flag}"
                )
        return found

    def error(self, what: str) -> ValueError:
        listed = ", ".join(f"{column.name} ({column.shown})" for column in self.columns)
        return ValueError(f"{self.where} {what}; its columns are {listed}")


def _name(found: Sequence[Column]) -> str | None:
    return found[0].name if found else None


def _element(form: Form) -> Form:
    return form[0] if isinstance(form, list) else form


def _is_image(form: Form) -> bool:
    if isinstance(form, list):
        return _is_image(form[0]) and not isinstance(form[0], list)
    if isinstance(form, dict):
        content, path = form.get("bytes", NOTHING), form.get("path", NOTHING)
        has_one = "bytes" in form or "path" in form
        return has_one and content in (BINARY, NOTHING) and path in (TEXT, NOTHING)
    return form in (BINARY, TEXT, NOTHING)


def _is_answer(form: Form) -> bool:
    return form in (TEXT, NUMBER, NOTHING) or _is_answers(form)


def _is_answers(form: Form) -> bool:
    """A list of texts; of objects with an answer, as VQA has them; or an object with a list."""
    if isinstance(form, list):
        one = form[0]
        return one in (TEXT, NUMBER, NOTHING) or (
            isinstance(one, dict) and one.get("answer") in (TEXT, NUMBER)
        )
    if isinstance(form, dict):
        return isinstance(form.get("answer"), list) and _is_answers(form["answer"])
    return form == NOTHING


def _is_choices(form: Form) -> bool:
    return form == NOTHING or (isinstance(form, list) and form[0] in (TEXT, NUMBER, NOTHING))


def _is_conversation(form: Form) -> bool:
    """A list of objects; or an object of lists, as `Sequence` of `datasets` stores one."""
    if isinstance(form, dict):
        return bool(form) and all(isinstance(of_field, list) for of_field in form.values())
    return form == NOTHING or (isinstance(form, list) and isinstance(form[0], dict))


_FORMS: Mapping[Role, Callable[[Form], bool]] = {
    "image": _is_image,
    "question": lambda form: form in (TEXT, NOTHING),
    "answer": _is_answer,
    "answers": _is_answers,
    "label": _is_answer,
    "choices": _is_choices,
    "conversation": _is_conversation,
}
_EXPECTED: Mapping[Role, str] = {
    "image": "images (a struct of bytes and path, bytes, or the path of a file), or lists of them",
    "question": "texts",
    "answer": "texts or numbers, or lists of them",
    "label": "texts or numbers, or lists of them",
    "answers": "lists of texts, or of objects with an answer",
    "choices": "lists of texts",
    "conversation": "lists of turns",
}


# -- a row -----------------------------------------------------------------------------------------


def to_sample(row: Mapping[str, Any], roles: Roles, inputs: Inputs) -> RowSample:
    """A row as a sample in a form that training reads.

    Args:
        row: Values of the columns.
        roles: What each column is.
        inputs: Kinds of items, with their placeholders.

    Raises:
        ValueError: A value is missing, or is none of those that the column should have.
        MalformedError: A text is not valid Unicode.
    """
    images = [image for name in roles.images for image in _images(row[name], name)]
    if roles.conversation is None:
        content = _question(row, roles, len(images), inputs)
    else:
        turns, order = _conversation(row[roles.conversation], roles.conversation, inputs)
        if any(not 0 <= index < len(images) for index in order):
            raise ValueError(f"its {roles.conversation} names image {max(order)} of {len(images)}")
        images = [images[index] for index in order] if order else images
        turns = _with_items(turns, len(images), inputs)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        content = {"messages": messages}
    others = {
        column.name: _named(row[column.name], column)
        for column in roles.others
        if _is_plain(row[column.name])
    }
    return RowSample(content={**content, **others}, images=tuple(images))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _images(value: Any, name: str) -> list[str | bytes]:
    """Images of a value; a row may have none."""
    found: list[str | bytes] = []
    for one in value if isinstance(value, list) else [value]:
        image = one
        if isinstance(one, dict):
            # The path beside bytes is the author's.
            image = one.get("bytes") if one.get("bytes") is not None else one.get("path")
            if image is None or image == "":
                raise ValueError(f"its {name} has neither bytes nor a path")
        if image is not None and image != "":
            found.append(image)
        elif isinstance(value, list):
            raise ValueError(f"its {name} has a list with an image that is null")
    return found


def _question(
    row: Mapping[str, Any], roles: Roles, num_images: int, inputs: Inputs
) -> dict[str, Any]:
    assert roles.question is not None and roles.answer is not None
    text, name = row[roles.question], roles.answer.name
    if text is None:
        raise ValueError(f"its {roles.question} is null: expected a text")
    value = row[name]
    choices = [] if roles.choices is None else _texts(row[roles.choices], roles.choices)
    if choices:
        answer: dict[str, Any] = {
            "answer": _letter(value, choices, roles.answer),
            "choices": choices,
        }
        text = "\n".join([text, *map("{}. {}".format, _LETTERS, choices)])
    elif isinstance(value, list | dict):
        texts = _texts(value, name)
        answer = {"answer": _most_frequent(texts, name), "answers": texts}
    else:
        answer = {"answer": _one(value, roles.answer)}
    if roles.answers is not None and not choices and row[roles.answers] is not None:
        answer["answers"] = _texts(row[roles.answers], roles.answers)
    return {"question": place_items(text, {ENCODER: num_images}, inputs), **answer}


def _texts(value: Any, name: str) -> list[str]:
    """Texts of a list of texts, numbers, or objects with an answer; null ones are left out."""
    if isinstance(value, dict):
        value = value["answer"]
    found = (one.get("answer") if isinstance(one, dict) else one for one in value or ())
    return [str(text) for text in found if text is not None]


def _most_frequent(texts: Sequence[str], name: str) -> str:
    """The answer to learn: what most have said, and of these the first."""
    if not texts:
        raise ValueError(f"its {name} is empty: expected an answer")
    return Counter(texts).most_common(1)[0][0]


def _one(value: Any, column: Column) -> str:
    if value is None:
        raise ValueError(f"its {column.name} is null: expected an answer")
    if column.classes and not 0 <= value < len(column.classes):
        raise ValueError(f"its {column.name} is {value}: expected 0 to {len(column.classes) - 1}")
    return str(_named(value, column))


def _named(value: Any, column: Column) -> Any:
    """A value as it is; a label by the name of its class, where it has one."""
    has_name = column.classes and 0 <= value < len(column.classes)
    return column.classes[value] if has_name else value


def _letter(value: Any, choices: Sequence[str], column: Column) -> str:
    """The letter of the right choice: numbers count from 0; a text is a choice, or its letter."""
    if len(choices) > len(_LETTERS):
        raise ValueError(f"it has {len(choices)} choices: expected {len(_LETTERS)} at most")
    if isinstance(value, list | dict):
        texts = _texts(value, column.name)
        value = texts[0] if len({*texts}) == 1 else None
    if value is None:
        raise ValueError(f"its {column.name} is not one answer: expected one of its choices")
    if isinstance(value, str) or column.classes:
        text = _one(value, column).strip()
        fits = {number for number, choice in enumerate(choices) if choice.strip() == text}
        if len(text) == 1 and text in _LETTERS[: len(choices)]:
            fits.add(_LETTERS.index(text))
    else:
        fits = {number for number in range(len(choices)) if number == value}
    if len(fits) != 1:
        which = "more than one" if fits else "none"
        raise ValueError(
            f"its {column.name} is {shortened(str(value))}, which is {which} of its "
            f"{len(choices)} choices: expected a number from 0, a letter, or the text of one"
        )
    return _LETTERS[fits.pop()]


# -- conversations ---------------------------------------------------------------------------------


def _conversation(value: Any, name: str, inputs: Inputs) -> tuple[tuple[Turn, ...], list[int]]:
    """Turns, and the numbers of the images that they name; none where they name none."""
    entries = _transposed(value, name) if isinstance(value, dict) else value
    if not entries:
        raise ValueError(f"its {name} is {'null' if entries is None else 'empty'}: expected turns")
    if None in entries:
        raise ValueError(f"its {name} has a turn that is null")
    keys = {key for entry in entries for key in entry}
    if {"user", "assistant"} <= keys:
        # A round in each entry, as the_cauldron has them.
        rounds = [(role, entry[role]) for entry in entries for role in ("user", "assistant")]
        entries = [{"role": role, "content": text} for role, text in rounds]
        keys = {"role", "content"}
    order: list[int] = []
    if {"role", "content"} <= keys:
        order = _numbered([part for entry in entries for part in _parts(entry)], name)
        content = {"messages": [{**entry, **_without_number(entry)} for entry in entries]}
    elif {"from", "value"} <= keys:
        content = {"conversations": entries}
    else:
        raise ValueError(
            f"its {name} has turns of {', '.join(sorted(keys)) or 'nothing'}: expected from and "
            f"value, role and content, or user and assistant"
        )
    return parse_conversation(content, inputs, {}).turns, order


def _transposed(value: Mapping[str, Sequence[Any] | None], name: str) -> list[dict[str, Any]]:
    """A list of objects, of an object of lists."""
    columns = [of_field or () for of_field in value.values()]
    if len({*map(len, columns)}) > 1:
        raise ValueError(f"its {name} has lists of different lengths in {', '.join(value)}")
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _parts(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Parts of a message that is a list of them."""
    content = entry.get("content")
    return [part for part in content if part] if isinstance(content, list) else []


def _numbered(parts: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Numbers by which the parts of messages name images, as some datasets have them."""
    numbers = [part.get(_NUMBER_OF_IMAGE) for part in parts if part.get("type") == "image"]
    given = [number for number in numbers if number is not None]
    if given and len(given) < len(numbers):
        raise ValueError(f"its {name} has a number for {len(given)} of {len(numbers)} images")
    return given


def _without_number(entry: Mapping[str, Any]) -> dict[str, Any]:
    parts = _parts(entry)
    if not parts:
        return {}
    return {
        "content": [
            {key: value for key, value in part.items() if key != _NUMBER_OF_IMAGE} for part in parts
        ]
    }


def _with_items(turns: tuple[Turn, ...], number: int, inputs: Inputs) -> tuple[Turn, ...]:
    """The turns with placeholders; where they have none, those of all images begin them."""
    if count_placeholders([turn.text for turn in turns], inputs)[ENCODER]:
        return turns
    first = next((at for at, turn in enumerate(turns) if turn.role == "user"), 0)
    front = inputs[ENCODER].placeholder * number
    asked = Turn(turns[first].role, f"{front}{turns[first].text}")
    return (*turns[:first], asked, *turns[first + 1 :])

"""Conversion of stored text to the turns of a conversation. Nothing is guessed.

A sample's JSON holds exactly one of these keys:

- `question` and `answer`: texts.
- `conversations`: in the form of LLaVA, [{"from": "human", "value": "..."}, ...].
- `messages`: in the form of chat models, [{"role": "user", "content": "..."}, ...]; the content may
  be a list of {"type": "text", "text": "..."} and {"type": NOUN}, an item, of which {"type": NOUN,
  NOUN: "..."} also names the file. Fields of such a part that are null do not count.
- `caption`: a text about the items, which precede it.
- `text`: a document to learn from its first token to its last.

Each module's noun, "image" for one, is a field that may name a file of its items, or list several,
and so is the noun with an s; null and empty texts name none. Other keys are ignored.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_mimo.data.inputs import Inputs, ItemWords
from megatron_mimo.data.text.clean import MalformedError, clean_text, require_unicode

Role = Literal["system", "user", "assistant"]
# Module -> number of its items.
Counts = Mapping[str, int]

_SPEAKERS: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ROLES: Mapping[str, Role] = {role: role for role in ("system", "user", "assistant")}


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of one side of a conversation.

    Attributes:
        role: Role of the speaker; the model learns the turns of the assistant.
        text: Text with one placeholder for each item.
    """

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """The text of a stored sample.

    Attributes:
        turns: Turns in order; a document is a single turn of the assistant.
        paths: Module -> paths of the files of its items, as written in the text; only modules with
            such paths.
    """

    turns: tuple[Turn, ...]
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def parse_json(data: bytes) -> object:
    """Contents of a JSON text.

    Raises:
        MalformedError: The text is not valid JSON.
    """
    try:
        return json.loads(data)
    # ValueError: syntax, encoding, and numbers of more digits than Python converts.
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"its json is malformed: {error}") from error


def parse_caption(data: bytes, inputs: Inputs, stored: Counts) -> Conversation:
    """A conversation from a text file beside items.

    Args:
        data: Contents of the file.
        inputs: Kinds of items, with their placeholders.
        stored: Module -> number of its items that are stored beside the file.

    Raises:
        MalformedError: The file is not valid UTF-8.
        ValueError: There is no item.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"its txt is not UTF-8: {error}") from error
    return Conversation(_caption((_stored(text) or "").strip(), inputs, stored))


def forms_of(content: object) -> list[str]:
    """Forms of text that a sample's JSON has."""
    return [key for key in _FORMS if key in content] if isinstance(content, dict) else []


def parse_conversation(content: object, inputs: Inputs, stored: Counts) -> Conversation:
    """Turns and paths of a sample's JSON.

    Args:
        content: Parsed JSON of the sample.
        inputs: Kinds of items, with their placeholders and nouns.
        stored: Module -> number of its items that are stored beside the JSON, whose paths it need
            not name.

    Raises:
        MalformedError: A text, or a path, is not valid Unicode.
        ValueError: No form of text or two at once, an unknown role, or a value of a wrong type;
            says what was found and expected, without naming the sample.
    """
    if not isinstance(content, dict):
        raise ValueError(f"has a json with {_kind(content)}: expected an object with {_KEYS}")
    found = forms_of(content)
    if len(found) != 1:
        what = " and ".join(found) or (", ".join(map(_printable, content)) or "no fields")
        raise ValueError(f"has a json with {what}: expected exactly one of {_KEYS}")
    paths = {
        module: of_module
        for module, kind in inputs.items()
        if (of_module := _paths(content, kind.words))
    }
    counts = {module: stored.get(module, 0) or len(paths.get(module, ())) for module in inputs}
    return Conversation(_FORMS[found[0]](content, inputs, counts), paths)


# -- the forms -------------------------------------------------------------------------------------

_Content = Mapping[str, object]


def _question(content: _Content, inputs: Inputs, counts: Counts) -> tuple[Turn, ...]:
    question, answer = _stored(content["question"]), _stored(content.get("answer"))
    if question is None or answer is None:
        raise ValueError(
            f"has a json with question ({_kind(content['question'])}) and answer "
            f"({_kind(content.get('answer'))}): expected two texts"
        )
    return (Turn("user", question), Turn("assistant", answer))


def _conversations(content: _Content, inputs: Inputs, counts: Counts) -> tuple[Turn, ...]:
    return tuple(
        Turn(_role(turn, "from", _SPEAKERS, at), _text(turn, "value", at))
        for at, turn in _entries(content, "conversations")
    )


def _messages(content: _Content, inputs: Inputs, counts: Counts) -> tuple[Turn, ...]:
    turns = []
    for at, message in _entries(content, "messages"):
        role = _role(message, "role", _ROLES, at)
        parts = message.get("content")
        if isinstance(parts, list):
            text = "".join(
                _part(part, inputs, f"{at}.content[{i}]") for i, part in enumerate(parts)
            )
        else:
            text = _text(message, "content", at)
        turns.append(Turn(role, text))
    return tuple(turns)


def _part(part: object, inputs: Inputs, at: str) -> str:
    fields = _fields(part)
    for kind in inputs.values():
        noun = kind.words.noun
        if fields.get("type") == noun and fields.keys() <= {"type", noun}:
            return kind.placeholder
    if fields.keys() == {"type", "text"} and fields["type"] == "text":
        return _text(fields, "text", at)
    typed = [f'{{"type": "{kind.words.noun}"}}' for kind in inputs.values()]
    fields_of = [kind.words.plural for kind in inputs.values()]
    raise ValueError(
        f'has a json whose {at} is {_short(part)}: expected {{"type": "text", "text": ...}} or '
        f"{_either(typed)}, with the files in the field {_either(fields_of)}, or each path beside "
        f"its type"
    )


def _fields(part: object) -> _Content:
    """Fields of a part; tables store those that another part has as null."""
    if not isinstance(part, dict):
        return {}
    return {key: value for key, value in part.items() if value is not None}


def _captioned(content: _Content, inputs: Inputs, counts: Counts) -> tuple[Turn, ...]:
    caption = _stored(content["caption"])
    if caption is None:
        raise ValueError(f"has a json with caption ({_kind(content['caption'])}): expected a text")
    return _caption(caption, inputs, counts)


def _caption(caption: str, inputs: Inputs, counts: Counts) -> tuple[Turn, ...]:
    before = "".join(kind.placeholder * counts.get(module, 0) for module, kind in inputs.items())
    if not before:
        raise ValueError(
            f"has a caption and no {_either([kind.words.noun for kind in inputs.values()])}: "
            f"expected one at least; name a document text"
        )
    return (Turn("user", before), Turn("assistant", caption))


def _document(content: _Content, inputs: Inputs, counts: Counts) -> tuple[Turn, ...]:
    text = _stored(content["text"])
    if text is None:
        raise ValueError(f"has a json with text ({_kind(content['text'])}): expected a text")
    return (Turn("assistant", text),)


_FORMS: Mapping[str, Callable[[_Content, Inputs, Counts], tuple[Turn, ...]]] = {
    "question": _question,
    "conversations": _conversations,
    "messages": _messages,
    "caption": _captioned,
    "text": _document,
}
_KEYS = "question (with answer), conversations, messages, caption or text"


# -- fields ----------------------------------------------------------------------------------------


def _paths(content: _Content, words: ItemWords) -> tuple[str, ...]:
    one, several = words.noun, words.plural
    found = {
        one: _named(content.get(one), one, words),
        several: _named(content.get(several), several, words),
        f"{one} in messages": _in_parts(content, words),
    }
    given = [name for name, paths in found.items() if paths]
    if len(given) > 1:
        raise ValueError(f"has a json with {' and '.join(given)}: expected one of them")
    paths = found[given[0]] if given else ()
    for path in paths:
        require_unicode(path, f"path of {words.one}")
    return paths


def _named(value: object, field: str, words: ItemWords) -> tuple[str, ...]:
    """The paths that a field names; columns of a table have null or nothing where there is none."""
    paths = value if isinstance(value, list) else [value]
    paths = [path for path in paths if path is not None and path != ""]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(
            f"has a json with {field} {_short(value)}: expected the path of a file as "
            f"{words.noun}, or a list of them as {words.plural}"
        )
    return tuple(paths)


def _in_parts(content: _Content, words: ItemWords) -> tuple[str, ...]:
    """The paths that the parts of messages name: of all items, or of none."""
    messages = content.get("messages")
    parts = [
        fields
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
        if (fields := _fields(part)).get("type") == words.noun
    ]
    named = [_named(part[words.noun], words.noun, words) for part in parts if words.noun in part]
    if named and len(named) < len(parts):
        raise ValueError(
            f"has a json with messages in which {len(named)} of {len(parts)} {words.plural} have a "
            f"path: expected one for each, or all of them in the field {words.plural}"
        )
    return tuple(path for paths in named for path in paths)


def _entries(content: _Content, key: str) -> list[tuple[str, _Content]]:
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"has a json with {key} ({_kind(entries)}): expected a list of objects")
    return [(f"{key}[{index}]", entry) for index, entry in enumerate(entries)]


def _role(entry: _Content, key: str, roles: Mapping[str, Role], at: str) -> Role:
    name = entry.get(key)
    if not isinstance(name, str) or name not in roles:
        raise ValueError(
            f"has a json whose {at}.{key} is {_short(name)}: expected one of {', '.join(roles)}"
        )
    return roles[name]


def _text(entry: _Content, key: str, at: str) -> str:
    text = _stored(entry.get(key))
    if text is None:
        raise ValueError(
            f"has a json whose {at}.{key} is {_short(entry.get(key))}: expected a text"
        )
    return text


def _stored(value: object) -> str | None:
    """A text as it is learnt; None for anything else. Every text of every form is read here."""
    return clean_text(value) if isinstance(value, str) else None


def _either(words: Sequence[str]) -> str:
    return " or ".join(words)


def _printable(key: object) -> str:
    return str(key).encode(errors="backslashreplace").decode()


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

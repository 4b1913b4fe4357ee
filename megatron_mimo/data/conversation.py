"""Stored text, as a dataset holds it, to the turns of a conversation. Pure; nothing is guessed.

A sample's JSON holds exactly one of these keys:

- `question` and `answer`: texts.
- `conversations`: as LLaVA writes them, [{"from": "human", "value": "..."}, ...].
- `messages`: as chat models take them, [{"role": "user", "content": "..."}, ...]; the content may
  be a list of {"type": "text", "text": "..."} and {"type": "image"}.
- `caption`: a text, said of the images that stand before it.
- `text`: a document to learn from its first token to its last.

`image` (a path) or `images` (a list) may name files. Other keys say nothing to the model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]

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
    """What one side of a conversation says.

    Attributes:
        role: Who speaks; the model learns what the assistant says.
        text: With one placeholder for each image.
    """

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A stored sample's text.

    Attributes:
        turns: In order; a document is one turn of the assistant's alone.
        image_paths: Files that its images are in, as they are written there.
    """

    turns: tuple[Turn, ...]
    image_paths: tuple[str, ...] = ()


class MalformedError(Exception):
    """Text that is broken rather than of another form."""


def parse_json(data: bytes) -> object:
    """Contents of a JSON text.

    Raises:
        MalformedError: It is none.
    """
    try:
        return json.loads(data)
    # ValueError: syntax, encoding, and numbers of more digits than Python converts.
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"its json is malformed: {error}") from error


def parse_caption(data: bytes, image_token: str, num_images: int) -> Conversation:
    """A text file beside images.

    Raises:
        MalformedError: It is no UTF-8.
        ValueError: There is no image.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"its txt is no UTF-8: {error}") from error
    return Conversation(_caption(text.strip(), image_token, num_images))


def parse_conversation(content: object, image_token: str, num_images: int) -> Conversation:
    """Turns and image paths of a sample's JSON.

    Args:
        content: As parsed from JSON.
        image_token: Placeholder of an image.
        num_images: Images that are stored beside the JSON; with any, it need not name paths.

    Raises:
        MalformedError: A text is no valid Unicode.
        ValueError: No form of text or two at once, an unknown role, or a value of a wrong type;
            says what was found and expected, without naming the sample.
    """
    if not isinstance(content, dict):
        raise ValueError(f"has a json with {_kind(content)}: expected an object with {_KEYS}")
    found = [key for key in _FORMS if key in content]
    if len(found) != 1:
        what = " and ".join(found) or (", ".join(map(str, content)) or "no fields")
        raise ValueError(f"has a json with {what}: expected exactly one of {_KEYS}")
    paths = _paths(content)
    turns = _FORMS[found[0]](content, image_token, num_images or len(paths))
    for turn in turns:
        _require_unicode(turn.text)
    return Conversation(turns, paths)


# -- the forms -------------------------------------------------------------------------------------

_Content = Mapping[str, object]


def _question(content: _Content, image_token: str, num_images: int) -> tuple[Turn, ...]:
    question, answer = content["question"], content.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(
            f"has a json with question ({_kind(question)}) and answer "
            f"({_kind(answer)}): expected two texts"
        )
    return (Turn("user", question), Turn("assistant", answer))


def _conversations(content: _Content, image_token: str, num_images: int) -> tuple[Turn, ...]:
    return tuple(
        Turn(_role(turn, "from", _SPEAKERS, at), _text(turn, "value", at))
        for at, turn in _entries(content, "conversations")
    )


def _messages(content: _Content, image_token: str, num_images: int) -> tuple[Turn, ...]:
    turns = []
    for at, message in _entries(content, "messages"):
        role = _role(message, "role", _ROLES, at)
        parts = message.get("content")
        if isinstance(parts, list):
            text = "".join(
                _part(part, image_token, f"{at}.content[{i}]") for i, part in enumerate(parts)
            )
        else:
            text = _text(message, "content", at)
        turns.append(Turn(role, text))
    return tuple(turns)


def _part(part: object, image_token: str, at: str) -> str:
    fields = part if isinstance(part, dict) else {}
    if fields == {"type": "image"}:
        return image_token
    if fields.keys() == {"type", "text"} and fields["type"] == "text":
        return _text(fields, "text", at)
    raise ValueError(
        f'has a json whose {at} is {_short(part)}: expected {{"type": "text", "text": ...}} or '
        f'{{"type": "image"}}, with the files in the field images'
    )


def _captioned(content: _Content, image_token: str, num_images: int) -> tuple[Turn, ...]:
    caption = content["caption"]
    if not isinstance(caption, str):
        raise ValueError(f"has a json with caption ({_kind(caption)}): expected a text")
    return _caption(caption, image_token, num_images)


def _caption(caption: str, image_token: str, num_images: int) -> tuple[Turn, ...]:
    if not num_images:
        raise ValueError("has a caption and no image: expected one at least; name a document text")
    return (Turn("user", image_token * num_images), Turn("assistant", caption))


def _document(content: _Content, image_token: str, num_images: int) -> tuple[Turn, ...]:
    text = content["text"]
    if not isinstance(text, str):
        raise ValueError(f"has a json with text ({_kind(text)}): expected a text")
    return (Turn("assistant", text),)


_FORMS: Mapping[str, Callable[[_Content, str, int], tuple[Turn, ...]]] = {
    "question": _question,
    "conversations": _conversations,
    "messages": _messages,
    "caption": _captioned,
    "text": _document,
}
_KEYS = "question (with answer), conversations, messages, caption or text"


# -- fields ----------------------------------------------------------------------------------------


def _paths(content: _Content) -> tuple[str, ...]:
    if "image" in content and "images" in content:
        raise ValueError("has a json with image and images: expected one of them")
    if content.get("image") is not None:
        paths: object = [content["image"]]
    else:
        paths = content.get("images") or []
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(
            f"has a json with {'image' if 'image' in content else 'images'} {_short(paths)}: "
            f"expected the path of a file as image, or a list of them as images"
        )
    return tuple(paths)


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
    text = entry.get(key)
    if not isinstance(text, str):
        raise ValueError(f"has a json whose {at}.{key} is {_short(text)}: expected a text")
    return text


def _require_unicode(text: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedError(f"its text is no valid Unicode: {error.reason}") from error


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Stored forms of text: what each becomes, and what is refused in which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.conversation import (
    Conversation,
    MalformedError,
    Turn,
    parse_caption,
    parse_conversation,
    parse_json,
)

IMAGE = "<image>"


def parse(content: object, num_images: int = 0) -> Conversation:
    return parse_conversation(content, IMAGE, num_images)


def test_question_and_answer() -> None:
    found = parse({"question": "Why?", "answer": "So.", "kind": "single"})
    assert found == Conversation((Turn("user", "Why?"), Turn("assistant", "So.")))


def test_conversations_of_llava() -> None:
    found = parse(
        {
            "id": 7,
            "image": "coco/1.jpg",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A cat."},
                {"from": "user", "value": "Sure?"},
                {"from": "assistant", "value": "Yes."},
            ],
        }
    )
    assert [turn.role for turn in found.turns] == [
        "system", "user", "assistant", "user", "assistant"
    ]  # fmt: skip
    assert found.turns[1].text == "<image>\nWhat?"
    assert found.image_paths == ("coco/1.jpg",)


def test_messages_with_parts() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    found = parse(
        {
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "Two."},
            ],
            "images": ["a.png", "b.png"],
        }
    )
    assert found.turns == (Turn("user", "<image>and<image>"), Turn("assistant", "Two."))
    assert found.image_paths == ("a.png", "b.png")


@pytest.mark.parametrize(("num_images", "paths"), [(2, []), (0, ["a.png", "b.png"])])
def test_a_caption_stands_behind_its_images(num_images: int, paths: list[str]) -> None:
    found = parse({"caption": "Cats.", "images": paths}, num_images)
    assert found.turns == (Turn("user", IMAGE * 2), Turn("assistant", "Cats."))
    assert parse_caption(b" Cats.\n", IMAGE, 2).turns == found.turns


def test_a_document_is_the_assistants() -> None:
    assert parse({"text": "x<image>y"}, 1) == Conversation((Turn("assistant", "x<image>y"),))


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=5))
def test_any_text_survives(turns: list[tuple[str, str]]) -> None:
    stored = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = parse(parse_json(json.dumps(stored).encode()))
    assert [(turn.role, turn.text) for turn in found.turns] == turns


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "has a json with list: expected an object with question"),
        ({}, "has a json with no fields: expected exactly one of question"),
        ({"prompt": "q"}, "has a json with prompt: expected exactly one of"),
        ({"answer": "a"}, "has a json with answer: expected exactly one of"),
        ({"text": "t", "caption": "c"}, "with caption and text: expected exactly one of"),
        ({"question": "q"}, "question (str) and answer (missing): expected two texts"),
        ({"question": 3, "answer": "a"}, "question (int) and answer (str): expected"),
        ({"conversations": {}}, "conversations (dict): expected a list of objects"),
        ({"messages": ["hi"]}, "messages (list): expected a list of objects"),
        (
            {"conversations": [{"from": "bot", "value": "x"}]},
            "conversations[0].from is 'bot': expected one of human, user, gpt, assistant, system",
        ),
        ({"conversations": [{"value": "x"}]}, "conversations[0].from is None: expected one of"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value is None: expected a text"),
        (
            {"messages": [{"role": "gpt", "content": "x"}]},
            "messages[0].role is 'gpt': expected one of system, user, assistant",
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role is ['user']: expected one of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
            "messages[0].content[0] is {'type': 'video'}: expected",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "x"}]}]},
            "with the files in the field images",
        ),
        ({"caption": 1}, "caption (int): expected a text"),
        ({"caption": "c"}, "has a caption and no image"),
        ({"text": None}, "text (missing): expected a text"),
        ({"text": "t", "image": "a", "images": []}, "image and images: expected one of them"),
        ({"text": "t", "image": 3}, "image [3]: expected the path of a file"),
        ({"text": "t", "images": "a.png"}, "images 'a.png': expected the path"),
        ({"text": "t", "images": ["a.png", ""]}, "images ['a.png', '']: expected the path"),
    ],
)
def test_other_contents_are_refused(content: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(content)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"{", b"\xff\xfe", b"", b'{"a": 1} x', b"[" * 100_000,
        b'{"question": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_broken_json_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError, match="its json is malformed"):
        parse_json(data)


def test_half_a_character_is_malformed() -> None:
    content = parse_json(b'{"text": "caf\\ud800"}')
    with pytest.raises(MalformedError, match="its text is no valid Unicode"):
        parse(content)


def test_a_caption_of_other_bytes_is_malformed() -> None:
    with pytest.raises(MalformedError, match="its txt is no UTF-8"):
        parse_caption(b"caf\xe9", IMAGE, 1)

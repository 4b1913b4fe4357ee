"""Stored forms of text: what each becomes, and what is refused in which words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.text.clean import MalformedError
from megatron_mimo.data.text.conversation import (
    Conversation,
    Turn,
    parse_caption,
    parse_conversation,
    parse_json,
)
from megatron_mimo.media.images import ImageInput

INPUTS = {"encoder": ImageInput()}


def parse(content: object, num_images: int = 0) -> Conversation:
    return parse_conversation(content, INPUTS, {"encoder": num_images})


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
    assert found.paths == {"encoder": ("coco/1.jpg",)}


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
    assert found.paths == {"encoder": ("a.png", "b.png")}


@pytest.mark.parametrize(("num_images", "paths"), [(2, []), (0, ["a.png", "b.png"])])
def test_a_caption_stands_behind_its_images(num_images: int, paths: list[str]) -> None:
    found = parse({"caption": "Cats.", "images": paths}, num_images)
    assert found.turns == (Turn("user", "<image>" * 2), Turn("assistant", "Cats."))
    assert parse_caption(b" Cats.\n", INPUTS, {"encoder": 2}).turns == found.turns


def test_a_document_is_the_assistants() -> None:
    assert parse({"text": "x<image>y"}, 1) == Conversation((Turn("assistant", "x<image>y"),))


said = st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff"))


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), said), max_size=5))
def test_any_text_survives(turns: list[tuple[str, str]]) -> None:
    stored = {"messages": [{"role": role, "content": text} for role, text in turns]}
    found = parse(parse_json(json.dumps(stored).encode()))
    assert [(turn.role, turn.text) for turn in found.turns] == turns


WITH_PATH = {"type": "image", "image": "a.png", "text": None}


@pytest.mark.parametrize(
    ("fields", "paths"),
    [
        ({"image": ["a.png", "b.png"]}, ("a.png", "b.png")),
        ({"images": "a.png"}, ("a.png",)),
        ({"image": None, "images": [None, "", "a.png"]}, ("a.png",)),
        ({"image": "", "images": []}, ()),
        ({"image": "a.png", "images": None}, ("a.png",)),
    ],
)
def test_columns_of_images_as_tables_have_them(
    fields: dict[str, object], paths: tuple[str, ...]
) -> None:
    found = parse({"text": "t", **fields}).paths
    assert found == ({"encoder": paths} if paths else {})


def test_a_part_of_a_message_may_name_its_image() -> None:
    said = {"type": "text", "text": "and", "image": None}
    other = {"type": "image", "image": "b.png"}
    found = parse({"messages": [{"role": "user", "content": [WITH_PATH, said, other]}]})
    assert found.turns == (Turn("user", "<image>and<image>"),)
    assert found.paths == {"encoder": ("a.png", "b.png")}


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
        ({"text": "t", "image": "a", "images": ["b"]}, "image and images: expected one of them"),
        ({"text": "t", "image": 3}, "image 3: expected the path of a file"),
        ({"text": "t", "images": ["a.png", ["b"]]}, "images ['a.png', ['b']]: expected the path"),
        (
            {"messages": [{"role": "user", "content": [WITH_PATH]}], "images": ["b.png"]},
            "images and image in messages: expected one of them",
        ),
        (
            {"messages": [{"role": "user", "content": [WITH_PATH, {"type": "image"}]}]},
            "1 of 2 images have a path: expected one for each",
        ),
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


# Each form, with a text in the place of every text that it has.
def every_form(text: str) -> dict[str, dict[str, object]]:
    part = {"type": "text", "text": text}
    return {
        "question": {"question": text, "answer": text},
        "conversations": {
            "conversations": [{"from": who, "value": text} for who in ("system", "human", "gpt")]
        },
        "messages": {"messages": [{"role": who, "content": text} for who in ("user", "assistant")]},
        "parts": {"messages": [{"role": "user", "content": [{"type": "image"}, part]}]},
        "caption": {"caption": text},
        "text": {"text": text},
    }


@pytest.mark.parametrize("form", every_form(""))
@pytest.mark.parametrize(
    ("stored", "learnt"),
    [
        ("\ufeffa", "a"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("a\rb", "a\nb"),
        ("\ufeff\r\n\r", "\n\n"),
        # Inside of a text it joins two words, and is not a mark of the file's.
        ("a\ufeffb\u200b\u00a0", "a\ufeffb\u200b\u00a0"),
    ],
)
def test_what_is_no_text_is_not_learnt(form: str, stored: str, learnt: str) -> None:
    found = [turn.text for turn in parse(every_form(stored)[form], 1).turns]
    assert {text.replace("<image>", "") for text in found if text != "<image>"} == {learnt}


def test_what_is_no_text_is_not_learnt_of_a_caption() -> None:
    data = "\ufeff \r\na cat\r\non a mat\r\n".encode()
    assert parse_caption(data, INPUTS, {"encoder": 1}).turns[1].text == "a cat\non a mat"


@pytest.mark.parametrize("form", every_form(""))
def test_half_a_character_is_malformed(form: str) -> None:
    data = json.dumps(every_form("caf\ud800")[form]).encode()
    with pytest.raises(MalformedError, match=r"its text is not valid Unicode: .* \(character 4\)"):
        parse(parse_json(data), 1)


def test_half_a_character_elsewhere_breaks_no_message() -> None:
    with pytest.raises(MalformedError, match="its path of an image is not valid Unicode"):
        parse({"text": "<image>", "image": "\ud83d.png"})
    assert parse({"text": "a", "url": "\ud83d"}).turns[0].text == "a"
    for content in ({"\ud83d": 1}, {"messages": [{"role": "\ud83d"}]}, {"text": ["\ud83d"]}):
        with pytest.raises(ValueError, match="has a json") as caught:
            parse(content)
        str(caught.value).encode()


def test_a_caption_of_other_bytes_is_malformed() -> None:
    with pytest.raises(MalformedError, match="its txt is not UTF-8"):
        parse_caption(b"caf\xe9", INPUTS, {"encoder": 1})

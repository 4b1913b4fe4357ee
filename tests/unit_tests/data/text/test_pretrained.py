"""Exported tokenizers: in plain transformers the tokens of a run, from lists and from texts."""

from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.data import ByteTokenizer
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.text.chat_template import HuggingFaceChatTemplate
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.pretrained import save_tokenizer
from megatron_mimo.data.text.question import write_question
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer
from megatron_mimo.media.images import ImageInput
from tests.unit_tests.data.text import chats

ODD = "Größe  <b>\u00a0\U0001f600 \t"
TALK = [
    Turn("user", f"<image>{ODD}and <image>?"),
    Turn("assistant", "Red."),
    Turn("user", "And now?"),
]
IN_PARTS = [
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": f"{ODD}and "},
            {"type": "image"},
            {"type": "text", "text": "?"},
        ],
    },
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]
IN_TEXTS = [{"role": turn.role, "content": turn.text} for turn in TALK]


def asked(folder: Path, messages: list[dict[str, Any]]) -> tuple[Any, list[int]]:
    """The tokenizer as transformers loads it, and its tokens in front of an answer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer, tokenizer(text).input_ids


@pytest.mark.parametrize("messages", [IN_PARTS, IN_TEXTS], ids=["parts", "texts"])
def test_bytes_are_tokens_of_transformers(messages: Any, tmp_path: Path) -> None:
    config, ours = DataConfig(), ByteTokenizer()
    (tmp_path / "merges.txt").write_text("of another tokenizer")
    save_tokenizer(tmp_path, ours, config)
    assert not (tmp_path / "merges.txt").exists()
    theirs, tokens = asked(tmp_path, messages)
    assert tokens == write_question(TALK, chats.laid_out({"encoder": [1, 1]}), config, ours)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    assert (theirs.image_token, theirs.image_start_token) == ("<image>", "")
    assert len(theirs) == ours.num_tokens
    every = [*range(256), *"ß€".encode(), 0xC3]
    assert theirs.decode(every) == ours.decode(every)


@pytest.mark.parametrize("form", ["plain", "nemotron6-moe", None])
@pytest.mark.parametrize("kind", ["byte-level", "metaspace always", "unigram"])
def test_tokenizers_of_transformers_stay_as_they_are(kind: str, form: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    chats.save_tokenizer(kind, str(tmp_path / "in"))
    ours = HuggingFaceTokenizer(str(tmp_path / "in"), {"encoder": "<image>"})
    if form is None:
        ours._tokenizer.chat_template = chats.template("chatml", marked=True) + chats.OPENS
        ours.chat_template = HuggingFaceChatTemplate(ours._tokenizer, "a folder")
    inputs = {"encoder": ImageInput(tag_type="internvl")}
    config = DataConfig(prompt_format=form, inputs=inputs)
    save_tokenizer(tmp_path / "out", ours, config)
    # One turn: those of the plain format are tokenised apart.
    turns, parts = (TALK, IN_PARTS) if form != "plain" else (TALK[:1], IN_PARTS[:1])
    theirs, tokens = asked(tmp_path / "out", parts)
    wanted = write_question(
        turns, chats.laid_out({"encoder": [1, 1]}), DataConfig(prompt_format=form), ours
    )
    assert tokens == wanted
    assert theirs.eos_token_id == ours.eos_id
    assert (theirs.image_start_token, theirs.image_end_token) == ("<img>", "</img>")
    # What was exported is exported again as it is.
    again = HuggingFaceTokenizer(str(tmp_path / "out"), {"encoder": "<image>"})
    (tmp_path / "again").mkdir()
    save_tokenizer(tmp_path / "again", again, DataConfig(inputs=inputs))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_other_parts_of_a_message_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, ByteTokenizer(), DataConfig())
    with pytest.raises(Exception, match="a part of type video: expected text or image"):
        asked(tmp_path, [{"role": "user", "content": [{"type": "video"}]}])

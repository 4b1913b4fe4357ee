"""Samples of folders of vision-language models against the processors of transformers."""

import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_mimo.data import DataConfig, RawSample, Turn
from megatron_mimo.data.inputs import placeholders
from megatron_mimo.data.samples.question import Source, encode_question
from megatron_mimo.data.samples.sample import encode_sample
from megatron_mimo.data.text.placeholders import split_text
from megatron_mimo.data.text.prompt import check_prompt_format
from megatron_mimo.data.text.tokenizer import HuggingFaceTokenizer
from megatron_mimo.media.processors import read_processor
from tests.properties import examples
from tests.unit_tests.media.processors.folders import MODEL_TYPES, save_folder, template


class Folder(NamedTuple):
    config: DataConfig
    tokenizer: HuggingFaceTokenizer
    processor: Any


Load = Callable[[str, bool], Folder]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    from transformers import AutoProcessor

    root = tmp_path_factory.mktemp("folders")

    @cache
    def load(model_type: str, marked: bool) -> Folder:
        folder = root / f"{model_type}-{marked}"
        kind = read_processor(folder, model_type, save_folder(model_type, folder, marked=marked))
        config = DataConfig(inputs={"encoder": kind}, seq_length=4096)
        tokenizer = HuggingFaceTokenizer(str(folder), placeholders(config.inputs))
        check_prompt_format(config, tokenizer)
        return Folder(config, tokenizer, AutoProcessor.from_pretrained(folder))

    return load


def png(number: int) -> bytes:
    rng = np.random.default_rng(number)
    height, width = rng.integers(8, 80, 2)
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def messages(turns: Sequence[Turn], images: Sequence[bytes], folder: Folder) -> list[Any]:
    """The turns as transformers' processors take them."""
    left, made = iter(images), []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for text, module in split_text(turn.text, folder.config.inputs):
            if text:
                parts.append({"type": "text", "text": text})
            if module is not None:
                parts.append({"type": "image", "image": Image.open(io.BytesIO(next(left)))})
        made.append({"role": turn.role, "content": parts})
    return made


words = st.sampled_from(
    ["What is it?", " and this ", "\nRed", "a", "a  b ", "Größe 3\n\n", "user", "<|im", "12 cats."]
)
asked = st.lists(words | st.just("<image>"), min_size=1, max_size=5).map("".join)
said = st.lists(words, min_size=1, max_size=3).map("".join).filter(str.strip)


@examples(300)
@given(
    st.sampled_from(MODEL_TYPES),
    st.booleans(),
    st.none() | words,
    st.lists(st.tuples(asked, said), min_size=1, max_size=3),
)
def test_samples_are_those_of_the_processor(
    load: Load, model_type: str, marked: bool, system: str | None, talk: list[tuple[str, str]]
) -> None:
    folder = load(model_type, marked)
    turns = [Turn("system", system)] if system else []
    turns += [t for ask, say in talk for t in (Turn("user", ask), Turn("assistant", say))]
    number = sum(turn.text.count("<image>") for turn in turns)
    images = tuple(png(index) for index in range(number))
    raw = RawSample(key="a", turns=tuple(turns), items={"encoder": images} if images else {})
    sample = encode_sample(raw, folder.config, folder.tokenizer, content=())
    wanted = folder.processor.apply_chat_template(
        messages(turns, images, folder),
        chat_template=template(model_type, marked=True),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert sample.tokens.tolist() == list(wanted["input_ids"][0])
    mask = np.array(wanted["assistant_masks"][0], dtype=bool)
    assert sample.targets.tolist() == mask.tolist()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_questions_are_those_of_the_processor(load: Load, model_type: str) -> None:
    folder = load(model_type, False)
    turns = [
        Turn("user", "<image>What is it?<image>"),
        Turn("assistant", "A cat."),
        Turn("user", "And <image>"),
    ]
    images = [png(number) for number in range(3)]
    sources = {"encoder": [Source("a file", image) for image in images]}
    asked = encode_question(turns, sources, folder.config, folder.tokenizer)
    wanted = folder.processor.apply_chat_template(
        messages(turns, images, folder), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert asked.tokens.tolist() == list(wanted["input_ids"][0])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_documents_are_those_of_the_processor(load: Load, model_type: str) -> None:
    """The caller of a processor writes what a chat template would have written around an image."""
    folder = load(model_type, False)
    image = png(1)
    raw = RawSample(key="a", turns=(Turn("assistant", "A <image> b"),), items={"encoder": (image,)})
    sample = encode_sample(raw, folder.config, folder.tokenizer, content=())
    token = folder.processor.image_token
    if model_type.startswith("qwen"):
        token = f"<|vision_start|>{token}<|vision_end|>"
    wanted = folder.processor(text=[f"A {token} b<eos>"], images=[[Image.open(io.BytesIO(image))]])
    assert sample.tokens.tolist() == list(wanted["input_ids"][0])
    rows = sample.tokens == folder.processor.image_token_id
    assert not (sample.targets & rows).any()


def test_a_template_that_only_processors_read_is_found(tmp_path: Path) -> None:
    """As in folders that were published before templates had a file of their own."""
    from transformers import AutoProcessor

    save_folder("llava_onevision", tmp_path)
    text = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    (tmp_path / "chat_template.jinja").write_text("{{ 'another' }}")
    tokenizer = HuggingFaceTokenizer(str(tmp_path), {"encoder": "<image>"})
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == text
    assert tokenizer.chat_template is not None and tokenizer.chat_template.source == text


def test_a_text_with_the_token_itself_is_refused(load: Load) -> None:
    folder = load("mistral3", False)
    raw = RawSample.asking(key="a", question="An [IMG]", answer="b")
    with pytest.raises(ValueError, match=r"contains \[IMG\], the image token, outside of place"):
        encode_sample(raw, folder.config, folder.tokenizer, content=())


def test_an_image_in_an_answer_is_refused(load: Load) -> None:
    folder = load("qwen3_vl", False)
    raw = RawSample.asking(
        key="a", question="Which?", answer="<image> it", items={"encoder": (png(1),)}
    )
    with pytest.raises(ValueError, match="turn 2, an answer, has an image: expected them in quest"):
        encode_sample(raw, folder.config, folder.tokenizer, content=())


def test_a_tokenizer_without_a_mark_is_refused(load: Load) -> None:
    folder, other = load("mistral3", False), load("qwen3_vl", False)
    with pytest.raises(ValueError, match=r"--tokenizer-model needs \[IMG_BREAK\] and \[IMG_END\]"):
        check_prompt_format(folder.config, other.tokenizer)


def test_a_template_of_texts_is_refused(load: Load) -> None:
    folder = load("mistral3", False)
    tokenizer = HuggingFaceTokenizer(folder.tokenizer.pretrained.name_or_path, {"encoder": "[IMG]"})
    tokenizer.pretrained.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert tokenizer.chat_template is not None
    tokenizer.chat_template = type(tokenizer.chat_template)(tokenizer.pretrained, "a folder")
    raw = RawSample.asking(key="a", question="<image>", answer="b", items={"encoder": (png(1),)})
    with pytest.raises(ValueError, match="the chat template of a folder"):
        encode_sample(raw, folder.config, tokenizer, content=())

"""Samples of a vision encoder and of a module that the package does not know."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import placeholders
from megatron_mimo.data.samples.mock import Split, check_mock_items, mock_sample
from megatron_mimo.data.samples.sample import (
    EncodedSample,
    RawSample,
    RejectedSample,
    SkippedSample,
    encode_sample,
    try_encode,
)
from megatron_mimo.data.text.tokenizer import ByteTokenizer, build_tokenizer
from megatron_mimo.media.images import ImageInput
from tests.unit_tests.data.toy import Tone, ToneInput, tone

INPUTS = {"encoder": ImageInput(), "audio": ToneInput()}
CONFIG = DataConfig(inputs=INPUTS, seq_length=128)
TOKENIZER = build_tokenizer(None, placeholders(INPUTS))
IMAGE, TONE = (TOKENIZER.placeholder_ids[module] for module in ("encoder", "audio"))
END = TOKENIZER.eos_id


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


def asked(question: str, items: Mapping[str, tuple[Any, ...]]) -> RawSample:
    return RawSample.asking(key="k", question=question, answer="a", items=items)


def outcome(raw: RawSample, *content: str, config: DataConfig = CONFIG) -> Any:
    return try_encode(raw, config, TOKENIZER, content=content)


def test_each_module_has_a_token_of_its_own() -> None:
    assert TOKENIZER.placeholder_ids == {"encoder": 258, "audio": 259}
    assert (TOKENIZER.num_tokens, TOKENIZER.vocab_size) == (260, 384)
    alone = ByteTokenizer()
    assert (alone.placeholder_ids, alone.num_tokens, alone.vocab_size) == (
        {"encoder": 258}, 259, 384
    )  # fmt: skip
    many = ByteTokenizer([str(number) for number in range(200)])
    assert (many.num_tokens, many.vocab_size) == (458, 512)


@pytest.mark.parametrize("image_first", [True, False])
def test_two_modules_stand_in_one_text_in_any_order(image_first: bool) -> None:
    items = {"encoder": (png(16, 16), png(32, 16)), "audio": (tone(3), tone(1, 2))}
    text = "<image>,<tone><tone><image>." if image_first else "<tone>,<image><image><tone>."
    sample = encode_sample(asked(text, items), CONFIG, TOKENIZER, content=("audio", "encoder"))
    # The n-th placeholder of a module is its n-th item, wherever those of others stand.
    rows = [IMAGE, ord(","), *[TONE] * 4, *[IMAGE] * 2, ord(".")]
    if not image_first:
        rows = [*[TONE] * 3, ord(","), *[IMAGE] * 3, TONE, ord(".")]
    assert sample.tokens.tolist() == [*rows, ord("\n"), ord("a"), END]
    assert sample.tokens[sample.targets].tolist() == [ord("a"), END]
    assert [item.rows for item in sample.items["encoder"]] == [1, 2]
    assert [item.rows for item in sample.items["audio"]] == [3, 1]
    waves: Any = [item.wave.tolist() for item in sample.items["audio"]]  # type: ignore[attr-defined]
    assert waves == [[0] * 9, [2] * 3]


def test_a_sample_may_have_no_item_of_a_module() -> None:
    heard = outcome(asked("<tone>?", {"audio": (tone(2),)}), "audio", "encoder")
    assert list(heard.items) == ["audio"]
    assert heard.tokens.tolist() == [TONE, TONE, ord("?"), ord("\n"), ord("a"), END]
    seen = outcome(asked("<image>?", {"encoder": (png(16, 16),), "audio": ()}), "audio")
    assert list(seen.items) == ["encoder"]
    assert outcome(asked("?", {}), "audio").items == {}


def test_content_is_read_of_the_modules_that_a_rank_runs_alone() -> None:
    raw = asked("<image><tone>", {"encoder": (png(16, 16),), "audio": (tone(1),)})
    for content in ((), ("encoder",), ("audio",)):
        sample = outcome(raw, *content)
        (image,), (sound,) = sample.items["encoder"], sample.items["audio"]
        assert (image.patches is not None) == ("encoder" in content)
        assert (sound.wave is not None) == ("audio" in content)


def test_tags_stand_around_the_items_of_their_module() -> None:
    config = DataConfig(inputs={**INPUTS, "audio": ToneInput(tags=("[", "]"))}, seq_length=128)
    raw = asked("<tone><image>", {"encoder": (png(16, 16),), "audio": (tone(2),)})
    sample = encode_sample(raw, config, TOKENIZER, content=())
    assert sample.tokens.tolist()[:5] == [ord("["), TONE, TONE, ord("]"), IMAGE]
    assert not sample.targets[:5].any()


def test_items_and_placeholders_are_counted_by_module() -> None:
    wrong = outcome(asked("<tone><tone>", {"encoder": (png(16, 16),), "audio": (tone(1),)}))
    assert isinstance(wrong, RejectedSample)
    assert "0 <image> placeholders and 1 image: expected one placeholder for" in wrong.message
    wrong = outcome(asked("<image><tone><tone>", {"encoder": (png(8, 8),), "audio": (tone(1),)}))
    assert isinstance(wrong, RejectedSample)
    assert "2 <tone> placeholders and 1 tone: expected one placeholder for each" in wrong.message
    wrong = outcome(asked("?", {"radar": (b"x",)}))
    assert isinstance(wrong, RejectedSample)
    assert "items of module 'radar': expected items of encoder, audio" in wrong.message


def test_damage_of_any_item_is_damage_of_its_kind() -> None:
    broken = asked("<image><tone>", {"encoder": (png(16, 16),), "audio": (b"noise",)})
    for content in ((), ("audio",)):
        skipped = outcome(broken, *content)
        assert isinstance(skipped, SkippedSample)
        assert (skipped.kind, skipped.reason) == ("broken tone", "tone of 5 bytes has no header")
    cut = asked("<tone>", {"audio": (tone(2, 1, lost=1),)})
    sample = outcome(cut, "audio")
    assert isinstance(sample, EncodedSample) and sample.flaw is not None
    assert (sample.flaw.kind, sample.flaw.is_blank) == ("blank for a tone", True)
    assert outcome(cut).flaw is None
    long = asked("<image><tone>", {"encoder": (png(16, 16),), "audio": (tone(200),)})
    assert "(1 rows of images, 200 rows of tones and 3 tokens of text)" in outcome(long).reason
    assert "max-patches, play shorter tones, or shorten" in outcome(long).reason


def test_a_stray_token_of_a_further_module_stops() -> None:
    class Stray(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [TONE if byte == ord("@") else byte for byte in text.encode()]

    found = try_encode(asked("@", {}), CONFIG, Stray(("encoder", "audio")), content=())
    assert isinstance(found, RejectedSample)
    assert "1 tone tokens for 0 rows of its tones" in found.message
    assert "choose another --tone-token" in found.message


def test_inputs_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="--tone-token is empty"):
        DataConfig(inputs={"audio": ToneInput(placeholder="")})
    with pytest.raises(ValueError, match="'<tone>1', and that of audio '<tone>': expected two"):
        DataConfig(inputs={"audio": ToneInput(), "other": ToneInput(placeholder="<tone>1")})
    with pytest.raises(ValueError, match="audio and other both call an item 'tone'"):
        DataConfig(inputs={"audio": ToneInput(), "other": ToneInput(placeholder="<other>")})


# -- made-up samples -------------------------------------------------------------------------------


def test_mock_samples_of_several_modules_differ_and_encode() -> None:
    found = set()
    for index in range(60):
        raw = mock_sample(index, Split.TRAIN, CONFIG)
        sample = encode_sample(raw, CONFIG, TOKENIZER, content=("encoder", "audio"))
        found.add(tuple(sample.items))
        assert all(isinstance(item, Tone) for item in sample.items.get("audio", ()))
        assert len(raw.answer.split()) == sum(map(len, raw.items.values()))
    assert found == {("encoder",), ("encoder", "audio")}
    alone = DataConfig(inputs={"audio": ToneInput()})
    kinds = {tuple(mock_sample(index, Split.TRAIN, alone).items) for index in range(30)}
    assert kinds == {(), ("audio",)}


def test_what_a_module_makes_up_follows_from_its_name_alone() -> None:
    def tones(inputs: Mapping[str, Any], module: str, split: Split = Split.TRAIN) -> list[Any]:
        config = DataConfig(inputs=inputs, seq_length=64 * len(inputs))
        return [mock_sample(i, split, config).items.get(module) for i in range(40)]

    alone = tones({"audio": ToneInput()}, "audio")
    assert tones(INPUTS, "audio") == alone
    assert tones(dict(reversed(INPUTS.items())), "audio") == alone
    assert tones({"other": ToneInput()}, "other") != alone
    assert tones({"audio": ToneInput()}, "audio", Split.VAL) != alone
    # An image is what it is without the other module, given as much room.
    with_tones = DataConfig(inputs=INPUTS, seq_length=128)
    without = DataConfig(inputs={"encoder": ImageInput()}, seq_length=64)
    for index in range(20):
        both, one = (mock_sample(index, Split.VAL, config) for config in (with_tones, without))
        for ours, theirs in zip(both.items["encoder"], one.items["encoder"], strict=True):
            assert np.array_equal(ours, theirs)


def test_modules_that_do_not_fit_are_refused_before_a_run() -> None:
    check_mock_items(CONFIG)
    with pytest.raises(ValueError, match="tones need 23 positions, and have 20"):
        check_mock_items(DataConfig(inputs=INPUTS, seq_length=40))

from dataclasses import dataclass, fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.inputs import check_inputs
from megatron_mimo.data.loader.batch import StepData
from megatron_mimo.data.loader.stream_loader import build_train_loader
from megatron_mimo.data.loader.wire import (
    WireTypes,
    decode,
    decode_step,
    encode,
    encode_step,
    parcel,
    require_sendable,
)
from megatron_mimo.data.role import DataRole, SourceRole
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.audio.clip import EncodedClip
from megatron_mimo.media.audio.config import AudioConfig
from megatron_mimo.media.audio.input import AudioInput
from megatron_mimo.media.images import EncodedImage, ImageInput, PackedImages
from megatron_mimo.media.processors.packed import Outline, ProcessedImage
from megatron_mimo.media.video.clip import EncodedVideo
from megatron_mimo.media.video.input import VideoInput

TYPES = WireTypes.of({"encoder": ImageInput()})
EVERYTHING = DataRole(
    lanes=(0, 1),
    num_lanes=2,
    text_lane=1,
    sources={"encoder": SourceRole(rank=0, serving={0: (0,), 1: (0,)})},
)


def step(**settings: Any) -> StepData:
    config = DataConfig(global_batch_size=8, micro_batch_size=2, **settings)
    return build_train_loader(config, EVERYTHING, ByteTokenizer()).next_step()


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare values, dtypes and types, all the way down."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    elif is_dataclass(ours):
        for field in fields(ours):
            assert_same(getattr(ours, field.name), getattr(theirs, field.name))
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_same(tuple(ours.values()), tuple(theirs.values()))
    else:
        assert ours == theirs


@pytest.mark.parametrize("text_only", [0.0, 0.5, 1.0])
def test_a_step_comes_out_as_it_went_in(text_only: float) -> None:
    sent = step(text_only_fraction=text_only)
    assert ("encoder" not in sent.microbatches[0].inputs) == (text_only == 1.0)
    assert_same(decode_step(encode_step(sent, TYPES), TYPES), sent)


def test_tensors_of_every_dtype_and_shape_keep_their_bytes() -> None:
    sent = step()
    (first, *others) = sent.microbatches
    whole = first.inputs["encoder"]
    assert isinstance(whole, PackedImages)
    for tensor in (
        torch.tensor([[1.5, -0.0]], dtype=torch.bfloat16),
        torch.empty(0, 3, dtype=torch.int32),
        torch.tensor(True),
        torch.arange(6).view(2, 3).t(),
    ):
        inputs = {"encoder": replace(whole, patches=tensor)}
        changed = replace(sent, microbatches=(replace(first, inputs=inputs), *others))
        message = encode_step(changed, TYPES)
        received = decode_step(message, TYPES).microbatches[0].inputs["encoder"]
        assert isinstance(received, PackedImages)
        assert received.patches.dtype == tensor.dtype
        assert received.patches.shape == tensor.shape
        assert torch.equal(received.patches, tensor)


def test_what_is_not_known_to_travel_is_named() -> None:
    @dataclass
    class Mystery:
        value: int

    sent = step()
    entry: Any = ManifestEntry(
        module="encoder",
        source_rank=0,
        lane=0,
        rows=1,
        sequence=0,
        start=Mystery(3),  # type: ignore[arg-type]
    )
    changed = replace(sent.microbatches[1], manifest=(entry,))
    with pytest.raises(
        TypeError, match=r"step\.microbatches\[1\]\.manifest\[0\]\.start is a Mystery"
    ):
        encode_step(replace(sent, microbatches=(sent.microbatches[0], changed)), TYPES)


def test_a_packed_input_is_checked_where_nothing_is_sent() -> None:
    """Whether a run fails on it must not depend on the layout."""
    images = step().microbatches[0].inputs["encoder"]
    require_sendable(images, PackedImages, "encoder", TYPES)
    odd: Any = replace(images, patches=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^packed input of encoder\.patches is a list, which cann"):
        require_sendable(odd, PackedImages, "encoder", TYPES)
    with pytest.raises(TypeError, match="is a .*PackedImages: expected its packed_type, .*StepDat"):
        require_sendable(images, StepData, "encoder", TYPES)


def test_kinds_of_items_are_checked_before_a_run() -> None:
    class Odd:
        placeholder = "<odd>"

    odd: Any = {"odd": Odd()}
    with pytest.raises(
        ValueError, match="items of module odd: Odd has no words, feeds, token, inline, "
    ):
        check_inputs(odd)

    @dataclass
    class Thawed:
        value: int

    class ThawedInput(ImageInput):
        packed_type = Thawed  # type: ignore[assignment]

    with pytest.raises(ValueError, match="module odd: packed input Thawed cannot travel: expected"):
        check_inputs({"odd": ThawedInput()})
    check_inputs({"encoder": ImageInput()})


def test_items_of_every_kind_come_out_as_they_went_in() -> None:
    images, clip = ImageInput(), AudioInput(config=AudioConfig())
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)[:, ::2]
    outline = Outline(size=(3, 4), num_tokens=6, lines=(1, 2), facts={"grid": (1, 2, 3)})
    items: tuple[tuple[Any, ...], ...] = (
        (EncodedImage(grids=((2, 2),), rows=1, patches=pixels), 2**64 - 1),
        (EncodedImage(grids=((2, 2),), rows=1, patches=None), 0),
        (EncodedClip(samples=5, rows=2, features=np.full((3, 2), -0.0, np.float32)), 7),
        (
            EncodedVideo(
                grid=(2, 2), labels=("Frame 1: ",), rows=1, patches=np.ones((4, 12), np.float32)
            ),
            7,
        ),
        (ProcessedImage(outline=outline, shares_sample=True, content={"pixels": pixels}), 7),
    )
    types = WireTypes.of_items(
        {
            "encoder": images,
            "video": VideoInput(),
            "audio": clip,
            "hf": cast(Any, SimpleNamespace(item_type=ProcessedImage)),
        }
    )
    for item in items:
        described = parcel(item, types, "item")
        buffer = encode(item, types, "item")
        assert len(buffer) == described.nbytes
        assert_same(decode(buffer, types), item)
    # Settings of another run.
    with pytest.raises(TypeError, match="holds a .*EncodedClip: expected .*EncodedImage"):
        decode(encode(items[2], types, "item"), WireTypes.of_items({"encoder": images}))


def test_a_field_of_an_item_that_cannot_travel_is_named() -> None:
    types = WireTypes.of_items({"encoder": ImageInput()})
    odd = EncodedImage(grids=((2, 2),), rows=1, patches=np.array([object()]))
    with pytest.raises(
        TypeError, match=r"item of encoder\[0\]\.patches is a ndarray, which cannot"
    ):
        parcel((odd, 3), types, "item of encoder")

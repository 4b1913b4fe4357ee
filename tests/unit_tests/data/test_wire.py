from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.data.batch import StepData
from megatron_mimo.data.config import DataConfig, DataRole
from megatron_mimo.data.loader import build_train_loader
from megatron_mimo.data.tokenizer import ByteTokenizer
from megatron_mimo.data.wire import decode_step, encode_step

EVERYTHING = DataRole(
    lanes=(0, 1), num_lanes=2, text_lane=1, encoder_rank=0, serving={0: (0,), 1: (0,)}
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
    assert (sent.microbatches[0].images is None) == (text_only == 1.0)
    assert_same(decode_step(encode_step(sent)), sent)


def test_tensors_of_every_dtype_and_shape_keep_their_bytes() -> None:
    sent = step()
    (first, *others) = sent.microbatches
    assert first.images is not None
    for tensor in (
        torch.tensor([[1.5, -0.0]], dtype=torch.bfloat16),
        torch.empty(0, 3, dtype=torch.int32),
        torch.tensor(True),
        torch.arange(6).view(2, 3).t(),
    ):
        images = replace(first.images, patches=tensor)
        changed = replace(sent, microbatches=(replace(first, images=images), *others))
        received = decode_step(encode_step(changed)).microbatches[0].images
        assert received is not None
        assert received.patches.dtype == tensor.dtype
        assert received.patches.shape == tensor.shape
        assert torch.equal(received.patches, tensor)


def test_what_is_not_known_to_travel_is_named() -> None:
    @dataclass
    class Mystery:
        value: int

    sent = step()
    entry: Any = ManifestEntry(0, 0, 1, 0, Mystery(3))  # type: ignore[arg-type]
    changed = replace(sent.microbatches[1], manifest=(entry,))
    with pytest.raises(
        TypeError, match=r"step\.microbatches\[1\]\.manifest\[0\]\.start is a Mystery"
    ):
        encode_step(replace(sent, microbatches=(sent.microbatches[0], changed)))

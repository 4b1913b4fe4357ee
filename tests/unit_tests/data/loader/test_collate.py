import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.loader.batch import StepData
from megatron_mimo.data.loader.collate import collate_packed, collate_text
from megatron_mimo.data.loader.stream_loader import StreamLoader
from megatron_mimo.data.role import DataRole, SourceRole
from megatron_mimo.data.samples.sample import Drawn, EncodedSample
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import EncodedImage, ImageConfig, ImageInput, PackedImages
from tests.properties import examples

TOKENIZER = ByteTokenizer()
IMAGE = TOKENIZER.placeholder_ids["encoder"]
SEQ_LENGTH = 32
Documents = tuple[EncodedSample, ...]


def image(value: int, grid: tuple[int, int] = (2, 2)) -> EncodedImage:
    """One grey, by which it is known again."""
    patches = np.full((grid[0] * grid[1], 3 * 8 * 8), value, dtype=np.uint8)
    return EncodedImage((grid,), grid[0] * grid[1] // 4, patches)


def document(key: str, text: int, *images: EncodedImage) -> EncodedSample:
    """An image between any two tokens of text, as long as there are any; then targets."""
    tokens = [7]
    for number, one in enumerate(images):
        tokens += [IMAGE] * one.rows + [number]
    tokens += list(range(20, 20 + text))
    return EncodedSample(
        key=key,
        tokens=np.array(tokens, dtype=np.int64),
        targets=np.arange(len(tokens)) >= len(tokens) - text,
        items={"encoder": images} if images else {},
    )


def role(lanes: Sequence[int], *, text: int | None = None, encoder: int | None = None) -> DataRole:
    return DataRole(
        lanes=tuple(lanes),
        num_lanes=2,
        text_lane=text,
        sources={"encoder": SourceRole(rank=encoder, serving={lane: (0,) for lane in lanes})},
    )


def step(drawn: Mapping[int, Sequence[Any]], who: DataRole, **fields: Any) -> StepData:
    """One microbatch of packed sequences."""
    size = 2 if who.num_lanes == 2 else 1
    config = DataConfig(
        **{
            "provider": "energon",
            "path": "by hand",
            "seq_length": SEQ_LENGTH,
            "global_batch_size": size,
            "packing_buffer_size": 4,
            "inputs": {"encoder": ImageInput(config=ImageConfig(patch_dim=8))},
        }
        | fields
    )

    def stream(sequences: Sequence[Any]) -> Iterator[Drawn]:
        return iter([Drawn(documents=documents) for documents in sequences])

    streams: dict[int, Any] = {lane: stream(drawn[lane]) for lane in who.lanes}
    return StreamLoader(streams, config, who, TOKENIZER).next_step()


def test_documents_stand_end_to_end_and_padding_by_itself() -> None:
    batch = collate_packed((document("a", 3), document("b", 1), document("c", 2)), 10, 0)
    assert batch.sample_keys == ("a", "b", "c")
    assert batch.lengths == (3, 1, 2, 4)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 10]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.tolist() == [[7, 20, 21, 7, 7, 20, 0, 0, 0, 0]]
    # The first token of the next document is nobody's target.
    assert batch.labels.tolist() == [[20, 21, 22, 20, 20, 21, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1, 2, 3]]
    assert batch.position_ids.dtype == torch.int64
    full = collate_packed((document("a", 6), document("b", 4)), 10, 0)
    assert full.lengths == (6, 4)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4))
@examples(20)
def test_a_packed_document_has_the_tokens_of_one_alone(texts: list[int]) -> None:
    documents = tuple(document(str(i), text) for i, text in enumerate(texts))
    packed = collate_packed(documents, SEQ_LENGTH, TOKENIZER.pad_id)
    assert packed.lengths is not None and sum(packed.lengths) == SEQ_LENGTH
    start = 0
    for one, length in zip(documents, packed.lengths, strict=False):
        alone = collate_text([one], length, TOKENIZER.pad_id)
        for name in ("input_ids", "labels", "loss_mask", "position_ids"):
            found = getattr(packed, name)[:, start : start + length]
            assert found.equal(getattr(alone, name)), name
        start += length


def test_every_reader_of_a_lane_knows_the_lengths_of_its_documents() -> None:
    drawn = {0: [(document("a", 6), document("b", 4))], 1: [(document("c", SEQ_LENGTH),)]}
    (everything,) = step(drawn, role([0, 1], encoder=0)).microbatches
    assert everything.documents == {0: (6, 4, SEQ_LENGTH - 10), 1: (SEQ_LENGTH,)}
    (mine,) = step(drawn, role([0], text=0)).microbatches
    assert mine.text is not None
    assert mine.documents == {0: mine.text.lengths}
    alone = step({0: [(document("a", 6),)]}, role([0], text=0), packing_buffer_size=None)
    assert alone.microbatches[0].documents == {}


def test_readers_of_documents_of_other_lengths_have_another_digest() -> None:
    found = [
        step({0: [(document("a", 6), document("b", last))]}, role([0])).lane_digest
        for last in (4, 4, 5)
    ]
    assert found[0] == found[1] != found[2]


def test_rows_go_where_the_image_tokens_of_their_document_are() -> None:
    sequence = (
        document("a", 2, image(1)),
        document("b", 3),
        document("c", 1, image(2, (2, 4)), image(3)),
    )
    drawn = {0: [sequence], 1: [(document("d", 1, image(4, (4, 4))), document("e", 2))]}
    pixels = step(drawn, role((0, 1), encoder=0))
    for lane in (0, 1):
        tokens = step(drawn, role((lane,), text=lane))
        (microbatch,) = tokens.microbatches
        assert microbatch.text is not None
        places = [
            (entry.sequence, entry.start + row)
            for entry in microbatch.manifest
            for row in range(entry.rows)
        ]
        is_image = microbatch.text.input_ids == IMAGE
        assert places == [tuple(place) for place in is_image.nonzero().tolist()]
        assert tokens.lane_digest[lane] == pixels.lane_digest[lane]
        assert tokens.lane_target_tokens[lane] == pixels.lane_target_tokens[lane]
        assert tokens.lane_positions[lane] == pixels.lane_positions[lane]
    (microbatch,) = pixels.microbatches
    assert microbatch.keys == {0: ("a", "b", "c"), 1: ("d", "e")}
    assert microbatch.starts == {0: ((0, 0), (0, 4), (0, 7)), 1: ((0, 0), (0, 6))}
    assert pixels.lane_target_tokens == {0: 6, 1: 3}
    assert pixels.lane_positions == {0: 4 + 3 + 6, 1: 6 + 2}
    assert [entry.rows for entry in microbatch.manifest] == [1, 2, 1, 4]
    assert greys(microbatch.inputs["encoder"]) == [1, 2, 3, 4]


def greys(images: Any) -> list[int]:
    """Which images were packed, in order."""
    config = ImageConfig()
    mean, std = config.pixel_mean[0], config.pixel_std[0]
    values = ((images.patches[:, 0] * std + mean) * 255).round().int()
    found: list[int] = values.unique_consecutive().tolist()
    return found


def test_readers_that_cut_documents_elsewhere_disagree() -> None:
    """Keys and rows are the same, though text-only documents are not."""
    here = step({0: [(document("a", 2), document("b", 3))]}, role((0,), text=0))
    there = step({0: [(document("a", 3), document("b", 2))]}, role((0,), text=0))
    assert here.lane_digest != there.lane_digest


@pytest.mark.parametrize("buffer_size", [None, 4])
def test_lanes_of_equal_shapes_merge_along_tokens(buffer_size: int | None) -> None:
    """Stacking along a batch once hung a run of 33 nodes, where by chance all shapes agreed."""
    drawn = {
        lane: [(document(f"lane-{lane}", 3, image(10 * lane + 1), image(10 * lane + 2)),)]
        for lane in (0, 1)
    }
    (merged,) = step(drawn, role((0, 1), encoder=0), packing_buffer_size=buffer_size).microbatches
    (alone,) = step(drawn, role((0,), encoder=0), packing_buffer_size=buffer_size).microbatches
    images: Any = merged.inputs["encoder"]
    one: Any = alone.inputs["encoder"]
    assert one.patches.shape == (8, 3 * 8 * 8)
    assert images.patches.shape == (16, 3 * 8 * 8)
    assert len(images.lengths) == 2 * len(one.lengths)
    assert images.cu_seqlens.tolist() == [4 * i for i in range(5)]
    assert images.row_index.shape == (16,)
    assert greys(images) == [1, 2, 11, 12]
    assert [entry.lane for entry in merged.manifest] == [0, 0, 1, 1]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heard(EncodedSample):
    audio: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Deep(EncodedImage):
    depth: int = 0


def test_what_merging_does_not_know_is_named() -> None:
    plain = document("a", 2, image(1))
    own: dict[str, Any] = {
        field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)
    }
    deep = Deep(((2, 2),), 1, image(1).patches)
    for strange, message in (
        (Heard(**own), r"lane 0: merging does not know the field 'audio' of a Heard: expected Enc"),
        (
            dataclasses.replace(plain, items={"encoder": (deep,)}),
            r"lane 0, sample 'a': merging does not know the field 'depth' of a Deep: expected Enc",
        ),
        ({"tokens": 1}, r"lane 0: merging does not know the type of a dict: expected EncodedS"),
    ):
        with pytest.raises(TypeError, match=message):
            step({0: [(strange,)]}, role((0,), encoder=0))


def test_images_are_augmented_by_their_document() -> None:
    """Whatever else is packed with it."""
    augmented = ImageInput(config=ImageConfig(patch_dim=8, position_crop=True))
    config = {"inputs": {"encoder": augmented}}
    one, other = document("a", 2, image(1, (4, 4))), document("b", 2, image(2))
    alone, packed = (
        step({0: [documents]}, role((0,), encoder=0), **config).microbatches[0].inputs["encoder"]
        for documents in ((one,), (other, one))
    )
    assert isinstance(alone, PackedImages) and isinstance(packed, PackedImages)
    assert packed.position_weight[4:].equal(alone.position_weight)

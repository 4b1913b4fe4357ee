import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.loader.batch import StepData
from megatron_mimo.data.loader.collate import collate_text
from megatron_mimo.data.loader.share import ReadingGroup, SharedLoader
from megatron_mimo.data.loader.stream_loader import (
    StreamLoader,
    build_eval_loader,
    build_list_loader,
    build_train_loader,
)
from megatron_mimo.data.loader.trace import SampleTrace
from megatron_mimo.data.reading.stream import IndexedStream
from megatron_mimo.data.role import DataRole, SourceRole, data_role
from megatron_mimo.data.samples.mock import Split, mock_sample
from megatron_mimo.data.samples.sample import (
    Drawn,
    EncodedSample,
    Outcome,
    RejectedSample,
    SkippedSample,
    draw,
)
from megatron_mimo.data.text.tokenizer import ByteTokenizer
from megatron_mimo.media.images import ImageConfig, ImageInput, pack_images
from megatron_mimo.topology import Layout, ModuleGridSpec
from tests.properties import examples

TOKENIZER = ByteTokenizer()
CROPPED = {"encoder": ImageInput(config=ImageConfig(position_crop=True))}


def roles(encoder_dp: int, llm_dp: int) -> tuple[list[DataRole], list[DataRole]]:
    """Roles of the encoder's and of the language model's dp ranks."""
    layout = Layout.of(
        ModuleGridSpec(name="encoder", dp=encoder_dp),
        ModuleGridSpec(name="llm", dp=llm_dp, offset=encoder_dp),
        world_size=encoder_dp + llm_dp,
    )
    found = [data_role(layout, rank) for rank in range(layout.world_size)]
    return found[:encoder_dp], found[encoder_dp:]


def steps(config: DataConfig, role: DataRole, number: int = 1) -> list[StepData]:
    loader = build_train_loader(config, role, TOKENIZER)
    return [loader.next_step() for _ in range(number)]


@given(st.sampled_from([(1, 1), (1, 3), (2, 3), (2, 2), (2, 1), (3, 2)]), st.integers(1, 3))
@examples(20)
def test_both_ends_describe_the_same_images(sizes: tuple[int, int], batch: int) -> None:
    config = DataConfig(
        micro_batch_size=batch, global_batch_size=2 * batch * sizes[1], text_only_fraction=0.3
    )
    encoder, llm = roles(*sizes)
    encoder_data = [steps(config, role)[0] for role in encoder]
    llm_data = [steps(config, role)[0] for role in llm]
    for lane, tokens in enumerate(llm_data):
        for rank, pixels in enumerate(encoder_data):
            if lane not in encoder[rank].lanes:
                continue
            assert pixels.lane_digest[lane] == tokens.lane_digest[lane]
            assert pixels.lane_target_tokens[lane] == tokens.lane_target_tokens[lane]
            for here, there in zip(pixels.microbatches, tokens.microbatches, strict=True):
                assert [e for e in here.manifest if e.lane == lane] == list(there.manifest)
                assert here.text is None
                assert not there.inputs
    for tokens in llm_data:
        for microbatch in tokens.microbatches:
            places = [
                (entry.sequence, entry.start + row)
                for entry in microbatch.manifest
                for row in range(entry.rows)
            ]
            is_image = microbatch.text.input_ids == TOKENIZER.placeholder_ids["encoder"]
            assert places == [tuple(place) for place in is_image.nonzero().tolist()]
    for rank, pixels in enumerate(encoder_data):
        for microbatch in pixels.microbatches:
            mine = [entry for entry in microbatch.manifest if entry.source_rank == rank]
            if "encoder" not in microbatch.inputs:
                assert not mine
                continue
            images = microbatch.inputs["encoder"]
            first = images.row_index.view(-1, 4)[:, 0].contiguous()
            owner = torch.searchsorted(images.cu_seqlens, first, right=True)
            rows = owner.unique_consecutive(return_counts=True)[1]
            assert rows.tolist() == [entry.rows for entry in mine]


def test_packed_images_are_the_assigned_ones_in_manifest_order() -> None:
    config = DataConfig(micro_batch_size=3, global_batch_size=3)
    encoder, _ = roles(2, 1)
    whole = DataRole(
        lanes=(0,),
        num_lanes=1,
        text_lane=0,
        sources={"encoder": SourceRole(rank=0, serving={0: (0,)})},
    )
    everything = steps(config, whole)[0].microbatches[0].inputs["encoder"]
    shares = [steps(config, role)[0].microbatches[0].inputs["encoder"] for role in encoder]
    patches = torch.cat([share.patches for share in shares])
    torch.testing.assert_close(patches, everything.patches, rtol=0, atol=0)


def numbers(lane: int, lanes: int, config: DataConfig) -> Any:
    """A lane's samples, of which each has its number for a key."""
    return IndexedStream(lambda number: plain(str(number), [1, 2], 1), lane, lanes, config)


def number(drawn: Drawn) -> int:
    return int(drawn.documents[0].key)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_lanes_share_every_global_batch_alike(lanes: int, batch: int, rounds: int) -> None:
    config = DataConfig(micro_batch_size=batch, global_batch_size=batch * lanes * rounds)
    size = config.global_batch_size
    drawn = [numbers(lane, lanes, config) for lane in range(lanes)]
    for step in range(3):
        samples = [number(d) for it in drawn for d in itertools.islice(it, size // lanes)]
        assert sorted(samples) == list(range(step * size, (step + 1) * size))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4))
def test_other_lanes_go_on_with_the_samples_that_are_left(
    before: int, after: int, batch: int, done: int
) -> None:
    config = DataConfig(micro_batch_size=batch, global_batch_size=batch * math.lcm(before, after))
    streams = [numbers(lane, before, config) for lane in range(before)]
    for stream in streams:
        for _ in range(done * config.global_batch_size // before):
            next(stream)
    resumed = [numbers(lane, after, config) for lane in range(after)]
    for lane, stream in enumerate(resumed):
        stream.restore(lane, [old.state() for old in streams])
    size = config.global_batch_size
    drawn = [number(d) for stream in resumed for d in itertools.islice(stream, size // after)]
    assert sorted(drawn) == list(range(done * size, (done + 1) * size))


def test_samples_that_do_not_deal_evenly_keep_their_lanes() -> None:
    config = DataConfig(micro_batch_size=1, global_batch_size=6)
    stream = numbers(0, 3, config)
    with pytest.raises(ValueError, match="2 lanes have drawn 3, 4 samples.*keep --llm-dp 2"):
        stream.restore(0, [{"drawn": 3}, {"drawn": 4}])
    stream.restore(0, [{"drawn": 3}, {"drawn": 3}])
    assert number(next(stream)) == 6


def test_mock_data_does_not_go_on_from_a_dataset() -> None:
    stream = numbers(0, 1, DataConfig(micro_batch_size=1, global_batch_size=1))
    with pytest.raises(
        ValueError, match="--dataset-provider mock cannot go on: .* read with energon"
    ):
        stream.restore(0, [{"workers": {}, "num_samples": [1]}])


def test_sample_lands_where_its_index_says() -> None:
    config = DataConfig(micro_batch_size=2, global_batch_size=12)
    _, llm = roles(1, 3)
    second = steps(config, llm[1], 2)[1]
    for m, microbatch in enumerate(second.microbatches):
        expected = [f"mock-train-{12 + m * 6 + 1 * 2 + j}" for j in range(2)]
        assert list(microbatch.text.sample_keys) == expected
        assert microbatch.index == m


def test_language_model_alone_has_no_manifest() -> None:
    role = DataRole(lanes=(0,), num_lanes=1, text_lane=0, sources={})
    (microbatch,) = steps(DataConfig(), role)[0].microbatches
    assert microbatch.manifest == ()
    assert not microbatch.inputs


def test_evaluation_starts_over_at_each_call() -> None:
    config = DataConfig(global_batch_size=2)
    role = roles(1, 1)[1][0]
    first, again = (build_eval_loader(config, role, TOKENIZER).next_step() for _ in range(2))
    assert first.lane_digest == again.lane_digest
    assert first.lane_digest != steps(config, role)[0].lane_digest


def test_list_loader_wraps_around() -> None:
    config = DataConfig(global_batch_size=2, micro_batch_size=2)
    samples = [mock_sample(i, Split.VAL, config) for i in range(3)]
    loader = build_list_loader(samples, config, roles(1, 1)[1][0], TOKENIZER)
    keys = [k for _ in range(3) for k in loader.next_step().microbatches[0].text.sample_keys]
    assert keys == [f"mock-val-{i}" for i in (0, 1, 2, 0, 1, 2)]


def test_no_samples_to_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        build_list_loader([], DataConfig(), roles(1, 1)[1][0], TOKENIZER)


def plain(key: str, tokens: list[int], prompt: int) -> EncodedSample:
    return EncodedSample(
        key=key,
        tokens=np.array(tokens, dtype=np.int64),
        targets=np.arange(len(tokens)) >= prompt,
        items={},
    )


def test_labels_are_shifted_and_only_answers_count() -> None:
    batch = collate_text([plain("a", [5, 6, 7, 8], 2), plain("b", [1, 9], 1)], 5, 0)
    assert batch.sample_keys == ("a", "b")
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 0, 0], [9, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.loss_mask.dtype == torch.float32


@given(st.lists(st.text(max_size=3), min_size=4, max_size=4), st.permutations(range(4)))
def test_digest_tells_keys_and_their_order_apart(keys: list[str], order: list[int]) -> None:
    def digest(names: list[str]) -> int:
        stream = iter([Drawn(documents=(plain(name, [1, 2], 1),)) for name in names])
        config = DataConfig(global_batch_size=4)
        role = DataRole(lanes=(0,), num_lanes=1, text_lane=0, sources={})
        return StreamLoader({0: stream}, config, role, TOKENIZER).next_step().lane_digest[0]

    reordered = [keys[i] for i in order]
    assert 0 <= digest(keys) < 2**63
    assert (digest(keys) == digest(reordered)) == (keys == reordered)
    joined = ["".join(keys), "", "", ""]
    assert (digest(keys) == digest(joined)) == (keys == joined)


def skipped(key: str) -> SkippedSample:
    return SkippedSample(
        key=key, source="dataset d, shard 0.tar", kind="malformed text", reason="it is torn"
    )


def stream_loader(outcomes: Iterator[Outcome], **fields: int) -> StreamLoader:
    role = DataRole(lanes=(0,), num_lanes=1, text_lane=0, sources={})
    config = DataConfig(**fields)
    drawn = iter(lambda: draw(outcomes, "lane 0", config.max_skips_in_row), None)
    return StreamLoader({0: drawn}, config, role, TOKENIZER)


def test_skips_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = iter([skipped("bad-1"), skipped("bad-2"), plain("good", [1, 2], 1)])
    loader = stream_loader(outcomes, max_skips_in_row=3)
    with caplog.at_level(logging.WARNING):
        step = loader.next_step()
    assert step.microbatches[0].text.sample_keys == ("good",)
    assert loader.skips.num_skipped == 2
    assert "lane 0 skips sample 'bad-2' of dataset d, shard 0.tar: it is torn" in caplog.text


def test_too_many_skips_in_a_row_stop() -> None:
    loader = stream_loader(map(skipped, map(str, itertools.count())), max_skips_in_row=7)
    with pytest.raises(
        ValueError, match=r"lane 0: 7 unusable samples in a row, the last one '6' of dataset d"
    ):
        loader.next_step()


def test_rejected_sample_stops_with_its_message() -> None:
    with pytest.raises(ValueError, match="^two and two are five$"):
        stream_loader(iter([RejectedSample(message="two and two are five")])).next_step()


def test_dry_lane_names_itself() -> None:
    with pytest.raises(ValueError, match="lane 0 of 1 ran out of samples"):
        stream_loader(iter([])).next_step()


def test_indivisible_batch_names_the_flags() -> None:
    with pytest.raises(
        ValueError,
        match=r"--global-batch-size 10 .* --micro-batch-size 2 x --llm-dp 2: "
        r"set --global-batch-size 8",
    ):
        DataConfig(global_batch_size=10, micro_batch_size=2).num_microbatches(2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"provider": "web"}, "--dataset-provider web: expected 'mock' or 'energon'"),
        ({"provider": "energon"}, "needs --data-path"),
        ({"seq_length": 1}, "--seq-length is 1: expected 2 to 16,777,216"),
        ({"num_workers": -1}, "--num-workers is -1"),
        ({"text_only_fraction": 1.5}, "--text-only-fraction is 1.5: expected 0 to 1"),
        ({"inputs": {"encoder": ImageInput(placeholder="")}}, "--image-token is empty"),
    ],
)
def test_bad_settings_name_the_flag(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)  # type: ignore[arg-type]


def test_trace_has_a_line_per_step(tmp_path: Path) -> None:
    trace = SampleTrace(str(tmp_path / "trace"), 3, "encoder dp 0", first_step=5)
    config = DataConfig(global_batch_size=2)
    role = roles(1, 2)[0][0]
    source = build_train_loader(config, role, TOKENIZER)
    loader = SharedLoader(source, ReadingGroup((3,), None, 3), inputs=config.inputs, trace=trace)
    loader.next_step()
    loader.next_step()
    loader.close()
    lines = (tmp_path / "trace" / "rank-00003.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "step": 6,
        "role": "encoder dp 0",
        "lanes": [0, 1],
        "sample_keys": {"0": ["mock-train-2"], "1": ["mock-train-3"]},
    }
    assert len(lines) == 2


def test_trace_folder_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--sample-trace-dir .*file cannot be written to"):
        SampleTrace(str(tmp_path / "file"), 0, "llm dp 0")


def test_pixels_do_not_depend_on_who_packs_them() -> None:
    config = DataConfig(micro_batch_size=1, global_batch_size=2)
    encoder, _ = roles(1, 2)
    together = steps(config, encoder[0])[0].microbatches[0].inputs["encoder"]
    alone = [steps(config, role)[0].microbatches[0].inputs["encoder"] for role in roles(2, 2)[0]]
    assert torch.equal(together.patches, torch.cat([share.patches for share in alone]))
    assert together.max_seqlen == max(share.max_seqlen for share in alone)
    assert pack_images([], ImageConfig()) is None


def position_weights(config: DataConfig, encoder_dp: int, number: int) -> list[bytes]:
    """Of every image of some steps, ascending; who runs an image does not show."""
    found = []
    for role in roles(encoder_dp, 2)[0]:
        for step in steps(config, role, number):
            for microbatch in step.microbatches:
                if "encoder" in microbatch.inputs:
                    images = microbatch.inputs["encoder"]
                    # Rows of one image share a patch count: split along its pixels.
                    found += [
                        patch.numpy().tobytes() + weight.numpy().tobytes()
                        for patch, weight in zip(
                            images.patches, images.position_weight, strict=True
                        )
                    ]
    return sorted(found)


def test_augmentation_does_not_depend_on_the_layout() -> None:
    config = DataConfig(global_batch_size=4, inputs=CROPPED)
    assert position_weights(config, 1, 2) == position_weights(config, 2, 2)
    assert position_weights(config, 1, 2) == position_weights(config, 4, 2)


def test_augmentation_differs_between_steps_and_stays_out_of_evaluation() -> None:
    config = DataConfig(global_batch_size=1, mock_dataset_size=1, inputs=CROPPED)
    (role,), _ = roles(1, 1)
    first, second = steps(config, role, 2)
    drawn = [step.microbatches[0].inputs["encoder"] for step in (first, second)]
    assert drawn[0].patches.equal(drawn[1].patches)
    assert not drawn[0].position_weight.equal(drawn[1].position_weight)
    plain = dataclasses.replace(config, inputs={"encoder": ImageInput()})
    evaluated, wanted = (
        build_eval_loader(settings, role, TOKENIZER).next_step().microbatches[0].inputs["encoder"]
        for settings in (config, plain)
    )
    assert evaluated.position_weight.equal(wanted.position_weight)


@pytest.mark.parametrize(
    "lanes", [{}, {0: 5}, {0: {}}, {0: {"step": 1}}, {0: {"step": 1, "stream": {"drawn": "x"}}}]
)
def test_a_position_that_is_none_is_refused(lanes: dict[int, Any]) -> None:
    with pytest.raises(ValueError, match="does not say where the data stood"):
        build_train_loader(DataConfig(), roles(1, 1)[0][0], TOKENIZER).restore(lanes)

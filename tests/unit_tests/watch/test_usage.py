"""What a step's data makes ranks compute and send, against counts by hand."""

from collections.abc import Callable

import pytest

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.model.flops import ModelWork
from megatron_mimo.modules.flops import TextWork
from megatron_mimo.modules.radio.flops import ImageWork
from megatron_mimo.topology import Layout
from tests.unit_tests.schedule.toy import SEQ_LENGTH, grids, sharding_of

LAYOUTS = {
    "fan-out": (grids({}, {"dp": 2}), (9, 0)),
    # Each of a lane's two ranks takes all rows, and the encoder's share the sending.
    "replicated": (grids({"tp": 2}, {"tp": 2}), (8, 8)),
    "pipelines": (grids({"pp": 2}, {"pp": 2}), (8, 0)),
    "one rank": (grids({}, {}, colocated=True), (0, 0)),
}


def entry(lane: int, rows: int, start: int) -> ManifestEntry:
    return ManifestEntry(
        module="encoder", source_rank=0, lane=lane, rows=rows, sequence=0, start=start
    )


def measure(layout: Layout, returns: bool) -> tuple[ModelWork, int]:
    """Of one microbatch: five rows and three of lane 0, and one of lane 1 if there is one."""
    import numpy as np
    import torch

    from megatron_mimo.bridge.microbatch import (
        EdgePlan,
        MicrobatchManifest,
        MicrobatchPlan,
        plan_microbatch,
    )
    from megatron_mimo.bridge.plan import BridgePlanner
    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data.loader.batch import Microbatch, StepData, TextBatch
    from megatron_mimo.media.images import EncodedImage, pack_images
    from megatron_mimo.topology.groups import build_topology
    from megatron_mimo.watch.usage import UsageMeter

    topology = build_topology(layout)
    architecture = model_config("mock", ["vision.class_token_len=2"])
    vision = architecture.part("vision")
    entries = [entry(0, 5, 0), entry(0, 3, 9)]
    entries += [entry(1, 1, 4)] if layout.num_lanes > 1 else []
    size = 3 * vision.patch_dim**2
    images = pack_images(
        [
            EncodedImage(
                grids=((2, 2 * entry.rows),),
                rows=entry.rows,
                patches=np.zeros((4 * entry.rows, size), np.uint8),
            )
            for entry in entries
        ],
        vision.image_config(),
    )
    tokens = torch.zeros(2, SEQ_LENGTH, dtype=torch.int64)
    text = TextBatch(
        sample_keys=("a", "b"),
        input_ids=tokens,
        labels=tokens,
        loss_mask=tokens.float(),
        position_ids=tokens,
        padding=tokens.bool(),
    )
    packed = TextBatch(
        sample_keys=("a", "b"),
        input_ids=tokens[:1],
        labels=tokens[:1],
        loss_mask=tokens[:1].float(),
        position_ids=tokens[:1],
        padding=tokens[:1].bool(),
        lengths=(10, SEQ_LENGTH - 10),
    )
    microbatches = [
        Microbatch(
            index=i,
            manifest=tuple(entries),
            keys={},
            text=each if topology.target is not None else None,
            inputs={"encoder": images} if "encoder" in topology.modules and i == 0 else {},
        )
        for i, each in enumerate((text, packed))
    ]
    data = StepData(microbatches=tuple(microbatches), lane_digest={}, lane_target_tokens={})
    planners = {"encoder": BridgePlanner(layout, "encoder", sharding_of(layout, False))}
    manifest = MicrobatchManifest(entries=tuple(entries))
    plans = [
        plan_microbatch(layout, topology.rank, planners, manifest),
        MicrobatchPlan(manifest=MicrobatchManifest(entries=()), edges={"encoder": EdgePlan()}),
    ]
    meter = UsageMeter(
        topology=topology,
        architecture=architecture,
        row_bytes=10,
        returning=frozenset({"encoder"} if returns else ()),
    )
    usage = meter.measure(data, plans)
    return usage.work, usage.bytes_sent


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("returns", [True, False])
def test_the_ranks_sum_is_the_steps(
    name: str, returns: bool, run_ranks: Callable[..., list]
) -> None:
    layout, (to_first, to_second) = LAYOUTS[name]
    found = run_ranks(layout.world_size, measure, layout, returns)
    rows = 8 + (layout.num_lanes > 1)
    lengths = [4 * count + 2 for count in (5, 3, 1)[: 1 + layout.num_lanes]]
    triangle = [n * (n + 1) // 2 for n in (SEQ_LENGTH, SEQ_LENGTH, 10, SEQ_LENGTH - 10)]
    total = sum((work for work, _ in found), ModelWork())
    assert total.modules["llm"] == TextWork(
        sequences=3 * layout.num_lanes, document_pairs=sum(triangle) * layout.num_lanes
    )
    assert total.modules["encoder"] == ImageWork(
        rows=rows,
        patches=4 * rows,
        pieces=len(lengths),
        piece_pairs=sum(n * n for n in lengths),
    )
    # Rows to each receiver, and, where they train, gradients back to each encoder rank.
    forward = to_first + to_second
    assert sum(sent for _, sent in found) == 10 * forward * (2 if returns else 1)

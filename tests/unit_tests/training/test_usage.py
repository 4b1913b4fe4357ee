"""What a step's data makes ranks compute and send, against counts by hand."""

from collections.abc import Callable

import pytest

from megatron_mimo.bridge.manifest import ManifestEntry
from megatron_mimo.model.flops import Work
from megatron_mimo.topology import Layout
from tests.unit_tests.schedule.toy import SEQ_LENGTH, grids, sharding_of

LAYOUTS = {
    "fan-out": (grids({}, {"dp": 2}), (9, 0)),
    # Each of a lane's two ranks takes all rows, and the encoder's share the sending.
    "replicated": (grids({"tp": 2}, {"tp": 2}), (8, 8)),
    "pipelines": (grids({"pp": 2}, {"pp": 2}), (8, 0)),
    "one rank": (grids({}, {}, colocated=True), (0, 0)),
}


def measure(layout: Layout, returns: bool) -> tuple[Work, int]:
    """Of one microbatch: five rows and three of lane 0, and one of lane 1 if there is one."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from megatron_mimo.bridge.plan import BridgePlanner
    from megatron_mimo.data.batch import Microbatch, StepData, TextBatch
    from megatron_mimo.images import EncodedImage, pack_images
    from megatron_mimo.presets import model_config
    from megatron_mimo.schedule.crossing import StepManifest, plan_crossing
    from megatron_mimo.topology.groups import build_topology
    from megatron_mimo.training.usage import UsageMeter

    topology = build_topology(layout)
    vision = model_config("mock", ["vision.class_token_len=2"]).vision
    entries = [ManifestEntry(0, 0, 5, 0, 0), ManifestEntry(0, 0, 3, 0, 9)]
    entries += [ManifestEntry(1, 0, 1, 0, 4)] if layout.num_lanes > 1 else []
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
    )
    packed = TextBatch(
        sample_keys=("a", "b"),
        input_ids=tokens[:1],
        labels=tokens[:1],
        loss_mask=tokens[:1].float(),
        position_ids=tokens[:1],
        lengths=(10, SEQ_LENGTH - 10),
    )
    microbatches = [
        Microbatch(
            index=i,
            manifest=tuple(entries),
            keys={},
            text=each if topology.llm is not None else None,
            images=images if topology.encoder is not None and i == 0 else None,
        )
        for i, each in enumerate((text, packed))
    ]
    data = StepData(microbatches=tuple(microbatches), lane_digest={}, lane_target_tokens={})
    planner = BridgePlanner(layout, sharding_of(layout, False))
    crossing = plan_crossing(layout, topology.rank, planner, StepManifest(entries=tuple(entries)))
    silent = SimpleNamespace(source=None, target=None)
    meter = UsageMeter(topology=topology, vision=vision, row_bytes=10, returns=returns)
    usage = meter.measure(data, [crossing, silent])
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
    assert sum((work for work, _ in found), Work()) == Work(
        sequences=3 * layout.num_lanes,
        document_pairs=sum(triangle) * layout.num_lanes,
        patches=4 * rows,
        pieces=len(lengths),
        piece_pairs=sum(n * n for n in lengths),
        rows=rows,
    )
    # Rows to each receiver, and, where they train, gradients back to each encoder rank.
    forward = to_first + to_second
    assert sum(sent for _, sent in found) == 10 * forward * (2 if returns else 1)

"""Packed training on a blend of datasets must not depend on the layout, lane by lane."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from megatron_mimo.topology import Layout
from tests.integration.curves import assert_parity
from tests.integration.engines import beside, layout, small_runner

pytestmark = pytest.mark.slow

STEPS = 4
# Divides by 2, 3 and 4 lanes.
GLOBAL_BATCH_SIZE = 12
SEQ_LENGTH = 128
# So large that a document's share in the experts' balance shows in loss and norms.
OVERRIDES = (
    "language.pattern=ME*-ME",
    "language.moe_aux_loss_coeff=0.1",
    "language.moe_router_bias_update_rate=0.05",
    "language.ffn_hidden_size=192",
    "vision.hidden_size=64",
)
LAYOUTS = {
    "encoder dp 1, llm dp 4": beside({}, {"dp": 4}),
    "encoder dp 2, llm dp 4": beside({"dp": 2}, {"dp": 4}),
    "encoder dp 2, llm dp 3": beside({"dp": 2}, {"dp": 3}),
    "encoder dp 1, llm dp 2 pp 2": beside({}, {"dp": 2, "pp": 2}),
}

# Loss and gradient norm of each step, keys of each step's sequences by lane, and fill rates.
Found = tuple[list[list[float]], list[dict[int, list[tuple[str, ...]]]], list[float]]


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits and texts, two to one."""
    from megatron_mimo.data.reading.webdataset import prepare, write_shard
    from megatron_mimo.data.samples.digits import DigitsConfig, write_digits_dataset

    out = tmp_path_factory.mktemp("blend")
    write_digits_dataset(out / "digits", DigitsConfig(num_train=60, num_val=10, seed=5))
    random = np.random.default_rng(1)
    (out / "texts" / "train").mkdir(parents=True)
    texts = [
        (f"text-{i:03d}", {"json": json.dumps({"question": f"Say {i}", "answer": "so " * n})})
        for i, n in enumerate(random.integers(1, 30, 40).tolist())
    ]
    shard = out / "texts" / "train" / "000000.tar"
    write_shard(shard, [(key, {"json": parts["json"].encode()}) for key, parts in texts])
    prepare(out / "texts", ["train/000000.tar"])
    path = out / "blend.yaml"
    path.write_text(
        "__module__: megatron.energon\n"
        "__class__: MetadatasetV2\n"
        "splits:\n"
        "  train:\n"
        "    blend:\n"
        "      - {weight: 2, path: digits}\n"
        "      - {weight: 1, path: texts}\n",
        encoding="utf-8",
    )
    return path


def train(chosen: Layout, path: Path, num_workers: int) -> Found:
    """What this rank finds; nothing before the last stage of the language model."""
    import torch.distributed as dist

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, build_train_loader, data_role
    from megatron_mimo.data.loader.batch import StepData
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.training.step import train_step

    engine = small_runner(
        chosen,
        steps=STEPS,
        provider="nemotron-moe-vlm-tiny",
        overrides=OVERRIDES,
        seq_length=SEQ_LENGTH,
    )
    config = DataConfig(
        provider="energon",
        path=str(path),
        seed=7,
        seq_length=SEQ_LENGTH,
        global_batch_size=GLOBAL_BATCH_SIZE,
        packing_buffer_size=16,
        shuffle_buffer_size=8,
        num_workers=num_workers,
        loader_processes=0,
        inputs={
            "encoder": ImageInput(
                config=model_config("mock").part("vision").image_config(max_patches=64)
            )
        },
    )
    loader = build_train_loader(config, data_role(chosen, dist.get_rank()), ByteTokenizer())
    seen: list[StepData] = []

    class Recording:
        def next_step(self) -> StepData:
            seen.append(loader.next_step())
            return seen[-1]

    points, fills = [], []
    for step in range(STEPS):
        metrics = train_step(engine, Recording(), step + 1, GLOBAL_BATCH_SIZE)
        points.append([float(metrics.loss), metrics.update.grad_norm])
        assert metrics.packing_fill is not None
        fills.append(metrics.packing_fill)
    keys = [
        {lane: [m.keys[lane] for m in step.microbatches] for lane in step.lane_digest}
        for step in seen
    ]
    llm = engine.topology.target
    return points if llm is not None and llm.is_last_stage else [], keys, fills


@pytest.fixture(scope="module")
def one_rank(run_ranks: Callable[..., list], blend: Path) -> Callable[[int], Found]:
    """What one rank finds, whose single lane has the workers of as many lanes."""

    @cache
    def reference(lanes: int) -> Found:
        (found,) = run_ranks(1, train, layout({}, {}), blend, lanes)
        assert isinstance(found, tuple)
        return found

    return reference


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_is_that_of_one_rank(
    name: str,
    run_ranks: Callable[..., list],
    blend: Path,
    one_rank: Callable[[int], Found],
) -> None:
    chosen = LAYOUTS[name]
    lanes = chosen.target.dp
    wanted, wanted_keys, wanted_fills = one_rank(lanes)
    curves = 0
    for points, keys, fills in run_ranks(chosen.world_size, train, chosen, blend, 1):
        for step, of_step in enumerate(keys):
            for lane, sequences in of_step.items():
                assert sequences == wanted_keys[step][0][lane::lanes]
        # Every rank knows the fill rate of all lanes.
        assert fills == pytest.approx(wanted_fills, rel=1e-12)
        if points:
            curves += 1
            assert len(points) == len(wanted)
            assert_parity(wanted, points)
    assert curves == lanes


def test_sequences_are_full_and_hold_both_kinds(one_rank: Callable[[int], Found]) -> None:
    points, keys, fills = one_rank(2)
    sequences = [sequence for step in keys for sequence in step[0]]
    kinds = {tuple(sorted({key.split("-")[0] for key in sequence})) for sequence in sequences}
    assert ("text", "train") in kinds
    assert max(map(len, sequences)) > 2
    assert 0.9 < min(fills) <= 1
    losses, _ = zip(*points, strict=True)
    assert losses[-1] < losses[0]

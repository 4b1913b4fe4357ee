"""What items cost by themselves, against the operations of their packed input."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mimo.config.presets import PROVIDERS, model_config
from megatron_mimo.media.audio.clip import EncodedClip
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.model.flops import ItemCost, ModelWork, item_costs, model_flops
from megatron_mimo.modules.families import source_adapter
from megatron_mimo.modules.flops import Work
from megatron_mimo.modules.parakeet.flops import AudioWork

SIZES = ((24, 40), (64, 64), (9, 131), (133, 8), (48, 16), (200, 190), (33, 34))
ONE_SIZE = {"dynamic_resolution": False}
FROZEN: tuple[frozenset[str], ...] = (frozenset(), frozenset({"vision"}))


def picture(width: int, height: int) -> np.ndarray[Any, Any]:
    return np.zeros((height, width, 3), np.uint8)


def encoded(kind: Any, source: Any, *, with_content: bool = True) -> Any:
    item, reason = kind.encode(source, kind.examine(source), with_content=with_content)
    assert reason is None
    return item


def costs_of(
    config: ModelConfig, frozen: frozenset[str], kinds: Sequence[Any], items: Sequence[Any]
) -> int:
    cost = item_costs(config, frozen, vocab_size=96, seq_length=64)["encoder"]
    return sum(cost(kind.lengths(item), item.rows) for kind, item in zip(kinds, items, strict=True))


def flops_of(config: ModelConfig, frozen: frozenset[str], work: Work, name: str = "encoder") -> int:
    found = model_flops(config, frozen, ModelWork({name: work}), vocab_size=96, seq_length=64)
    return found.modules[name].total


@pytest.mark.parametrize("frozen", FROZEN, ids=["training", "frozen"])
@pytest.mark.parametrize(
    "settings",
    [
        {"dynamic_resolution": True, "min_patches": 4, "max_patches": 256},
        {"use_tiling": True, "max_num_tiles": 6, "img_h": 64, "img_w": 64, **ONE_SIZE},
        {"img_h": 64, "img_w": 64, **ONE_SIZE},
    ],
    ids=["sizes", "tiles", "one-size"],
)
def test_images_cost_what_their_pack_does(settings: dict[str, Any], frozen: frozenset[str]) -> None:
    config = model_config("nemotron-moe-vlm-tiny")
    module = config.sources["encoder"]
    adapter = source_adapter(module)
    kind = adapter.item_input(module, name="encoder", frozen=frozen, **settings)
    items = [encoded(kind, picture(*size)) for size in SIZES]
    packed = kind.pack(items, range(len(items)))
    outlines = [encoded(kind, picture(*size), with_content=False) for size in SIZES]
    assert [kind.lengths(item) for item in outlines] == [kind.lengths(item) for item in items]
    assert sorted(sum((kind.lengths(item) for item in items), ())) == list(packed.lengths)
    wanted = flops_of(config, frozen, adapter.work(module, packed))
    assert costs_of(config, frozen, [kind] * len(items), outlines) == wanted


def test_videos_cost_what_as_many_images_do() -> None:
    config = model_config("omni-tiny")
    name = next(name for name, module in config.sources.items() if hasattr(module, "vision"))
    module = config.sources[name]
    assert module.video is not None
    adapter = source_adapter(module)
    none = frozenset[str]()
    kind = adapter.item_input(module, name=name, frozen=none, dynamic_resolution=True)
    (videos,) = adapter.guest_inputs(module, name=name, frozen=none).values()
    image = encoded(kind, picture(64, 48))
    video = encoded(videos, np.zeros((5, 40, 56, 3), np.uint8))
    packed = kind.pack([video, image], [0, 1])
    lengths = (*videos.lengths(video), *kind.lengths(image))
    assert kind.lengths(video) == videos.lengths(video)
    assert sorted(lengths) == list(packed.lengths)
    work = adapter.work(module, packed)
    cost = item_costs(config, none, vocab_size=96, seq_length=64)[name]
    found = cost(videos.lengths(video), video.rows) + cost(kind.lengths(image), image.rows)
    assert found == flops_of(config, none, replace(work, video_patches=0), name)


def test_clips_cost_what_their_pack_does_up_to_zeros_between_them() -> None:
    config = model_config("omni-tiny")
    name = next(name for name, module in config.sources.items() if hasattr(module, "audio"))
    module = config.sources[name]
    adapter = source_adapter(module)
    kind = adapter.item_input(module, name=name, frozen=frozenset())
    rng = np.random.default_rng(3)
    items: list[EncodedClip] = [
        encoded(kind, rng.normal(0, 0.1, length).astype(np.float32))
        for length in (4000, 16000, 9000, 16123)
    ]
    packed = kind.pack(items, [0] * len(items))
    assert sorted(sum((kind.lengths(item) for item in items), ())) == list(packed.lengths)
    cost = item_costs(config, frozenset(), vocab_size=96, seq_length=64)[name]
    found = sum(cost(kind.lengths(item), item.rows) for item in items)
    # Without the distances, which a microbatch has once, and with up to a row of zeros for a clip.
    work = replace(adapter.work(module, packed), distances=0)
    zeros = len(items) * module.audio.subsampling_factor
    assert abs(found - flops_of(config, frozenset(), work, name)) <= flops_of(
        config, frozenset(), AudioWork(frames=zeros), name
    )


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava_onevision"])
def test_images_of_transformers_cost_what_their_pack_does(model_type: str, tmp_path: Path) -> None:
    from megatron_mimo.model.hf.folder import read_hf
    from megatron_mimo.weights.folder import WeightFolder
    from tests.unit_tests.media.processors.folders import save_folder

    save_folder(model_type, tmp_path)
    config = read_hf(WeightFolder(tmp_path)).model
    module = config.sources["encoder"]
    adapter = source_adapter(module)
    kind = adapter.item_input(module, name="encoder", frozen=frozenset())
    items = [encoded(kind, picture(*size)) for size in SIZES[:3]]
    packed = kind.pack(items, [0] * len(items))
    assert sum((kind.lengths(item) for item in items), ()) == packed.lengths
    wanted = flops_of(config, frozenset(), adapter.work(module, packed))
    assert costs_of(config, frozenset(), [kind] * len(items), items) == wanted


def test_attention_makes_one_large_image_dearer_than_its_parts() -> None:
    config = model_config("nemotron-moe-vlm-54l")
    cost: ItemCost = item_costs(config, frozenset(), vocab_size=96, seq_length=64)["encoder"]
    extra = config.sources["encoder"].vision.class_token_len
    whole, parts = cost((4096 + extra,), 1024), 4 * cost((1024 + extra,), 256)
    assert 1.05 * parts < whole < 2 * parts


def test_a_family_from_outside_costs_its_rows() -> None:
    from examples.mimo import readings

    PROVIDERS.pop("mock-readings", None)  # Other tests do not see it.
    config = readings.mock_readings()
    module = config.sources["readings"]
    adapter = source_adapter(module)
    cost = item_costs(config, frozenset(), vocab_size=96, seq_length=64)["readings"]
    assert cost((5,), 5) + cost((3,), 3) == flops_of(
        config, frozenset(), adapter.work_type(rows=8), "readings"
    )

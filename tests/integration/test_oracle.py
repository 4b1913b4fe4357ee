"""Training on images from a `nemotron_h_omni` folder equals transformers with torch's AdamW.

Its audio and video are left out, and carried over; `test_omni_oracle` trains them.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.engines import beside, layout

STEPS = 20
GLOBAL_BATCH_SIZE = 6
SEQ_LENGTH = 64
LR, DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-8, 1.0
WITHOUT = ("audio", "video")
# Grids of patches, of four pixels each way, of a sample's images.
GRIDS = [[(4, 4), (2, 6), (2, 2)], [], [(8, 4)], [(2, 4)], [(6, 2), (2, 2)], [(4, 8)], [(2, 2)]]
LAYOUTS = {
    "one rank": layout({}, {}),
    "llm tp 2": beside({}, {"tp": 2}),
    "llm ep 2, fan-out": beside({}, {"dp": 2, "ep": 2}),
    "llm pp 2, encoder pp 2": beside({"pp": 2}, {"pp": 2}),
    "2:3": beside({"dp": 2}, {"dp": 3}),
    "encoder tp 2, llm ep 2 tp 2": beside({"tp": 2}, {"tp": 2, "ep": 2}),
    "colocated, llm pp 2 ep 2": layout({"dp": 2}, {"pp": 2, "dp": 1}),
}


def samples() -> list[Any]:
    """Several images of several sizes, and one sample without any."""
    import numpy as np

    from megatron_mimo.data import RawSample

    random = np.random.default_rng(3)
    return [
        RawSample.asking(
            key=f"sample-{index}",
            question="<image>" * len(grids) + f"what {index}?",
            answer=f"it is {index * 7}",
            items={
                "encoder": tuple(
                    random.integers(0, 256, (4 * height, 4 * width, 3), dtype=np.uint8)
                    for height, width in grids
                )
            },
        )
        for index, grids in enumerate(GRIDS)
    ]


def encoded(config: Any) -> list[Any]:
    """The samples as tokens and pixels."""
    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.data.samples.sample import encode_sample

    return [encode_sample(raw, config, ByteTokenizer(), content=("encoder",)) for raw in samples()]


def data_config(folder: str) -> Any:
    """How samples are read."""
    from megatron_mimo.data import DataConfig
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(folder) as weights:
        vision = read_omni(weights, WITHOUT).model.part("vision")
        image = vision.image_config(min_patches=1, max_patches=0)
    return DataConfig(
        seed=7,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=GLOBAL_BATCH_SIZE,
        inputs={"encoder": ImageInput(config=image)},
    )


def oracle(folder: str, trained: str) -> list[list[float]]:
    """Plain transformers and torch, one sample after the other."""
    model = begin(folder)
    frozen = ("audio", "sound", "video")
    trains = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not any(part in name for part in frozen)
    }
    assert len(trains) > 50
    points = list(follow(model, list(trains.values()), folder))
    model.save_pretrained(trained)
    return points


def begin(folder: str) -> Any:
    """A random model of transformers, saved."""
    from megatron_mimo.data import ByteTokenizer
    from tests.unit_tests.model.omni.peer import write_omni

    model = write_omni(
        folder,
        "ME*-ME",
        vision={"num_hidden_layers": 2},
        text={"vocab_size": 384, "pad_token_id": 256},
    )
    model.config.image_token_id = model.image_token_id = ByteTokenizer().placeholder_ids["encoder"]
    model.save_pretrained(folder)
    return model


def follow(model: Any, trains: list[Any], folder: str) -> Iterator[list[float]]:
    """(loss, gradient norm) of each step of torch's AdamW, whose gradients stand until the next."""
    import torch

    from tests.unit_tests.model.omni.peer import theirs_of

    raw, ready = samples(), encoded(data_config(folder))
    matrices = [parameter for parameter in trains if parameter.dim() > 1]
    vectors = [parameter for parameter in trains if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        chosen = [(step * GLOBAL_BATCH_SIZE + i) % len(raw) for i in range(GLOBAL_BATCH_SIZE)]
        targets = {i: ready[i].target_tokens for i in set(chosen)}
        whole = sum(targets[i] for i in chosen)
        total = 0.0
        for i in chosen:
            ids = torch.from_numpy(ready[i].tokens)[None]
            labels = ids.clone()
            labels[:, ~torch.from_numpy(ready[i].targets)] = -100
            images = [
                torch.from_numpy(image).permute(2, 0, 1).float() / 255
                for image in raw[i].items.get("encoder", ())
            ]
            loss = theirs_of(model, ids, labels, images).loss * targets[i] / whole
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trains, CLIP)
        optimizer.step()
        yield [total, norm.item()]


def engine_of(
    chosen: Layout, folder: str, *, refresh: bool = True, lora: Any = None
) -> tuple[Any, Any]:
    """A rank's engine with the folder's weights, and what of it is saved."""
    import torch

    from megatron_mimo.config.model_file import read_folder
    from megatron_mimo.config.presets import changed
    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.model.config import Frozen
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.foreign import load_folder
    from megatron_mimo.training.runner import StepConfig, build_runner

    omni = read_folder("hf", folder, WITHOUT)
    assert omni is not None
    engine = build_runner(
        chosen,
        # transformers' model balances nothing while it trains.
        changed(
            omni.model,
            ["language.moe_aux_loss_coeff=0", "language.moe_router_bias_update_rate=0"],
        ),
        Frozen(),
        BuildConfig(
            params_dtype=torch.float32,
            seed=1,
            init="megatron",
            vocab_size=omni.vocab_size,
            seq_length=SEQ_LENGTH,
            sequence_parallel=True,
            lora=lora,
        ),
        AdamConfig(
            lr=LR,
            min_lr=0.0,
            weight_decay=DECAY,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            clip_grad=CLIP,
        ),
        ScheduleConfig(style="constant", warmup_samples=0, decay_samples=1000),
        StepConfig(placeholder_ids=ByteTokenizer().placeholder_ids),
        device=Device("cpu"),
    )
    parts = engine
    if not refresh:
        engine.optimizer.refresh_main_params = lambda: None  # type: ignore[method-assign]
    load_folder(parts, folder, WITHOUT)
    return engine, parts


def ours(chosen: Layout, folder: str, saved: str) -> list[list[float]]:
    """(loss, gradient norm) of each step on ranks of the last stage; saves at the end."""
    import torch.distributed as dist

    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.data import ByteTokenizer, data_role
    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from megatron_mimo.training.step import train_step

    engine, parts = engine_of(chosen, folder)
    loader = build_list_loader(
        samples(), data_config(folder), data_role(chosen, dist.get_rank()), ByteTokenizer()
    )
    points = []
    for step in range(STEPS):
        metrics = train_step(engine, loader, step + 1, GLOBAL_BATCH_SIZE)
        llm = engine.topology.target
        if llm is not None and llm.is_last_stage:
            points.append([float(metrics.loss), metrics.update.grad_norm])
    checkpoints = Checkpointer(parts, SaveConfig(root=Path(saved)), {})
    checkpoints.save(Progress(STEPS, STEPS * GLOBAL_BATCH_SIZE), {})
    return points


def exported(folder: str, saved: str, out: str) -> None:
    """Write a folder of what was saved, whatever its layout."""
    from megatron_mimo.checkpoint.checkpointer import load
    from megatron_mimo.checkpoint.config import LoadConfig
    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.model.omni.weights import save_omni
    from megatron_mimo.weights.folder import WeightFolder

    engine, parts = engine_of(layout({}, {}), folder)
    assert load(parts, LoadConfig(root=Path(saved), finetune=True)) is not None
    encoder, language = engine.model.modules.get("encoder"), engine.model.target
    with WeightFolder(folder) as source:
        save_omni(
            out,
            read_omni(source, WITHOUT),
            vision=encoder.module.vision,
            projector=encoder.module.projector,
            language=language.module.model,
            source=source,
        )


Found = tuple[Path, Path, list[list[float]]]


@pytest.fixture(scope="module")
def plain(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The folder to begin with, the trained one, and the curve between them."""
    root = tmp_path_factory.mktemp("oracle")
    (points,) = run_ranks(1, oracle, str(root / "first"), str(root / "trained"), timeout=300)
    return root / "first", root / "trained", points


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "one rank"))
def test_losses_norms_and_weights_are_those_of_transformers(
    name: str, run_ranks: Callable[..., list], plain: Found, tmp_path: Path
) -> None:
    import torch
    from safetensors import safe_open

    folder, trained, wanted = plain
    chosen, saved = LAYOUTS[name], tmp_path / "saved"
    curves = run_ranks(chosen.world_size, ours, chosen, str(folder), str(saved), timeout=120)
    assert any(curves)
    for points in filter(None, curves):
        for step, (found, expected) in enumerate(zip(points, wanted, strict=True)):
            assert found[0] == pytest.approx(expected[0], rel=1e-5), step
            assert found[1] == pytest.approx(expected[1], rel=1e-4), step
    run_ranks(1, exported, str(folder), str(saved), str(tmp_path / "out"), timeout=120)
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as mine,
        safe_open(trained / "model.safetensors", "pt") as theirs,
    ):
        assert set(mine.keys()) == set(theirs.keys())
        for key in mine.keys():
            difference = (mine.get_tensor(key) - theirs.get_tensor(key)).abs()
            if key.endswith("attn.qkv.bias"):
                # Softmax does not see a bias of all keys: its gradient is rounding noise, which
                # Adam scales up to whole steps, other ones for each order of sums.
                queries, _, values = difference.chunk(3)
                difference = torch.cat([queries, values])
            assert difference.max().item() < 1e-4, key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "nemotron_h_omni"

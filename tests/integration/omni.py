"""Steps of a whole `nemotron_h_omni` model: by transformers with torch's AdamW, and on ranks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megatron_mimo.topology import Layout, ModuleGridSpec

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 50
BATCH = 6
LENGTH = 288
LR, DECAY, BETAS, EPS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1e-5, 1.0
PATCH, FRAMES, BINS = 4, 2, 16
# Items of each sample in the order of its text: sides in patches, numbers of frames, or samples of
# a wave form. There are texts alone, and samples that lack one kind or two.
ITEMS: tuple[tuple[tuple[str, Any], ...], ...] = (
    (("image", (4, 4)), ("audio", 4000), ("video", 3), ("image", (2, 6))),
    (),
    (("audio", 2600),),
    (("video", 4),),
    (("image", (6, 2)), ("image", (2, 2))),
    (("audio", 1280), ("audio", 5000), ("image", (2, 4))),
    (("video", 1), ("audio", 2000)),
)
# Sides of a frame in patches: those that the processor would choose for it.
FRAME = (2, 4)
KINDS = {"image": "encoder", "video": "video", "audio": "audio"}


def layout(*grids: tuple[str, dict[str, int]]) -> Layout:
    """A layout whose world is as large as its grids need."""
    specs = [ModuleGridSpec(name=name, **sizes) for name, sizes in grids]
    return Layout.of(*specs, world_size=max(spec.ranks.stop for spec in specs))


def apart(encoder: dict[str, int], audio: dict[str, int], llm: dict[str, int]) -> Layout:
    """Disjoint grids, one behind the other."""
    placed, behind = [], 0
    for name, sizes in (("encoder", encoder), ("audio", audio), ("llm", llm)):
        placed.append((name, sizes | {"offset": behind}))
        behind += ModuleGridSpec(name=name, **sizes).size
    return layout(*placed)


def contents(index: int) -> list[tuple[str, Any]]:
    """The items of a sample: pixels, frames, or a wave form."""
    import numpy as np

    random = np.random.default_rng(20 + index)
    found: list[tuple[str, Any]] = []
    for kind, size in ITEMS[index]:
        if kind == "audio":
            found.append((kind, random.standard_normal(size).astype(np.float32) * 0.1))
            continue
        sides = size if kind == "image" else FRAME
        shape: tuple[int, ...] = (PATCH * sides[0], PATCH * sides[1], 3)
        shape = shape if kind == "image" else (size, *shape)
        found.append((kind, random.integers(0, 256, shape, dtype=np.uint8)))
    return found


def samples() -> list[Any]:
    """Questions with their items among the words."""
    from megatron_mimo.data import RawSample

    raw = []
    for index in range(len(ITEMS)):
        items: dict[str, tuple[Any, ...]] = {}
        question = f"{index}:"
        for kind, content in contents(index):
            question += f" <{kind}>"
            items[KINDS[kind]] = (*items.get(KINDS[kind], ()), content)
        raw.append(
            RawSample.asking(
                key=f"sample-{index}",
                question=question + "?",
                answer=f"it is {index * 7}",
                items=items,
            )
        )
    return raw


def tokenizer(separate: bool = False) -> Any:
    """Bytes, and a token for the rows of each source."""
    from megatron_mimo.data import ByteTokenizer

    return ByteTokenizer(("encoder", "audio", *(["video"] if separate else [])))


def data_config(folder: str, separate: bool = False) -> Any:
    """How samples are read; `separate` is whether videos have an encoder of their own."""
    from dataclasses import replace

    from megatron_mimo.data import DataConfig
    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.modules.families import source_adapter
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(folder) as weights:
        omni = read_omni(weights)
    assert omni.videos is not None and omni.audio is not None
    videos = replace(omni.videos, target_patches=FRAME[0] * FRAME[1])
    inputs: dict[str, Any] = {}
    model = split(omni.model) if separate else omni.model
    for name, source in model.sources.items():
        adapter = source_adapter(source)
        given: dict[str, Any] = {"name": name, "frozen": frozenset(), "videos": videos}
        images = {} if name == "audio" else {"min_patches": 1, "max_patches": 0}
        inputs[name] = adapter.item_input(source, audio=omni.audio, **given, **images)
        inputs |= adapter.guest_inputs(source, **given)
    return DataConfig(
        seed=7, seq_length=LENGTH, micro_batch_size=1, global_batch_size=BATCH, inputs=inputs
    )


def split(model: Any) -> Any:
    """A model whose videos have an encoder of their own."""
    from megatron_mimo.config.architecture import videos_apart

    return videos_apart(model)


# -- transformers ----------------------------------------------------------------------------------


def oracle(folder: str, gradients: str, trained: str, steps: int = STEPS) -> list[list[float]]:
    """(loss, gradient norm) of each step, one sample after the other.

    Args:
        folder: Path to write the model to begin with to.
        gradients: Path to write the gradients of the first step to, as if they were weights.
        trained: Path to write the trained model to.
        steps: Number of steps.
    """
    import copy

    import torch

    model = begin(folder)
    points = []
    for step, point in enumerate(follow(model, folder, steps)):
        points.append(point[:2])
        if step == 0:
            held = copy.deepcopy(model)
            for parameter, gradient in zip(held.parameters(), point[2], strict=True):
                parameter.data = gradient
            held.save_pretrained(gradients)
    model.save_pretrained(trained)
    assert torch.is_grad_enabled()
    return points


def begin(folder: str) -> Any:
    """A random model of transformers, saved."""
    import torch

    from tests.unit_tests.model.omni.peer import write_omni

    model = write_omni(
        folder,
        "ME*-ME",
        vision={"num_hidden_layers": 2},
        text={"vocab_size": 384, "pad_token_id": 256},
    )
    ids = tokenizer().placeholder_ids
    model.config.image_token_id = model.image_token_id = ids["encoder"]
    model.config.audio_token_id = model.audio_token_id = ids["audio"]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            # Far from the usual 0.02, so that every weight matters.
            if "audio" in name and parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    # It has no dropout, and running statistics.
    model.eval().save_pretrained(folder)
    return model


def follow(model: Any, folder: str, steps: int) -> Iterator[list[Any]]:
    """(loss, gradient norm, gradients before clipping) of each step of torch's AdamW."""
    import torch

    from megatron_mimo.data.samples.sample import encode_sample

    config, words = data_config(folder), tokenizer()
    ready = [encode_sample(raw, config, words, content=()) for raw in samples()]
    trains = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trains if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in trains if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    for step in range(steps):
        for parameter in trains:
            # A weight without work has the gradient zero, as in a bucket of gradients.
            parameter.grad = torch.zeros_like(parameter)
        chosen = [(step * BATCH + i) % len(ready) for i in range(BATCH)]
        whole = sum(ready[i].target_tokens for i in chosen)
        total = 0.0
        for i in chosen:
            ids = torch.from_numpy(ready[i].tokens)[None]
            labels = ids.clone()
            labels[:, ~torch.from_numpy(ready[i].targets)] = -100
            loss = loss_of(model, ids, labels, contents(i)) * ready[i].target_tokens / whole
            loss.backward()
            total += loss.item()
        gradients = [parameter.grad.clone() for parameter in trains]
        norm = torch.nn.utils.clip_grad_norm_(trains, CLIP)
        optimizer.step()
        yield [total, norm.item(), gradients]


def loss_of(
    model: Any, ids: "Tensor", labels: "Tensor", items: Sequence[tuple[str, Any]]
) -> "Tensor":
    """What transformers' model computes of a sample."""
    import torch

    seen = [
        rows for kind, content in items if kind != "audio" for rows in see(model, kind, content)
    ]
    clips = [hear(model, content) for kind, content in items if kind == "audio"]
    inputs: dict[str, Any] = {}
    if seen:
        inputs["mm_encoder_outputs"] = {"image": SimpleNamespace(pooler_output=seen)}
    if clips:
        # Clips one by one: in a batch their last rows would depend on its padding.
        model.get_audio_features = lambda *_: SimpleNamespace(pooler_output=torch.cat(clips))
        inputs["input_features"] = torch.zeros(1)
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False, **inputs).loss
    return loss


def see(model: Any, kind: str, content: Any) -> "list[Tensor]":
    """Rows [R, H] of an image, or of each group of a video's frames."""
    import torch

    vision = model.config.vision_config
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (vision.norm_mean, vision.norm_std))
    pixels = (torch.from_numpy(content).movedim(-1, -3).float() / 255 - mean) / std
    if kind == "video":
        found = model.get_video_features(pixels, return_dict=True).pooler_output
        return list(found)
    patches = torch.nn.functional.unfold(pixels[None], PATCH, stride=PATCH)[0].T
    grid = torch.tensor([[side // PATCH for side in pixels.shape[1:]]])
    return list(model.get_image_features(patches, grid, return_dict=True).pooler_output)


def hear(model: Any, wave: Any) -> "Tensor":
    """Rows [R, H] of a clip."""
    from transformers import ParakeetFeatureExtractor

    extractor = ParakeetFeatureExtractor(feature_size=BINS)
    made = extractor([wave], sampling_rate=16_000, return_tensors="pt")
    rows: Tensor = (
        type(model)
        .get_audio_features(model, made.input_features, made.attention_mask, return_dict=True)
        .pooler_output
    )
    return rows


# -- ours ------------------------------------------------------------------------------------------


def engine_of(chosen: Layout, folder: str, separate: bool = False) -> Any:
    """A rank's runner with the folder's weights."""
    import torch

    from megatron_mimo.config.model_file import read_folder
    from megatron_mimo.config.presets import changed
    from megatron_mimo.model.config import Frozen
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.training.foreign import load_folder
    from megatron_mimo.training.runner import StepConfig, build_runner

    omni = read_folder("hf", folder)
    assert omni is not None
    # transformers' model balances nothing while it trains.
    model = changed(
        omni.model, ["language.moe_aux_loss_coeff=0", "language.moe_router_bias_update_rate=0"]
    )
    runner = build_runner(
        chosen,
        split(model) if separate else model,
        Frozen(),
        BuildConfig(
            params_dtype=torch.float32,
            seed=1,
            init="megatron",
            vocab_size=omni.vocab_size,
            seq_length=LENGTH,
            sequence_parallel=True,
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
        StepConfig(placeholder_ids=tokenizer(separate).placeholder_ids),
        device=Device("cpu"),
    )
    load_folder(runner, folder)
    return runner


def loader_of(chosen: Layout, folder: str, separate: bool = False) -> Any:
    """The samples of this rank's lanes, again and again."""
    import torch.distributed as dist

    from megatron_mimo.data import data_role
    from megatron_mimo.data.loader.stream_loader import build_list_loader

    role = data_role(chosen, dist.get_rank())
    config, words = data_config(folder, separate), tokenizer(separate)
    return build_list_loader(samples(), config, role, words)


def dealt_loader_of(chosen: Layout, folder: str, runner: Any) -> Any:
    """The same samples, whose items are shared out as the layout says. Close it at the end."""
    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from tests.integration.engines import shared_loader

    config, words = data_config(folder), tokenizer()
    return shared_loader(
        chosen,
        config,
        runner,
        lambda role, dispatcher: build_list_loader(samples(), config, role, words, dispatcher),
    )


def curve(
    chosen: Layout, folder: str, saved: str | None = None, steps: int = STEPS
) -> list[list[float]]:
    """(loss, gradient norm) of each step on this rank; saves at the end."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.training.step import train_step

    runner = engine_of(chosen, folder)
    loader = dealt_loader_of(chosen, folder, runner)
    points = []
    for step in range(steps):
        metrics = train_step(runner, loader, step + 1, BATCH)
        points.append([metrics.agreed_loss, metrics.update.grad_norm])
    loader.close()
    if saved is not None:
        Checkpointer(runner, SaveConfig(root=Path(saved)), {}).save(
            Progress(steps, steps * BATCH), {}
        )
    return points


def resumed(
    chosen: Layout, folder: str, saved: str, steps: int, more: int
) -> tuple[list[list[float]], str]:
    """The curve of some more steps after those of a checkpoint, and a digest of the weights."""
    from megatron_mimo.checkpoint.checkpointer import load
    from megatron_mimo.checkpoint.config import LoadConfig
    from megatron_mimo.training.step import train_step

    runner, loader = engine_of(chosen, folder), loader_of(chosen, folder)
    assert load(runner, LoadConfig(root=Path(saved))) is not None
    for _ in range(steps):
        loader.next_step()
    points = []
    for step in range(more):
        metrics = train_step(runner, loader, steps + step + 1, BATCH)
        points.append([metrics.agreed_loss, metrics.update.grad_norm])
    return points, digest(runner)


def digest(runner: Any) -> str:
    """A hash of this rank's weights and buffers."""
    import hashlib

    found = hashlib.sha256()
    for replica in runner.model.replicas:
        for name, tensor in sorted(replica.module.state_dict().items()):
            if hasattr(tensor, "numpy"):
                found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def through(
    chosen: Layout, folder: str, steps: int, saved: str, at: int
) -> tuple[list[list[float]], str]:
    """A curve without a stop, which is saved after some steps, and a digest of the weights."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.training.step import train_step

    runner, loader = engine_of(chosen, folder), loader_of(chosen, folder)
    points = []
    for step in range(steps):
        metrics = train_step(runner, loader, step + 1, BATCH)
        points.append([metrics.agreed_loss, metrics.update.grad_norm])
        if step + 1 == at:
            checkpoints = Checkpointer(runner, SaveConfig(root=Path(saved)), {})
            checkpoints.save(Progress(at, at * BATCH), {})
    return points, digest(runner)


def exported(folder: str, saved: str, out: str) -> None:
    """Write a folder of what was saved, whatever its layout."""
    from megatron_mimo.checkpoint.checkpointer import load
    from megatron_mimo.checkpoint.config import LoadConfig
    from megatron_mimo.model.omni import read_omni
    from megatron_mimo.model.omni.weights import save_omni
    from megatron_mimo.weights.folder import WeightFolder

    runner = engine_of(layout(("encoder", {}), ("audio", {}), ("llm", {})), folder)
    assert load(runner, LoadConfig(root=Path(saved), finetune=True)) is not None
    encoder, audio, language = (
        runner.model.modules[name].module for name in ("encoder", "audio", "llm")
    )
    with WeightFolder(folder) as source:
        save_omni(
            out,
            read_omni(source),
            vision=encoder.vision,
            projector=encoder.projector,
            language=language.model,
            video=encoder.video,
            audio=audio.audio,
            audio_projector=audio.audio_projector,
            source=source,
        )


def first_gradients(chosen: Layout, folder: str, separate: bool = False) -> "dict[str, Tensor]":
    """Whole gradients of the first step of this rank's weights, by their names in the folder."""
    from megatron_mimo.model.program import MimoStep
    from megatron_mimo.optim.mimo_optimizer import finalize_gradients
    from megatron_mimo.training.step import agree

    runner = engine_of(chosen, folder, separate)
    data = loader_of(chosen, folder, separate).next_step()
    agreement = agree(runner, data, "the first step")
    for replica in runner.model.replicas:
        replica.zero_grad()
    program = MimoStep(runner.model, runner.inputs.of(data))
    plans = [runner.executor.plan(manifest) for manifest in agreement.manifests]
    runner.executor.run(program, plans, gradients=True)
    finalize_gradients(runner.model, agreement.target_tokens)
    return dict(_named(runner))


def _named(runner: Any) -> "Iterator[tuple[str, Tensor]]":
    """Gradients by the names that an export of the weights would have."""
    from megatron_mimo.weights.names import table_name
    from tests.hf.steps import summed_gradients

    entries = {
        f"{part}.{entry.ours}": (prefix, entry)
        for part, prefix, table in _tables(runner)
        for entry in table
    }
    for replica in runner.model.replicas:
        first = replica.groups.place.ep * replica.module.experts_per_rank
        for name, _, gradient in summed_gradients(replica):
            part, _, rest = name.partition(".")
            if part != "audio":  # Its layers have their numbers in their names.
                rest = table_name(getattr(replica.module, part), rest, first_expert=first)
            prefix, entry = entries[f"{part}.{rest}"]
            for theirs, tensor in zip(entry.theirs, entry.split(gradient), strict=True):
                yield prefix + theirs, tensor


def _tables(runner: Any) -> Iterator[tuple[str, str, Any]]:
    """Name of a module of a stage, beginning of its names in a folder, and its table."""
    from megatron_mimo.model.omni import parts
    from megatron_mimo.modules.hybrid import weights as hybrid
    from megatron_mimo.modules.parakeet import weights as parakeet
    from megatron_mimo.modules.radio import weights as radio

    for replica in runner.model.replicas:
        architecture = replica.module.architecture
        match replica.name:
            case "encoder" | "video":
                table = radio.name_table(architecture.vision, radio.PUBLISHED)
                yield "vision", parts.VISION, table
                yield "projector", parts.PROJECTOR, parts.projector_table()
                yield "video", parts.VIDEO, parts.video_table()
            case "audio":
                yield "audio", parts.AUDIO, parakeet.name_table(architecture.audio)
                table = parts.audio_projector_table(architecture.audio_projector)
                yield "audio_projector", parts.AUDIO_PROJECTOR, table
            case _:
                yield "model", parts.LANGUAGE, hybrid.name_table(architecture)

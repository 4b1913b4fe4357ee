"""A run begins with what megatron-core's own modules have saved, and computes what they compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.topology import Layout
from tests.harness.slices import slow_but
from tests.integration.engines import SEQ_LENGTH, beside, layout, small_runner

GLOBAL_BATCH_SIZE = 4
# Patch rows and columns of each sample's images.
GRIDS: list[list[tuple[int, int]]] = [[(4, 4), (2, 6)], [], [(8, 4)], [(6, 2), (2, 2)]]
OVERRIDES = (
    "language.pattern=ME*-ME",
    "language.moe_aux_loss_coeff=0",
    "language.moe_router_bias_update_rate=0",
    "language.ffn_hidden_size=192",
    "vision.hidden_size=64",
    "vision.patch_bias=true",
)
ONE_RANK = layout({}, {})
LAYOUTS = {
    "one rank": ONE_RANK,
    "encoder tp 2, llm tp 2": beside({"tp": 2}, {"tp": 2}),
    "llm ep 2": beside({}, {"dp": 2, "ep": 2}),
    "encoder pp 2, llm pp 2": beside({"pp": 2}, {"pp": 2}),
}
# Fused norms and stacked layers are what Megatron writes with Transformer Engine; the other is what
# its local layers write, each layer by itself.
FUSED, SEPARATE = "fused", "separate"
# Name -> what a checkpoint has beside the weights.
BESIDE = ("optimizer.state.exp_avg.vision_model.class_token", "vision_model.mask_token")


def architecture(*overrides: str) -> Any:
    """Of every module."""
    from megatron_mimo.config.presets import model_config

    return model_config("nemotron-moe-vlm-tiny", [*OVERRIDES, *overrides])


# -- megatron-core's side --------------------------------------------------------------------------


def random_weights(*modules: Any) -> None:
    """No weight stays a constant that both sides might begin with."""
    import torch

    torch.manual_seed(11)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for name, buffer in module.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.normal_(0, 0.1)
            module.eval()


def their_vision(config: Any, style: str) -> Any:
    """A `RADIOViTModel` with packed images."""
    from megatron.core.activations import fast_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.vision.radio import RADIOViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mimo.kernels.attention import SdpaCoreAttention
    from megatron_mimo.kernels.norms import TorchNorm

    # Sharded checkpoints name the first one's norms as Transformer Engine's layers do.
    spec = get_gpt_layer_local_spec() if style == FUSED else get_vit_layer_with_local_spec()
    spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    spec.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchNorm
    groups, engine = their_config(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.ffn_hidden_size,
        activation_func=fast_gelu,
        layernorm_epsilon=config.layernorm_epsilon,
        # Megatron's way to a norm after the last layer.
        mtp_num_layers=0 if style == FUSED and config.final_layernorm else None,
    )
    side = config.position_grid * config.patch_dim
    return RADIOViTModel(
        engine,
        spec,
        ln_post_impl=TorchNorm if style == SEPARATE else None,
        class_token_len=config.class_token_len,
        patch_dim=config.patch_dim,
        max_img_h=side,
        max_img_w=side,
        embedder_bias=config.patch_bias,
        dynamic_resolution=True,
        pg_collection=groups,
    )


def their_projector(config: Any, input_size: int, output_size: int) -> Any:
    """A `MultimodalProjector` whose first layer has its norm fused in front."""
    import torch
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.transformer.mlp import MLPSubmodules
    from torch import nn

    from megatron_mimo.kernels.host_layers import HostColumnParallelLinear, HostRowParallelLinear
    from megatron_mimo.modules.projector.projector import _ACTIVATIONS

    class NormedLinear(HostColumnParallelLinear):  # type: ignore[misc]
        """With the names of Transformer Engine's layer."""

        def __init__(self, input_size: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(input_size, *args, **kwargs)
            self.layer_norm_weight = nn.Parameter(torch.ones(input_size))

        def forward(self, rows: Any) -> Any:
            normed = nn.functional.rms_norm(
                rows, rows.shape[-1:], self.layer_norm_weight, config.layernorm_epsilon
            )
            return super().forward(normed)

    groups, engine = their_config(
        num_layers=1,
        hidden_size=output_size,
        num_attention_heads=1,
        ffn_hidden_size=config.ffn_hidden_size,
        add_bias_linear=config.bias,
        activation_func=_ACTIVATIONS[config.activation],
        normalization=config.normalization,
    )
    submodules = MLPSubmodules(linear_fc1=NormedLinear, linear_fc2=HostRowParallelLinear)
    return MultimodalProjector(engine, submodules, "mlp", input_size, tp_group=groups.tp)


def their_config(**settings: Any) -> tuple[Any, Any]:
    """Groups of one process and megatron-core's settings."""
    import torch

    from megatron_mimo.runtime.megatron_core import transformer_config
    from megatron_mimo.runtime.solo import solo_groups

    groups = solo_groups()
    return groups, transformer_config(
        groups, params_dtype=torch.float32, sequence_parallel=False, **settings
    )


def their_language(config: Any) -> Any:
    """A `HybridModel`."""
    import torch

    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.modules.adapter import BuildContext
    from megatron_mimo.modules.families import adapter_of
    from megatron_mimo.runtime import seed_everything
    from megatron_mimo.runtime.solo import solo_groups, solo_world

    seed_everything(3, tp_rank=0, pp_rank=0, dp_rank=0, ep_rank=0, expt_tp_rank=0)
    with solo_world():
        context = BuildContext(
            pg_collection=solo_groups(),
            params_dtype=torch.float32,
            row_width=config.hidden_size,
            vocab_size=ByteTokenizer.vocab_size,
            seq_length=SEQ_LENGTH,
        )
        return adapter_of(config).build(config, context).parts["language"]


def save(
    folder: Path, modules: dict[str, Any], *, per_layer: bool, leave_out: tuple[str, ...] = ()
) -> None:
    """A torch_dist checkpoint of sharded state dicts, with an optimizer's tensor and others."""
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        apply_factories,
    )
    from megatron.core.transformer.module import MegatronModule

    from megatron_mimo.checkpoint.sharded_files import ShardedWriter
    from megatron_mimo.runtime.solo import solo_groups

    groups = solo_groups()
    metadata = {"dp_cp_group": groups.dp_cp, "non_homogeneous_layers": per_layer}
    parts: list[Any] = [
        ShardedTensor.from_rank_offsets(name, torch.ones(3), replica_id=0) for name in BESIDE
    ]
    parts.append(ShardedObject("vision_model.decoder._extra_state", b"", (1,), (0,)))
    for prefix, module in modules.items():
        for child in module.modules():
            # Where one was given none, megatron-core looks for a global group.
            if isinstance(child, MegatronModule) and not hasattr(child, "tp_group"):
                child.tp_group = groups.tp
        described = module.sharded_state_dict(prefix=prefix, metadata=metadata)
        apply_factories(described)
        parts += nested_values(described)
    folder.mkdir(parents=True)
    present = [part for part in parts if not part.key.startswith(leave_out)]
    writer = ShardedWriter(rank=0)
    writer.describe([writer.write(present, folder)], folder)


def peer(root: str, style: str) -> dict[str, Any]:
    """Write a checkpoint of megatron-core's modules; features, rows, logits and loss of them."""
    import torch

    config = architecture()
    vision = their_vision(config.part("vision"), style)
    projector = their_projector(
        config.part("projector"),
        config.part("vision").row_size,
        config.part("language").hidden_size,
    )
    language = their_language(config.target)
    random_weights(vision, projector, language)
    modules = {
        "vision_model.": vision,
        "vision_projection.": projector,
        "language_model.": language,
    }
    save(Path(root) / "iter_0000300", modules, per_layer=style == SEPARATE)
    (Path(root) / "latest_checkpointed_iteration.txt").write_text("300")
    found: dict[str, Any] = {"features": [], "rows": [], "logits": []}
    total = targets = 0.0
    with torch.no_grad():
        for sample in encoded():
            rows = torch.empty(0, config.part("language").hidden_size)
            if sample.items:
                features = their_features(vision, sample)
                rows = projector(merged(features, sample))
                found["features"].append(torch.cat(features))
                found["rows"].append(rows)
            ids = torch.from_numpy(sample.tokens)
            logits = decoded(language, ids, rows)
            found["logits"].append(logits)
            first = len(ids) - sample.target_tokens
            loss = torch.nn.functional.cross_entropy(
                logits[first - 1 : -1], ids[first:], reduction="sum"
            )
            total, targets = total + loss.item(), targets + sample.target_tokens
    return found | {"loss": total / targets}


def their_features(vision: Any, sample: Any) -> list[Any]:
    """Of each image [patches, H], without class tokens."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    packed = packed_images(sample)
    side, grids = (
        vision.patch_dim,
        [grid for image in sample.items["encoder"] for grid in image.grids],
    )
    counts = torch.tensor([0] + [high * wide for high, wide in grids], dtype=torch.int32)
    bounds = counts.cumsum(0, dtype=torch.int32)
    tokens = vision(
        packed.patches[None],
        imgs_sizes=[(high * side, wide * side) for high, wide in grids],
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=int(counts.max()),
            max_seqlen_kv=int(counts.max()),
        ),
    )[0]
    lengths = [int(count) + vision.class_token_len for count in counts[1:]]
    return [image[vision.class_token_len :] for image in tokens.split(lengths)]


def merged(features: list[Any], sample: Any) -> Any:
    """Each 2 x 2 square of patches as a row."""
    import torch

    grids = [grid for image in sample.items["encoder"] for grid in image.grids]
    rows = []
    for image, (high, wide) in zip(features, grids, strict=True):
        squares = image.view(high // 2, 2, wide // 2, 2, -1).transpose(1, 2)
        rows.append(squares.reshape(high * wide // 4, -1))
    return torch.cat(rows)


# -- samples ---------------------------------------------------------------------------------------


def samples() -> list[Any]:
    """Several images of several sizes, and one sample without any."""
    import numpy as np

    from megatron_mimo.data import RawSample

    random = np.random.default_rng(3)
    side = architecture().part("vision").patch_dim
    return [
        RawSample.asking(
            key=f"sample-{index}",
            question="<image>" * len(grids) + f"what {index}?",
            answer=f"it is {index * 7}",
            items={
                "encoder": tuple(
                    random.integers(0, 256, (side * high, side * wide, 3), dtype=np.uint8)
                    for high, wide in grids
                )
            }
            if grids
            else {},
        )
        for index, grids in enumerate(GRIDS)
    ]


def data_config() -> Any:
    """Images as they are."""
    from megatron_mimo.data import DataConfig
    from megatron_mimo.media.images import ImageInput

    vision = architecture().part("vision")
    return DataConfig(
        seed=7,
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=GLOBAL_BATCH_SIZE,
        inputs={"encoder": ImageInput(config=vision.image_config(min_patches=1, max_patches=0))},
    )


def encoded() -> list[Any]:
    """The samples as tokens and pixels."""
    from megatron_mimo.data import ByteTokenizer
    from megatron_mimo.data.samples.sample import encode_sample

    return [
        encode_sample(raw, data_config(), ByteTokenizer(), content=("encoder",))
        for raw in samples()
    ]


def packed_images(sample: Any) -> Any:
    """What an encoder reads of a sample."""
    from megatron_mimo.media.images import pack_images

    return pack_images(sample.items["encoder"], data_config().inputs["encoder"].config)


def decoded(language: Any, ids: Any, rows: Any) -> Any:
    """Logits [S, V] of tokens with rows at the image tokens."""
    import torch

    from megatron_mimo.data import ByteTokenizer

    positions = torch.arange(len(ids))[None]
    embeddings = language.embedding(input_ids=ids[None], position_ids=positions).clone()
    embeddings[ids == ByteTokenizer().placeholder_ids["encoder"], 0] = rows
    return language(ids[None], positions, attention_mask=None, decoder_input=embeddings)[0]


# -- our side --------------------------------------------------------------------------------------


def engine_of(chosen: Layout, *, bf16: bool = False, overrides: tuple[str, ...] = ()) -> Any:
    """An engine that learns nothing, and what of it is saved."""

    engine = small_runner(
        chosen,
        lr=0.0,
        bf16=bf16,
        provider="nemotron-moe-vlm-tiny",
        overrides=(*OVERRIDES, *overrides),
    )
    return engine, engine


def step(engine: Any, chosen: Layout) -> float | None:
    """The loss of one step; None on ranks without one."""
    import torch.distributed as dist

    from megatron_mimo.data import ByteTokenizer, data_role
    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from megatron_mimo.training.step import train_step

    role = data_role(chosen, dist.get_rank())
    loader = build_list_loader(samples(), data_config(), role, ByteTokenizer())
    metrics = train_step(engine, loader, 1, GLOBAL_BATCH_SIZE)
    llm = engine.topology.target
    return float(metrics.loss) if llm is not None and llm.is_last_stage else None


def loss_of(chosen: Layout, root: str) -> float | None:
    """The loss of the first step from a checkpoint."""
    from megatron_mimo.checkpoint.foreign import load_nemotron

    engine, parts = engine_of(chosen)
    load_nemotron(parts, Path(root))
    return step(engine, chosen)


def outputs(root: str) -> tuple[dict[str, list[Any]], list[str]]:
    """Features, rows and logits, in one process, and what loading warned of."""
    import logging

    import torch

    from megatron_mimo.checkpoint.foreign import load_nemotron

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_mimo.checkpoint.foreign").addHandler(handler)
    engine, parts = engine_of(ONE_RANK)
    load_nemotron(parts, Path(root))
    logging.getLogger("megatron_mimo.checkpoint.foreign").removeHandler(handler)
    engine.model.train(False)
    encoder = engine.model.modules["encoder"].module
    language = engine.model.target.module.model
    found: dict[str, list[Any]] = {"features": [], "rows": [], "logits": []}
    with torch.no_grad():
        for sample in encoded():
            rows = torch.empty(0, language.config.hidden_size)
            if sample.items:
                packed = packed_images(sample)
                found["features"].append(encoder.vision(packed)[packed.patch_slots])
                rows = encoder(packed)
                found["rows"].append(rows)
            found["logits"].append(decoded(language, torch.from_numpy(sample.tokens), rows))
    return found, warnings


def weights(parts: Any) -> dict[str, Any]:
    """Every weight and buffer of this rank."""
    from megatron_mimo.checkpoint.tensors import local_tensors

    return {
        local.name: local.data.clone()
        for replica in parts.model.replicas
        for local in local_tensors(replica)
    }


def kept(chosen: Layout, root: str, refresh: bool) -> tuple[bool, bool]:
    """Whether a bfloat16 step without learning rate leaves the loaded weights, and main ones."""
    import torch

    from megatron_mimo.checkpoint.foreign import load_nemotron

    engine, parts = engine_of(chosen, bf16=True)
    if not refresh:
        engine.optimizer.refresh_main_params = lambda: None
    load_nemotron(parts, Path(root))
    before = weights(parts)
    states = engine.optimizer.param_states()
    mains = all(
        state.tensors["fp32_param"].equal(
            parameter.detach().view(-1)[state.start : state.stop].float()
        )
        for replica in engine.model.replicas
        for parameter in replica.module.parameters()
        if (state := states.get(parameter.data_ptr())) is not None
    )
    assert any(tensor.dtype == torch.bfloat16 for tensor in before.values())
    step(engine, chosen)
    after = weights(parts)
    return all(before[name].equal(after[name]) for name in before), mains


def write_vision(folder: str) -> Any:
    """A `RADIOViTModel` as torch's own writer saves a state dict; and its weights."""
    import torch.distributed.checkpoint as dcp

    vision = their_vision(architecture().part("vision"), SEPARATE)
    random_weights(vision)
    state = {
        f"model.vision_model.{name}": tensor
        for name, tensor in vision.state_dict().items()
        if tensor is not None and not name.endswith("_extra_state")
    }
    dcp.save(state, checkpoint_id=folder)
    return {name.removeprefix("model.vision_model."): tensor for name, tensor in state.items()}


def vision_of(path: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Features after loading the encoder alone, and this rank's weights before and after."""
    import torch

    from megatron_mimo.checkpoint.foreign import load_vision

    engine, parts = engine_of(ONE_RANK)
    before = weights(parts)
    load_vision(parts, Path(path))
    packed = packed_images(encoded()[0])
    engine.model.train(False)
    with torch.no_grad():
        features = engine.model.modules["encoder"].module.vision(packed)[packed.patch_slots]
    return features, before, weights(parts)


def refused(
    path: str, overrides: tuple[str, ...], load: str, chosen: Layout = ONE_RANK
) -> tuple[str, bool]:
    """The error of loading, and whether every weight is what it was."""
    from megatron_mimo.checkpoint import foreign

    _, parts = engine_of(chosen, overrides=overrides)
    before = weights(parts)
    with pytest.raises(ValueError) as error:
        getattr(foreign, load)(parts, Path(path))
    after = weights(parts)
    return str(error.value), all(before[name].equal(after[name]) for name in before)


def without(root: str, leave_out: tuple[str, ...]) -> None:
    """A checkpoint of an encoder that lacks something, in an iteration's folder."""
    vision = their_vision(architecture().part("vision"), FUSED)
    save(Path(root), {"vision_model.": vision}, per_layer=False, leave_out=leave_out)


def began(*flags: str) -> dict[str, Any]:
    """Weights before the first step of a run with these flags; saved, if they say so."""
    from megatron_mimo.checkpoint.progress import Progress
    from megatron_mimo.config.flags import CommandLine, parse
    from megatron_mimo.config.resolve import resolve
    from megatron_mimo.runtime import Device, RuntimeContext
    from megatron_mimo.training.setup import build_trainer

    model = ["--model-provider", "nemotron-moe-vlm-tiny"]
    for override in OVERRIDES:
        model += ["--override", override]
    config = parse([*model, *flags], CommandLine, prog="train").train
    context = RuntimeContext(rank=0, local_rank=0, world_size=1, device=Device("cpu"))
    trainer = build_trainer(resolve(config, 1), context)
    if trainer.checkpoints is not None:
        trainer.checkpoints.save(Progress(0, 0), {})
        trainer.checkpoints.close()
    return weights(trainer.runner)


# -- tests -----------------------------------------------------------------------------------------

Written = dict[str, tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def written(run_ranks: Callable[..., list], tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A root of checkpoints of each style, and what megatron-core computes."""
    found = {}
    for style in (FUSED, SEPARATE):
        root = tmp_path_factory.mktemp(style) / "root"
        (results,) = run_ranks(1, peer, str(root), style, timeout=120)
        found[style] = (root, results)
    return found


@pytest.mark.parametrize("style", [FUSED, SEPARATE])
def test_features_rows_and_logits_are_those_of_megatron_core(
    style: str, run_ranks: Callable[..., list], written: Written
) -> None:
    import torch

    root, wanted = written[style]
    ((found, warnings),) = run_ranks(1, outputs, str(root), timeout=120)
    where = f"--load-nemotron-checkpoint {root / 'iter_0000300'}"
    assert warnings == [f"1 tensors of {where} are not of this model: vision_model.mask_token"]
    for kind, tensors in found.items():
        assert len(tensors) == len(wanted[kind]) > 0
        for ours, theirs in zip(tensors, wanted[kind], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", slow_but(LAYOUTS, "one rank", "llm ep 2"))
def test_every_layout_has_their_loss(
    name: str, run_ranks: Callable[..., list], written: Written
) -> None:
    chosen = LAYOUTS[name]
    root, wanted = written[FUSED]
    losses = run_ranks(chosen.world_size, loss_of, chosen, str(root), timeout=120)
    losses = [loss for loss in losses if loss is not None]
    assert losses
    assert losses == pytest.approx([wanted["loss"]] * len(losses), rel=1e-5)


@pytest.mark.slow
def test_so_has_a_pipeline_with_layers_by_themselves(
    run_ranks: Callable[..., list], written: Written
) -> None:
    chosen = LAYOUTS["encoder pp 2, llm pp 2"]
    root, wanted = written[SEPARATE]
    losses = run_ranks(chosen.world_size, loss_of, chosen, str(root / "iter_0000300"), timeout=120)
    losses = [loss for loss in losses if loss is not None]
    assert losses == pytest.approx([wanted["loss"]] * len(losses), rel=1e-5)


@pytest.mark.slow
def test_main_parameters_are_those_of_the_checkpoint(
    run_ranks: Callable[..., list], written: Written
) -> None:
    chosen, (root, _) = beside({}, {"dp": 2, "ep": 2}), written[FUSED]
    refreshed = run_ranks(chosen.world_size, kept, chosen, str(root), True, timeout=120)
    assert refreshed == [(True, True)] * chosen.world_size
    # Without it the first step takes every weight back to where it was initialised.
    forgotten = run_ranks(chosen.world_size, kept, chosen, str(root), False, timeout=120)
    assert forgotten == [(False, False)] * chosen.world_size


@pytest.mark.slow
def test_the_vision_encoder_alone(
    run_ranks: Callable[..., list], tmp_path: Path, written: Written
) -> None:
    import torch

    plain = tmp_path / "plain"
    (state,) = run_ranks(1, write_vision, str(plain))
    for path in (plain, written[FUSED][0]):
        ((features, before, after),) = run_ranks(1, vision_of, str(path), timeout=120)
        changed = {name for name in before if not before[name].equal(after[name])}
        assert changed == {name for name in before if name.startswith("vision.")}
        if path == plain:
            assert after["vision.embedding.position"].equal(state["position_embeddings"][0])
            assert after["vision.embedding.class_token"].equal(state["class_token"])
        else:
            wanted = written[FUSED][1]["features"][0]
            torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_flags_load_what_they_name_and_a_checkpoint_of_the_run_wins(
    run_ranks: Callable[..., list], tmp_path: Path, written: Written
) -> None:
    root, saved = str(written[FUSED][0]), tmp_path / "saved"

    def begin(seed: int, *flags: str) -> dict[str, Any]:
        (found,) = run_ranks(1, began, *flags, "--seed", str(seed), timeout=120)
        return found

    def same(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
        """Modules of which every weight is the same."""
        modules = {name.split(".")[0] for name in ours}
        return modules - {name.split(".")[0] for name in ours if not ours[name].equal(theirs[name])}

    whole = {"vision", "projector", "model"}
    first = begin(1, "--load-nemotron-checkpoint", root, "--save", str(saved))
    assert same(begin(2), first) == set()
    # Our own checkpoints too, by their own names.
    assert same(begin(3, "--load-nemotron-checkpoint", str(saved)), first) == whole
    assert same(begin(4, "--load-vision-from", str(saved)), first) == {"vision"}
    resumed = begin(5, "--load", str(saved), "--finetune", "--load-vision-from", "nowhere")
    assert same(resumed, first) == whole
    shard = next((saved / "iter_0000000").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    ((message, unchanged),) = run_ranks(1, refused, str(saved), (), "load_nemotron")
    assert f"{shard} is not what was saved" in message
    assert unchanged


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "load", "expected"),
    [
        (("vision.ffn_hidden_size=256",), "load_nemotron",
         "vision_model.decoder.layers.mlp.linear_fc1.weight is [2, 512, 64], the model's is "
         "[2, 256, 64]"),
        (("language.pattern=ME*-ME*",), "load_nemotron",
         "language_model.decoder.layers.6.self_attention.linear_qkv.weight is missing"),
        (("vision.layer_scale=true",), "load_vision",
         "vision_model.decoder.layers.self_attn_bda.scale is missing"),
        (("vision.position_grid=8",), "load_vision",
         "vision_model.position_embeddings is [1, 256, 64], the model's is [1, 64, 64]"),
        (("vision.final_layernorm=false",), "load_vision",
         "vision_model.decoder.final_layernorm.weight is a norm after the last layer"),
        (("language.pattern=ME*-M",), "load_nemotron",
         "language_model.decoder.layers.5.mlp.experts.experts.linear_fc1.weight is of a layer, or"),
        (("vision.patch_bias=false",), "load_vision",
         "vision_model.embedder.bias is a bias of patches: --override vision.patch_bias=true"),
        (("projector.normalization=none",), "load_nemotron",
         "vision_projection.encoder.linear_fc1.layer_norm_weight is a norm in front: "),
        (("projector.kind=affine",), "load_nemotron",
         "vision_projection.encoder.weight is missing"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit_and_changes_nothing(
    overrides: tuple[str, ...],
    load: str,
    expected: str,
    run_ranks: Callable[..., list],
    written: Written,
) -> None:
    ((message, unchanged),) = run_ranks(1, refused, str(written[FUSED][0]), overrides, load)
    assert expected in message
    assert message.startswith("--load-") and message.endswith("nothing was loaded")
    assert unchanged


@pytest.mark.slow
def test_every_rank_refuses_what_one_lacks(
    run_ranks: Callable[..., list], written: Written
) -> None:
    chosen = LAYOUTS["encoder pp 2, llm pp 2"]
    overrides = ("projector.kind=affine",)
    found = run_ranks(
        chosen.world_size, refused, str(written[FUSED][0]), overrides, "load_nemotron", chosen
    )
    assert len({message for message, _ in found}) == 1
    assert all(unchanged for _, unchanged in found)


@pytest.mark.slow
def test_refuses_what_is_no_checkpoint(
    run_ranks: Callable[..., list], tmp_path: Path, written: Written
) -> None:
    vision, position = "vision_model.", "vision_model.position_embeddings"
    for name, leave_out in (
        ("headless", (position,)),
        ("nameless", (position, "vision_model.embedder.")),
        ("empty", (vision,)),
    ):
        run_ranks(1, without, str(tmp_path / name), leave_out)
    for path, load, expected in (
        (tmp_path, "load_nemotron", f"--load-nemotron-checkpoint {tmp_path} holds neither "),
        (tmp_path / "headless", "load_vision", f"{position} is missing"),
        (tmp_path / "nameless", "load_vision", "holds vision_model.* neither by the names of this"),
        (tmp_path / "empty", "load_vision", "holds no weights: expected model.vision_model.* or "),
        (tmp_path / "headless", "load_nemotron", "holds vision_projection.* neither by the names"),
    ):
        ((message, unchanged),) = run_ranks(1, refused, str(path), (), load)
        assert expected in message
        assert unchanged

"""Loss and every gradient of a family over Transformer Engine's layers, against host layers.

Weights are drawn by their names in the whole model, so that either kind of layers has the same
ones, vectors too.
"""

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.fused.packages import NEWEST, VERSIONS
from tests.harness.slices import slow_but

if TYPE_CHECKING:
    from torch import Tensor, nn

LENGTH, VOCAB, BATCH = 48, 96, 2
DOCUMENTS = (20, 5, 23)
PRESETS = {
    # Every kind of layer: Mamba, experts, attention, MLP.
    "hybrid": ("nemotron-moe-vlm-tiny", ("language.pattern=ME*-", "language.ffn_hidden_size=192")),
    # Small enough for an interpreter of kernels; a least step that half of the steps are at.
    "mamba": (
        "nemotron-moe-vlm-tiny",
        (
            "language.pattern=M",
            "language.hidden_size=32",
            "language.mamba_num_heads=4",
            "language.mamba_head_dim=8",
            "language.mamba_state_dim=8",
            "language.mamba_step_floor=0.01",
        ),
    ),
    "gpt": ("mock", ("language.hidden_size=64",)),
    "gpt with tied embeddings": (
        "mock",
        ("language.hidden_size=64", "language.share_embeddings_and_output_weights=true"),
    ),
    "radio": ("mock", ("vision.hidden_size=64", "vision.layer_scale=true")),
    "radio of nemotron": ("nemotron-moe-vlm-tiny", ("vision.hidden_size=64",)),
    "affine projector": (
        "mock",
        ("vision.hidden_size=64", "projector.kind=affine", "projector.normalization=RMSNorm"),
    ),
}
TEXT = ("hybrid", "mamba", "gpt", "gpt with tied embeddings")


def fill(module: "nn.Module") -> "dict[str, nn.Parameter]":
    """Draw every weight by its name in the whole model; the weights by these names."""
    import torch

    from megatron_mimo.weights.names import table_name

    named = {table_name(module, name): weight for name, weight in module.named_parameters()}
    with torch.no_grad():
        for name, weight in named.items():
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(weight.shape, generator=random)
            vector = weight.dim() == 1 or "conv1d" in name
            weight.copy_(weight + 0.1 * drawn if vector else 0.15 * drawn)
    return named


def build(preset: str, dtype: str) -> Any:
    """The module of a preset that a case is about."""
    import torch

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.modules.adapter import BuildContext
    from megatron_mimo.modules.families import adapter_of
    from megatron_mimo.runtime import seed_everything
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.topology.groups import build_topology

    provider, overrides = PRESETS[preset]
    config = model_config(provider, list(overrides))
    name = "llm" if preset in TEXT else "encoder"
    grids = [ModuleGridSpec(name=module) for module in config.modules]
    groups = build_topology(Layout.of(*grids, world_size=1)).modules[name].pg_collection
    seed_everything(1, tp_rank=0, pp_rank=0, dp_rank=0)
    architecture = config.modules[name]
    context = BuildContext(
        pg_collection=groups,
        params_dtype=getattr(torch, dtype),
        row_width=config.row_width,
        vocab_size=VOCAB,
        seq_length=LENGTH,
    )
    return adapter_of(architecture).build(architecture, context)


def text_loss(module: Any, packed: bool) -> "Tensor":
    """Weighted sum of the losses of some tokens."""
    import torch

    from megatron_mimo.kernels.packed import packed_documents

    batch = 1 if packed else BATCH
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (batch, LENGTH + 1), generator=random)
    documents, positions = None, torch.arange(LENGTH).expand(batch, -1)
    if packed:
        bounds = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0)], dtype=torch.int32)
        documents = packed_documents(bounds, DOCUMENTS)
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    losses = module(
        tokens[:, :-1].contiguous(),
        positions.contiguous(),
        None,
        None,
        None,
        tokens[:, 1:].contiguous(),
        documents,
    )
    weights = torch.rand(losses.shape, generator=random)
    # As of a microbatch among others: a gradient that is neither one nor in one piece.
    return (losses.transpose(0, 1) * weights.t()).sum()


def image_loss(module: Any) -> "Tensor":
    """Weighted sum of squares of the rows of some images."""
    import torch

    from megatron_mimo.media.images.packing import pack_patches

    config = module.architecture.vision
    grids = [(4, 4), (2, 6), (4, 4), (2, 2)]
    random = torch.Generator().manual_seed(2)
    number = sum(height * width for height, width in grids)
    patches = torch.randn(number, 3 * config.patch_dim**2, generator=random)
    rows = module(pack_patches(patches, grids, config.image_config()))
    return (rows.square() * torch.rand(rows.shape, generator=random)).sum()


def learn(preset: str, packed: bool, dtype: str) -> "tuple[float, dict[str, Tensor], list[str]]":
    """Loss, gradients by name, and classes of the layers that hold a weight."""
    module = build(preset, dtype)
    named = fill(module)
    loss = text_loss(module, packed) if preset in TEXT else image_loss(module)
    loss.backward()
    held = {
        type(layer).__name__ for layer in module.modules() if list(layer.parameters(recurse=False))
    }
    gradients = {name: w.grad.float() for name, w in named.items() if w.grad is not None}
    return float(loss.detach()), gradients, sorted(held)


CASES = [
    (preset, packed)
    for preset in PRESETS
    for packed in ([False, True] if preset in TEXT else [False])
]


def learn_all(cases: list[tuple[str, bool]], dtype: str) -> list[Any]:
    """`learn` of several cases, in one call of a rank."""
    return [learn(preset, packed, dtype) for preset, packed in cases]


def difference(found: "Tensor", wanted: "Tensor") -> float:
    """Largest difference, as a share of the largest element."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_gradients_are_those_of_host_layers(
    version: str,
    run_ranks: Callable[..., list],
    run_fused: Callable[..., list],
    subtests: pytest.Subtests,
) -> None:
    (wanted,) = run_ranks(1, learn_all, CASES, "float32")
    (found,) = run_fused(version, 1, learn_all, CASES, "float32")
    for case, ours, theirs in zip(CASES, found, wanted, strict=True):
        with subtests.test(preset=case[0], packed=case[1]):
            assert any(name.startswith("TE") for name in ours[2]), ours[2]
            compare(ours, theirs)


def compare(
    ours: tuple[float, dict[str, Any], list[str]], theirs: tuple[float, dict[str, Any], list[str]]
) -> None:
    """Require the same loss and gradients to 1e-5 of the largest element."""
    (loss, gradients, _), (host_loss, host_gradients, _) = ours, theirs
    assert loss == pytest.approx(host_loss, rel=1e-5)
    assert gradients.keys() == host_gradients.keys()
    apart = {
        name: share
        for name, gradient in gradients.items()
        if (share := difference(gradient, host_gradients[name])) > 1e-5
    }
    assert not apart, f"gradients part, as a share of their largest element: {apart}"


# Without experts: which of them a token goes to may change with the last bit.
ROUNDED = [case for case in CASES if case[0] != "hybrid"]


@pytest.mark.parametrize("version", slow_but(VERSIONS, NEWEST))
def test_bf16_is_as_near_to_fp32_as_on_a_host(
    version: str,
    run_ranks: Callable[..., list],
    run_fused: Callable[..., list],
    subtests: pytest.Subtests,
) -> None:
    (exact,) = run_ranks(1, learn_all, ROUNDED, "float32")
    (on_host,) = run_ranks(1, learn_all, ROUNDED, "bfloat16")
    (found,) = run_fused(version, 1, learn_all, ROUNDED, "bfloat16")
    for case, ours, theirs, wanted in zip(ROUNDED, found, on_host, exact, strict=True):
        with subtests.test(preset=case[0], packed=case[1]):
            assert ours[0] == pytest.approx(wanted[0], rel=2e-2)
            assert ours[1].keys() == wanted[1].keys()
            far = {
                name: (share, own)
                for name, gradient in ours[1].items()
                if (share := distance(gradient, wanted[1][name]))
                > 2 * (own := distance(theirs[1][name], wanted[1][name])) + 0.01
            }
            assert not far, f"gradients further from float32 than a host's: {far}"


def distance(found: "Tensor", wanted: "Tensor") -> float:
    """Length of the difference, as a share of the length of `wanted`."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-9))

"""Tokens from patches: gradients by finite differences, and what a forward costs."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mimo.media.images import PackedImages
from megatron_mimo.media.images.packing import pack_patches
from megatron_mimo.modules.radio.config import RadioConfig
from megatron_mimo.modules.radio.embedding import PatchEmbedding, gather_rows, interpolate

CONFIG = RadioConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    ffn_hidden_size=16,
    patch_dim=2,
    class_token_len=3,
    num_registers=1,
    position_grid=5,
)
GRIDS = [(2, 2), (4, 8), (1, 1), (3, 5)]


def packed(grids: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> PackedImages:
    total = sum(height * width for height, width in grids)
    patches = torch.randn(total, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return pack_patches(patches, grids, CONFIG.image_config(min_patches=1))


def embedding(dtype: torch.dtype) -> PatchEmbedding:
    torch.manual_seed(1)
    return PatchEmbedding(CONFIG, dtype)


def test_gradients_by_finite_differences() -> None:
    images, module = packed(GRIDS, torch.float64), embedding(torch.float64)
    parameters = dict(module.named_parameters())

    def tokens(*values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(module, given, (images,))

    assert torch.autograd.gradcheck(tokens, tuple(parameters.values()))


def test_rows_by_finite_differences() -> None:
    images = packed([(2, 2), (4, 6)], torch.float64)
    tokens = torch.randn(images.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, images.row_index, 12), (tokens,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_interpolation_in_other_precisions(dtype: torch.dtype) -> None:
    images, table = packed(GRIDS), torch.randn(25, 8)
    index, weight = images.position_index, images.position_weight
    found, wanted = interpolate(table.to(dtype), index, weight), interpolate(table, index, weight)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype is torch.float64 else 2e-2
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_buffer_takes_the_table_s_gradient(dtype: torch.dtype) -> None:
    images = packed(GRIDS)
    plain, buffered = embedding(dtype), embedding(dtype)
    # As megatron-core's DistributedDataParallel sets a parameter up.
    buffered.position.main_grad = torch.zeros(25, 8)  # type: ignore[attr-defined]
    buffered.position.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for module in (plain, buffered):
        for scale in (1, 2):
            (module(images).float() * scale).square().sum().backward()
    assert buffered.position.grad_added_to_main_grad is True  # type: ignore[attr-defined]
    found = buffered.position.main_grad  # type: ignore[attr-defined]
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 1}
    )
    torch.testing.assert_close(found, plain.position.grad.float(), **tolerance)
    assert found.dtype == torch.float32


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(grids: list[tuple[int, int]], train: bool) -> Counter[str]:
    """Operators of a forward, and a backward, of vision transformer and rows; runs on a rank."""
    from unittest import mock

    from megatron_mimo.modules.radio.vit import RadioVit
    from megatron_mimo.runtime.solo import solo_groups

    vit = RadioVit(CONFIG, solo_groups(), torch.float32)
    images = packed(grids)

    def forbidden(*_args: Any) -> Any:
        raise AssertionError("the forward asks a tensor for its values")

    with (
        torch.set_grad_enabled(train),
        mock.patch.object(torch.Tensor, "tolist", forbidden),
        mock.patch.object(torch.Tensor, "item", forbidden),
        Counted() as counted,
    ):
        rows = gather_rows(vit(images), images.row_index, 32)
        if train:
            rows.sum().backward()
    return counted.counts


@pytest.mark.parametrize("train", [False, True])
def test_operators_do_not_grow_with_images(run_ranks: Callable[..., list], train: bool) -> None:
    # Images of one size: attention on a host runs each length on its own.
    (few,) = run_ranks(1, operators, [(4, 6)] * 2, train)
    (many,) = run_ranks(1, operators, [(4, 6)] * 60, train)
    assert few == many
    assert not [name for name in many if "_local_scalar_dense" in name or "nonzero" in name]
    (mixed,) = run_ranks(1, operators, [(2, 2), (2, 4), (4, 4), (6, 2), (8, 8), (2, 10)], train)
    more = {name: mixed[name] - few[name] for name in mixed if mixed[name] != few[name]}
    attention = ("scaled_dot", "view", "transpose", "split", "cat", "detach", "narrow", "empty")
    views = ("unsqueeze", "expand", "slice", "alias", "permute", "clone")
    assert all(any(part in name for part in attention + views) for name in more), more


def test_class_tokens_can_be_absent() -> None:
    import dataclasses

    config = dataclasses.replace(CONFIG, class_token_len=0, num_registers=0)
    images = pack_patches(torch.randn(6, 12), [(2, 3)], config.image_config(min_patches=1))
    module = PatchEmbedding(config, torch.float32)
    tokens = module(images)
    position = interpolate(module.position, images.position_index, images.position_weight)
    torch.testing.assert_close(tokens, module.projection(images.patches) + position)
    tokens.sum().backward()
    assert module.class_token.grad is not None and not module.class_token.grad.numel()


def test_impossible_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="activation is 'relu': expected one of gelu, fast_gelu"):
        RadioConfig(activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_registers is 11: expected 0 to class_token_len"):
        RadioConfig(num_registers=11)

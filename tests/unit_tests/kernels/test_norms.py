"""Norms against torch's own, and the mark that sequence parallelism reads."""

import pytest

from tests.harness import RunRanks

HIDDEN = 24


def compare(normalization: str, zero_centered: bool, dtype_name: str) -> dict[str, bool]:
    """Differences from torch's module in output and gradients; marks of the parameters."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mimo.kernels.norms import TorchNorm

    dtype = getattr(torch, dtype_name)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        normalization=normalization,
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=dtype,
        use_cpu_initialization=True,
    )
    norm = TorchNorm(config=config, hidden_size=HIDDEN, eps=1e-3)
    plain = getattr(torch.nn, normalization)(HIDDEN, eps=1e-3, dtype=dtype)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            shift = torch.randn(HIDDEN, dtype=dtype)
            parameter.add_(shift)
            getattr(plain, name).copy_(parameter + (zero_centered and name == "weight"))
    x, y = (torch.linspace(-2, 3, 5 * HIDDEN, dtype=dtype).view(5, 1, HIDDEN) for _ in range(2))
    x.requires_grad_()
    y.requires_grad_()
    norm(x).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(norm(x), plain(y))
    torch.testing.assert_close(x.grad, y.grad)
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(parameter.grad, getattr(plain, name).grad)
        assert parameter.dtype == dtype
    return {name: p.sequence_parallel for name, p in norm.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_layer_norm(run_ranks: RunRanks, zero_centered: bool, dtype: str) -> None:
    marks = run_ranks(1, compare, "LayerNorm", zero_centered, dtype)
    assert marks == [{"weight": True, "bias": True}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm(run_ranks: RunRanks, zero_centered: bool, dtype: str) -> None:
    assert run_ranks(1, compare, "RMSNorm", zero_centered, dtype) == [{"weight": True}]


def unknown_norm() -> str:
    """What the error about an unknown norm says."""
    from types import SimpleNamespace

    from megatron_mimo.kernels.norms import TorchNorm

    with pytest.raises(ValueError, match="BatchNorm") as caught:
        TorchNorm(config=SimpleNamespace(normalization="BatchNorm"), hidden_size=HIDDEN)
    return str(caught.value)


def test_unknown_norm(run_ranks: RunRanks) -> None:
    assert "LayerNorm, RMSNorm" in run_ranks(1, unknown_norm)[0]

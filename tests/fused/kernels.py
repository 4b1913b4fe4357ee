"""Kernels of Transformer Engine's compiled module that our layers reach, in torch.

Arguments are those of the functions' callers in the package, by position. Each counts its calls, so
that a test can see that a layer took the fused way. Shapes: T tokens, H features.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

calls: Counter[str] = Counter()
"""Number of calls of each kernel in this process."""

_DTYPES = {
    "kByte": torch.uint8,
    "kInt32": torch.int32,
    "kFloat32": torch.float32,
    "kFloat16": torch.float16,
    "kBFloat16": torch.bfloat16,
}

KERNELS: dict[str, Callable[..., Any]] = {}
"""The functions of the compiled module by name."""


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function as a kernel of the compiled module, and count its calls."""

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        # A kernel records nothing for backward.
        with torch.no_grad():
            return function(*args, **kwargs)

    KERNELS[function.__name__] = counted
    return counted


def _torch_dtype(dtype: Any) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES[dtype.name]


def _product(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool) -> Tensor:
    """B times A as a GPU's library counts them: column by column, so the operands change places.

    Sums of half precision are taken in float32, as tensor cores do.
    """
    a, b = (x.reshape(-1, x.shape[-1]).float() for x in (a, b))
    return (b.t() if transpose_b else b) @ (a.t() if transpose_a else a)


def _store(result: Tensor, out: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(result.view_as(out))
    else:
        out.copy_(result.view_as(out))


@kernel
def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A product of matrices, with a bias in forward and the bias's gradient in backward."""
    assert quantizer is None and comm_overlap is None and not gelu and alpha == 1.0
    assert a.dtype == b.dtype, f"operands of {a.dtype} and {b.dtype}"
    result = _product(a, transpose_a, b, transpose_b)
    if not transpose_b:
        result = result.view(*b.shape[:-1], result.shape[-1])
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.reshape(-1, b.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias
    if out is None:
        out = result.to(a.dtype if out_dtype is None else _torch_dtype(out_dtype))
    else:
        _store(result, out, accumulate)
    return out, bias_gradient, None, extra_output


@kernel
def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transpose_a: bool,
    b: Sequence[Tensor],
    transpose_b: bool,
    out: Sequence[Tensor],
    out_dtype: Any,
    sizes: Sequence[int],
    bias: Sequence[Tensor],
    bias_dtype: Any,
    single_output: bool,
    pre_gelu: Sequence[Tensor],
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Sequence[Tensor]:
    """Products of several pairs of matrices, such as one of each expert."""
    assert not any(part.numel() for part in bias), "experts here have no bias"
    start = 0
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.dtype == right.dtype, f"operands of {left.dtype} and {right.dtype}"
        result = _product(left, transpose_a, right, transpose_b)
        if single_output:
            _store(result, out[0][start : start + len(result)], accumulate)
            start += len(result)
        else:
            _store(result, out[i], accumulate)
    return bias


def _scale(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + (1 if zero_centered else 0)


def _stored(value: Tensor, out: Tensor | None, dtype: Any) -> Tensor:
    value = value.to(_torch_dtype(dtype))
    return value if out is None else out.copy_(value)


@kernel
def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of [T, H]; returns means and reciprocal deviations [T] too."""
    x = x.float()
    mean = x.mean(-1)
    factor = (x.var(-1, unbiased=False) + eps).rsqrt()
    value = (x - mean[:, None]) * factor[:, None] * _scale(weight, zero_centered)
    value = value if bias is None else value + bias.float()
    return _stored(value, out, dtype), mean, factor


@kernel
def layernorm_bwd(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    factor: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input [T, H], the weight [H] and the bias [H]."""
    normal = (x.float() - mean[:, None]) * factor[:, None]
    gradient = gradient.float()
    inner = gradient * _scale(weight, zero_centered)
    average, along = (v.mean(-1, keepdim=True) for v in (inner, inner * normal))
    of_x = factor[:, None] * (inner - average - normal * along)
    of_weight, of_bias = (gradient * normal).sum(0), gradient.sum(0)
    return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)


@kernel
def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    """RMSNorm of [T, H]; returns the factors [T] too."""
    factor = (x.float().square().mean(-1) + eps).rsqrt()
    value = x.float() * factor[:, None] * _scale(weight, zero_centered)
    return _stored(value, out, dtype), None, factor


@kernel
def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, factor: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input [T, H] and the weight [H]."""
    normal = x.float() * factor[:, None]
    inner = gradient.float() * _scale(weight, zero_centered)
    of_x = factor[:, None] * (inner - normal * (inner * normal).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (gradient.float() * normal).sum(0).to(weight.dtype)


@kernel
def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    decoupled: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One update of Adam; `step` is 1 in the first one."""
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, weight, exp_avg, exp_avg_sq in zip(*lists, strict=True):
        gradient = gradient.float()
        if not decoupled:
            gradient = gradient + weight_decay * weight
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        change = (exp_avg / first) / ((exp_avg_sq / second).sqrt() + eps)
        if decoupled:
            change = change + weight_decay * weight
        weight.sub_(lr * change)


@kernel
def multi_tensor_scale(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Copy tensors to others, scaled; says in `overflow` whether one is not finite."""
    for source, target in zip(*lists, strict=True):
        if not bool(torch.isfinite(source).all()):
            overflow.fill_(1)
        target.copy_(source.float() * scale)


@kernel
def multi_tensor_scale_tensor(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], scale: Tensor
) -> None:
    """`multi_tensor_scale` with a factor on the device, float32 [1]."""
    KERNELS["multi_tensor_scale"](chunk_size, overflow, lists, scale)


@kernel
def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    """Norm of all tensors together, float32 [1]."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


@kernel
def get_num_cublas_streams() -> int:
    """Number of streams, for each of which a workspace is made."""
    return 1


@kernel
def get_cublasLt_version() -> int:  # noqa: N802 (the module's name)
    """Version of CUDA 12.9's library."""
    return 120900


@kernel
def get_cudnn_version() -> int:
    """Version of cuDNN 9.13."""
    return 91300

"""Low-rank adapters of linear layers (LoRA, Hu et al. 2021), sharded as the layer is.

An adapter adds `scale * B A x` to what a layer computes of x. It goes by the marks of the layer's
weight, so that megatron-core's layers, Transformer Engine's and shards of torch's are one case.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn

from megatron_mimo.weights.shards import full_shape, sharded_axis, take_shard

_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "partition_sizes")
_OUTPUTS, _INPUTS = 0, 1


class LoraAdapter(nn.Module):
    """Adapter of one linear layer, which adds what it computes; its weights are not the layer's.

    Where ranks share the layer's outputs, each holds A and its rows of B; where they share the
    inputs, its columns of A, and B. Only products with A travel, `rank` numbers for each position.

    A layer that holds several of another program's, such as queries, keys and values, has an A for
    each of them, one below the other, and each row of B multiplies the A of its own part: so the
    adapters of the separate layers are the same numbers.

    Args:
        layer: Linear layer, with a weight [out, in] that is this rank's shard. It is called with
            its inputs [..., in] first, and returns its output [..., out], or a tuple that begins
            with it.
        rank: Rank r of the product.
        scale: Factor of the product.
        dropout: Share of the inputs that are zeroed in training.
        tp_group: Group of the ranks that share the layer.
        row_parts: Part of each row of the whole weight, int64 [out]; None for one part.
    """

    mask: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        *,
        rank: int,
        scale: float,
        dropout: float,
        tp_group: dist.ProcessGroup,
        row_parts: Tensor | None = None,
    ) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.num_parts = 1 if row_parts is None else int(row_parts.max()) + 1
        self._group = tp_group
        self._axis = sharded_axis(weight) if tp_group.size() > 1 else None
        self._sequence = bool(getattr(layer, "sequence_parallel", False)) and self._axis is not None
        self._gathers = bool(getattr(layer, "gather_output", False)) and self._axis == _OUTPUTS
        outputs, inputs = weight.shape
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.zeros(self.num_parts * rank, inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, **like))
        self._mark(weight)
        self.fan_in = full_shape(self.lora_A, tp_group.size())[1]
        mask = None
        if row_parts is not None:
            place = {"tp_rank": tp_group.rank(), "tp_size": tp_group.size()}
            held = take_shard(row_parts[:, None], self.lora_B, **place)
            mask = (held == torch.arange(self.num_parts)).to(**like).repeat_interleave(rank, dim=1)
        self.register_buffer("mask", mask, persistent=False)
        self._layer = _Beside(layer)
        behind_norm = hasattr(layer, "return_layernorm_output")
        if behind_norm:
            # Transformer Engine's layer that begins with a norm: the adapter's inputs are behind.
            layer.return_layernorm_output = True  # type: ignore[assignment]
        self._handle = layer.register_forward_hook(
            partial(_add_behind_norm if behind_norm else _add, self)
        )

    def _mark(self, weight: Tensor) -> None:
        """Marks of megatron-core: what is sharded, and what ranks have sums of parts of."""
        sharded, copied = self.lora_B, self.lora_A
        if self._axis == _INPUTS:
            sharded, copied = copied, sharded
        if self._axis is not None:
            for name in _MARKS:
                if hasattr(weight, name):
                    setattr(sharded, name, getattr(weight, name))
        if self._sequence:
            # Each rank has the gradient of its positions alone.
            copied.sequence_parallel = True  # type: ignore[attr-defined]

    def forward(self, inputs: Tensor) -> Tensor:
        """What is added to the layer's output [..., out], from its inputs [..., in]."""
        products = F.linear(self._dropped(inputs), self.lora_A)
        if self._axis == _OUTPUTS:
            products = (
                gather_from_sequence_parallel_region(products, group=self._group)
                if self._sequence
                else copy_to_tensor_model_parallel_region(products, group=self._group)
            )
        elif self._axis == _INPUTS:
            products = (
                reduce_scatter_to_sequence_parallel_region(products, group=self._group)
                if self._sequence
                else reduce_from_tensor_model_parallel_region(products, group=self._group)
            )
        added: Tensor = F.linear(products * self.scale, self._spread())
        if self._gathers:
            added = gather_from_tensor_model_parallel_region(added, group=self._group)
        return added

    def merge(self) -> None:
        """Add the product to the layer's weight, and no longer to its output.

        The layer is whole in this process.
        """
        weight: Any = self._layer.found.weight
        weight.copy_(weight.float() + self.scale * (self._spread().float() @ self.lora_A.float()))
        self._handle.remove()
        if hasattr(self._layer.found, "return_layernorm_output"):
            self._layer.found.return_layernorm_output = False  # type: ignore[assignment]

    def _spread(self) -> Tensor:
        """B [out, parts * r], where a row has zeros beside its own part."""
        return (
            self.lora_B if self.mask is None else self.lora_B.repeat(1, self.num_parts) * self.mask
        )

    def _dropped(self, inputs: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return inputs
        if self._axis == _INPUTS or self._sequence:
            # Ranks hold different inputs, so that each draws for itself.
            with get_cuda_rng_tracker().fork():
                return F.dropout(inputs, self.dropout)
        return F.dropout(inputs, self.dropout)


def _add(adapter: LoraAdapter, _layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    added = adapter(inputs[0])
    if isinstance(output, tuple):
        return (output[0] + added, *output[1:])
    return output + added


def _add_behind_norm(
    adapter: LoraAdapter, _layer: nn.Module, _inputs: tuple[Any, ...], output: Any
) -> Any:
    # megatron-core returns (output, bias), where bias is None unless the caller has to add it.
    flat = [*output[0], output[1]] if isinstance(output[0], tuple) else list(output)
    tensors = [tensor for tensor in flat if tensor is not None]
    found, *bias, normed = tensors
    return found + adapter(normed), bias[0] if bias else None


def embeddings_need_gradients(module: nn.Module) -> None:
    """Let gradients reach the first layers of a module whose embeddings do not train.

    Recomputed layers have gradients only where their inputs have some.

    Args:
        module: Module with embeddings, such as a stage of a language model.
    """
    for child in module.modules():
        if isinstance(child, VocabParallelEmbedding | nn.Embedding):
            child.register_forward_hook(_with_gradient)


def _with_gradient(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


class _Beside:
    """Keeps a module out of the modules of another that knows it."""

    def __init__(self, found: nn.Module) -> None:
        self.found = found

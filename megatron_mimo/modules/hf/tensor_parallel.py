"""Tensor parallelism by transformers' plans, with plain shards that DDP and optimizers take.

transformers applies its plans with DTensors, which megatron-core's DDP does not take. Here a plan
only says which layers are divided how: weights become plain parameters with megatron-core's marks,
and the inputs and outputs of these layers pass through its autograd functions. The head stays
divided over the vocabulary, so that no rank ever has the logits of all tokens of it.

Plans are checked with the flags, before megatron-core may be imported: its functions are imported
where layers are divided.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mimo.modules.hf.cut import HEAD, LANGUAGE, Absent, Received
from megatron_mimo.modules.hf.family import PLAN_HELP, Family

Plan = Mapping[str, str]
"""Path of a module or weight, with `*` for numbers -> name of a style of transformers."""

_LOCAL = ("colwise", "packed_colwise", "fused_qkv_colwise")
# Number of layers of equal size that lie end to end in a weight, each of which is divided.
_FUSED = {"packed_colwise": 2, "fused_qkv_colwise": 3}


def language_plan(model: Any, family: Family) -> Plan:
    """The plan of a language model: transformers' own, what it leaves out, and a divided head."""
    found = {path: style for path, style in (model.tp_plan or {}).items() if LANGUAGE in path}
    return {
        **found,
        **family.plan,
        f"{LANGUAGE}.embed_tokens": "embedding_rowwise",
        HEAD: "colwise",
    }


def tower_plan(model: Any, family: Family) -> Plan:
    """The plan of an encoder."""
    found = {path: style for path, style in (model.tp_plan or {}).items() if family.tower in path}
    return {**found, **family.tower_plan}


def check_division(model: nn.Module, plan: Plan, size: int, *, num_experts: int = 0) -> None:
    """Refuse a tensor-parallel size that `divide` would refuse.

    Args:
        model: Model or stage with shapes alone.
        plan: Styles of its layers.
        size: Tensor-parallel size.
        num_experts: Number of experts of a layer; 0 without any.

    Raises:
        ValueError: A weight would silently be wrong or copied, or does not divide; names it.
    """
    if size == 1:
        return
    styles = dict(_styles(model, plan))
    _require_covered(model, styles, max(num_experts, 1))
    for path, style in styles.items():
        for weight in _weights(model, path):
            whole = model.get_parameter(weight)
            axis = _axis(whole, weight.rpartition(".")[2], style)
            if axis is not None and whole.size(axis) % (_FUSED.get(style, 1) * size):
                raise ValueError(
                    f"{weight}: {whole.size(axis)} does not divide by a tensor-parallel size of "
                    f"{size}: choose another"
                )


def divide(model: nn.Module, plan: Plan, group: dist.ProcessGroup, *, num_experts: int = 0) -> None:
    """Keep this rank's shards of a model without memory, and divide the layers' computation.

    Args:
        model: Model or stage with shapes alone.
        plan: Styles of its layers.
        group: Tensor-parallel group.
        num_experts: Number of experts of a layer; 0 without any.

    Raises:
        ValueError: A weight would silently be wrong or copied, or does not divide; names it.
    """
    if group.size() == 1:
        return
    check_division(model, plan, group.size(), num_experts=num_experts)
    done: dict[int, nn.Parameter] = {}
    for path, style in dict(_styles(model, plan)).items():
        for weight in _weights(model, path):
            _shard(model, weight, style, group, done)
        if not _is_weight(model, path):
            _INSTALL[style](model.get_submodule(path), group)


def divide_heads(model: nn.Module, path: str, group: dist.ProcessGroup) -> None:
    """Let attention layers count this rank's heads, where they do not read them from shapes.

    Args:
        model: Divided model.
        path: Path of the layers, with `*` for numbers; "" for none.
        group: Tensor-parallel group.
    """
    pattern = _pattern(path)
    for name, module in model.named_modules():
        if path and pattern.match(name):
            heads: Any = module.num_heads
            module.num_heads = heads // group.size()


def _styles(model: nn.Module, plan: Plan) -> Iterator[tuple[str, str]]:
    """Path in the model -> its style, of what the model holds."""
    patterns = [(_pattern(path), style) for path, style in plan.items()]
    held = {name for name, module in model.named_modules() if not _elsewhere(module)}
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for path in sorted(held | weights):
        for pattern, style in patterns:
            if pattern.match(path):
                if style not in _INSTALL:
                    raise ValueError(
                        f"{path}: its style of tensor parallelism {style} is not supported; "
                        f"{PLAN_HELP}"
                    )
                yield path, style


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\*", r"\d+") + "$")


def _weights(model: nn.Module, path: str) -> list[str]:
    """The weight of a path, or those of the module there."""
    if _is_weight(model, path):
        return [path]
    module = model.get_submodule(path)
    return [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]


def _elsewhere(module: nn.Module) -> bool:
    return isinstance(module, Absent | Received)


def _is_weight(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return name in model.get_submodule(owner)._parameters


def _require_covered(model: nn.Module, styles: Plan, few: int) -> None:
    """Refuse weights beside divided ones that no style covers, and layers that stay whole.

    What stands in one module with layers whose outputs are divided reads divided inputs, so that
    its gradient is a part on each rank. A linear layer outside of them would be copied.
    """
    divided = {path.rpartition(".")[0] for path, style in styles.items() if style in _LOCAL}
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    covered = {
        weight for weight in weights if weight in styles or weight.rpartition(".")[0] in styles
    }
    for weight in sorted(weights - covered):
        owner = weight.rpartition(".")[0]
        beside = any(owner == path or owner.startswith(f"{path}.") for path in divided if path)
        layer: Any = model.get_submodule(owner)
        in_layers = re.search(r"\.(layers|blocks)\.\d+\.", weight) is not None
        # A router, or the gate of a shared expert, is small and chooses the same on every rank.
        whole = in_layers and isinstance(layer, nn.Linear) and layer.out_features > few
        if beside or whole:
            raise ValueError(
                f"{weight} has no style in the plan of tensor parallelism that transformers has "
                f"for this model, and its gradient would be wrong, or its layer copied: {PLAN_HELP}"
            )


def _shard(
    model: nn.Module,
    path: str,
    style: str,
    group: dist.ProcessGroup,
    done: dict[int, nn.Parameter],
) -> None:
    """Replace a weight by this rank's shard, once, also where two layers share it."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    whole = module._parameters[name]
    if whole is None:
        return
    if id(whole) in done:
        module._parameters[name] = done[id(whole)]
        return
    if any(whole is made for made in done.values()):
        return
    axis = _axis(whole, name, style)
    if axis is None:
        return
    stride = _FUSED.get(style, 1)
    pieces = [
        part.chunk(group.size(), axis)[group.rank()] for part in whole.data.chunk(stride, axis)
    ]
    shard: Any = nn.Parameter(torch.cat(pieces, axis), requires_grad=whole.requires_grad)
    vars(shard).update(vars(whole))
    shard.tensor_model_parallel, shard.partition_dim = True, axis
    shard.partition_stride = stride
    done[id(whole)] = shard
    module._parameters[name] = shard


def _axis(weight: Tensor, name: str, style: str) -> int | None:
    if style in (*_LOCAL, "colwise_gather_output"):
        return max(weight.dim() - 2, 0)
    if style == "rowwise":
        return None if name == "bias" else weight.dim() - 1
    return 0 if style == "embedding_rowwise" else None


def _copied(tensor: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The tensor [...]; its gradient is the sum of those of the ranks."""
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    result: Tensor = copy_to_tensor_model_parallel_region(tensor, group=group)
    return result


def _whole(part: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The parts [..., n] of all ranks side by side."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    result: Tensor = gather_from_tensor_model_parallel_region(part, group=group)
    return result


def _sum(part: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The sum of the tensors [...] of all ranks."""
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    result: Tensor = reduce_from_tensor_model_parallel_region(part, group=group)
    return result


def _colwise(module: nn.Module, group: dist.ProcessGroup) -> None:
    forward = module.forward

    def divided(hidden: Tensor) -> Tensor:
        return forward(_copied(hidden, group=group))  # type: ignore[no-any-return]

    module.forward = divided


def _gathered(module: nn.Module, group: dist.ProcessGroup) -> None:
    forward = module.forward
    # As megatron-core's layers say it; an adapter beside the layer reads it.
    module.gather_output = True  # type: ignore[assignment]

    def divided(hidden: Tensor) -> Tensor:
        part = forward(_copied(hidden, group=group))
        whole: Tensor = _whole(part, group=group)
        return whole

    module.forward = divided


def _rowwise(module: Any, group: dist.ProcessGroup) -> None:
    def divided(hidden: Tensor) -> Tensor:
        part = nn.functional.linear(hidden, module.weight)
        whole: Tensor = _sum(part, group=group)
        return whole if module.bias is None else whole + module.bias

    module.forward = divided


def _embedding(module: Any, group: dist.ProcessGroup) -> None:
    forward = module.forward
    own = module.num_embeddings // group.size()
    first = group.rank() * own
    # transformers' padding token has no gradient, as torch's embeddings have it.
    padding = module.padding_idx
    mine = padding is not None and first <= padding < first + own
    module.padding_idx = padding - first if mine else None

    def divided(tokens: Tensor) -> Tensor:
        held = (tokens >= first) & (tokens < first + own)
        part = forward(torch.where(held, tokens - first, 0)) * held[..., None]
        whole: Tensor = _sum(part, group=group)
        return whole

    module.forward = divided


def _summed_gradient(module: nn.Module, group: dist.ProcessGroup) -> None:
    """A weight that each rank uses for its own heads: its gradient is the sum of theirs."""

    def summed(gradient: Tensor) -> Tensor:
        whole = gradient.clone()
        dist.all_reduce(whole, group=group)
        return whole

    module._summed_gradient = summed  # type: ignore[assignment]


def _experts(module: nn.Module, group: dist.ProcessGroup) -> None:
    forward = module.forward

    def divided(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        tokens = _copied(hidden, group=group)
        shares = _copied(weights, group=group)
        part = forward(tokens, chosen, shares)
        whole: Tensor = _sum(part, group=group)
        return whole

    module.forward = divided


def hook_gradients(model: nn.Module) -> None:
    """Begin to sum the gradients of weights that tensor-parallel ranks share.

    Args:
        model: Divided model, with memory: a hook stays with its tensor.
    """
    for module in model.modules():
        summed: Callable[[Tensor], Tensor] | None = vars(module).get("_summed_gradient")
        if summed is not None:
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.register_hook(summed)


_INSTALL: Mapping[str, Callable[[Any, dist.ProcessGroup], None]] = {
    "colwise": _colwise,
    "packed_colwise": _colwise,
    "fused_qkv_colwise": _colwise,
    "colwise_gather_output": _gathered,
    "rowwise": _rowwise,
    "embedding_rowwise": _embedding,
    "replicated_with_grad_allreduce": _summed_gradient,
    "moe_tp_experts": _experts,
}

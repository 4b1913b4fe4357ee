"""A model of transformers cut to what one rank holds; its own forward still runs.

The layers stay in a list of full length: those of other stages are identities, so that every layer
has the number by which the model chooses its mask, its rotary embedding and its name.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mimo.modules.hf.config import HfLanguageConfig, whole_config
from megatron_mimo.modules.hf.family import Family

LANGUAGE = "model.language_model"
HEAD = "lm_head"
EMBEDDING_WEIGHT = f"{LANGUAGE}.embed_tokens.weight"
HEAD_WEIGHT = f"{HEAD}.weight"


class Absent(nn.Module):
    """A layer or norm of another stage: passes its input on."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """The hidden states [B, S, H] as they are."""
        return hidden


class Received(nn.Module):
    """The hidden states of the previous stage, in the place of the embedding of tokens.

    Attributes:
        hidden: Hidden states [B, S, H] of the microbatch that runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        """The hidden states [B, S, H], whatever the tokens int64 [B, S] are."""
        assert self.hidden is not None
        return self.hidden


def meta_model(description: str) -> Any:
    """The whole model with shapes and without memory, in float32."""
    import transformers

    from megatron_mimo.modules.hf.config import family_from

    kind = getattr(transformers, family_from(description).model_class)
    with torch.device("meta"):
        return kind._from_config(
            # Models keep their configuration, and change it.
            deepcopy(whole_config(description)),
            dtype=torch.float32,
        )


def is_tied(model: Any) -> bool:
    """Whether the output layer is the embedding, as the model's configuration says.

    The tensors themselves do not say it: a shard or a copy on another stage is another tensor.
    """
    return HEAD_WEIGHT in model.get_expanded_tied_weights_keys(all_submodels=True)


def language_stage(model: Any, family: Family, first: int, last: int) -> Any:
    """Cut a model in place to layers [first, last) of its language model.

    Args:
        model: The whole model.
        family: Record of its family.
        first: Number of the first layer of the stage.
        last: Number after its last layer.

    Returns:
        The model.
    """
    language = model.get_submodule(LANGUAGE)
    number = len(language.layers)
    for layer in range(number):
        if not first <= layer < last:
            language.layers[layer] = Absent()
    for name, child in list(model.model.named_children()):
        if child is not language:
            setattr(model.model, name, None)
    for name, _ in list(model.model.named_parameters(recurse=False)):
        setattr(model.model, name, None)
    if first > 0:
        language.embed_tokens = Received()
    if last < number:
        language.norm = Absent()
        setattr(model, HEAD, Absent())
    return model


def encoder_only(model: Any, family: Family) -> Any:
    """Cut a model in place to its encoder of images and projector.

    Args:
        model: The whole model.
        family: Record of its family.

    Returns:
        The model; an encoder of sound, which nothing here trains, is not in it either.
    """
    kept = {path.split(".")[1] for path in (family.tower, *family.projector)}
    for name, _ in list(model.model.named_children()):
        if name not in kept:
            setattr(model.model, name, None)
    setattr(model, HEAD, None)
    return model


def materialise(model: nn.Module, device: torch.device | None = None) -> None:
    """Give memory to a model without any, with its constant buffers; weights are undefined.

    Args:
        model: Model whose parameters and buffers are on the meta device.
        device: Device of the memory; None for torch's default.
    """
    device = device or torch.get_default_device()
    # A tied weight counts twice here: its memory is made twice.
    weights = model.named_parameters(remove_duplicate=False)
    marks = {name: vars(parameter).copy() for name, parameter in weights}
    model.to_empty(device=device)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        vars(parameter).update(marks[name])
        # Their initialisation would take time, and the folder has them anyway.
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    # On torch's default device, as everywhere: a GPU rounds rotary frequencies in another way.
    with torch.no_grad():
        _compute_buffers(model, model)


def _compute_buffers(module: nn.Module, owner: Any) -> None:
    """Let transformers compute the buffers that no folder has, such as rotary frequencies."""
    for child in module.children():
        _compute_buffers(child, child if hasattr(child, "_init_weights") else owner)
    if module._buffers:
        owner._init_weights(module)


def stage_bounds(
    config: HfLanguageConfig, stages: int, costs: list[float], head: float
) -> list[int]:
    """First layer of each pipeline stage, and the number of layers.

    Args:
        config: Architecture of the language model.
        stages: Number of stages.
        costs: Work of each layer, in any unit.
        head: Work of the output layer, which the last stage has in addition.

    Returns:
        `stages + 1` ascending numbers; the largest work of a stage is as small as possible.
    """
    if len(config.stage_layers) == stages:
        bounds = [0]
        for size in config.stage_layers:
            bounds.append(bounds[-1] + size)
        return bounds
    least = config.row_parts - 1
    number = len(costs)
    # work[k][i]: smallest largest work of k stages that hold the first i layers.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(1, stages + 1):
        row: dict[int, tuple[float, int]] = {}
        for end in range(stage, number - (stages - stage) + 1):
            for begin, (largest, _) in best[-1].items():
                if begin >= end or (stage == 1 and end < least):
                    continue
                own = sum(costs[begin:end]) + (head if end == number else 0.0)
                found = max(largest, own)
                if end not in row or found < row[end][0]:
                    row[end] = (found, begin)
        best.append(row)
    bounds = [number]
    for stage in range(stages, 0, -1):
        bounds.append(best[stage][bounds[-1]][1])
    return bounds[::-1]

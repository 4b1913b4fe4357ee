"""Folders of tiny models in the forms that were published, and stages filled from them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.hf.models import build

if TYPE_CHECKING:
    from torch import Tensor


def _as_they_are(weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    return weights


def _before_5(weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Names from before transformers 5, as LLaVA and its like were published."""
    changes = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    found = {}
    for name, tensor in weights.items():
        for new, old in changes.items():
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        else:
            name = name.removeprefix("model.")
        found[name] = tensor
    return found


def _by_expert(weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Experts in tensors of their own, as Qwen's were published."""
    found = {}
    for name, tensor in weights.items():
        owner, _, kind = name.rpartition(".")
        if not owner.endswith(".experts"):
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            if kind == "down_proj":
                found[f"{owner}.{number}.down_proj.weight"] = expert.clone()
            else:
                gate, up = expert.chunk(2)
                found[f"{owner}.{number}.gate_proj.weight"] = gate.clone()
                found[f"{owner}.{number}.up_proj.weight"] = up.clone()
    return found


def _transposed(weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Experts with input and output exchanged, as Qwen3-VL's were published."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in weights.items()
    }


def _with_more_layers(weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Layers that predict further tokens, which the model does not read."""
    return weights | {"mtp.fc.weight": weights["model.language_model.norm.weight"].clone()}


def _with_head(weights: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """A tied head beside the embedding."""
    embedding = weights["model.language_model.embed_tokens.weight"]
    return weights | {"lm_head.weight": embedding.clone()}


FORMS: Mapping[str, tuple[str, Callable[..., Any] | None]] = {
    "gemma4, by transformers": ("gemma4", None),
    "gemma4 moe, by transformers": ("gemma4 moe", None),
    "gemma4 with sound, by transformers": ("gemma4 with sound", None),
    "llava_onevision, by transformers": ("llava_onevision", None),
    "llava_onevision, old names": ("llava_onevision", _before_5),
    "mistral3, by transformers": ("mistral3", None),
    "mistral3, old names": ("mistral3", _before_5),
    "mistral3, new names": ("mistral3", _as_they_are),
    "qwen3_5, by transformers": ("qwen3_5", None),
    "qwen3_5, with more layers": ("qwen3_5", _with_more_layers),
    "qwen3_5 moe, by transformers": ("qwen3_5 moe", None),
    "qwen3_5 moe, by expert": ("qwen3_5 moe", _by_expert),
    "qwen3_5 moe, new names": ("qwen3_5 moe", _as_they_are),
    "qwen3_vl, by transformers": ("qwen3_vl", None),
    "qwen3_vl, with a tied head": ("qwen3_vl", _with_head),
    "qwen3_vl moe, by transformers": ("qwen3_vl moe", None),
    "qwen3_vl moe, transposed": ("qwen3_vl moe", _transposed),
    "qwen3_vl moe, new names": ("qwen3_vl moe", _as_they_are),
}
"""Family and form of a folder -> its model, and how its weights are written; None for
`save_pretrained`."""


def write(form: str, folder: Path, *, dtype: str = "float32") -> None:
    """Write a folder of a form."""
    import torch

    from megatron_mimo.weights.folder import write_folder

    name, change = FORMS[form]
    family, _, sound = name.partition(" with ")
    model = build(family, **({"sound": True} if sound else {})).to(getattr(torch, dtype))
    if change is None:
        # Several files, and an index of them.
        model.save_pretrained(folder, max_shard_size="100KB")
        return
    tied = set(model.get_expanded_tied_weights_keys(all_submodels=True))
    weights = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    config = model.config.to_dict() | {"dtype": dtype}
    write_folder(folder, config, change(weights), file_bytes=100_000)


def stage_of(folder: Path, module: str, places: Mapping[str, tuple[int, int]]) -> Any:
    """A stage of a folder's model on paper groups, without its weights."""
    import torch

    from megatron_mimo.config.model_file import read_folder
    from megatron_mimo.modules.adapter import BuildContext
    from megatron_mimo.modules.families import adapter_of
    from megatron_mimo.modules.language import ExecutionConfig
    from megatron_mimo.runtime.solo import paper_groups, solo_world

    found = read_folder("hf", str(folder))
    assert found is not None
    config = found.model.modules[module]
    context = BuildContext(
        pg_collection=paper_groups(places),
        params_dtype=torch.float32 if found.dtype is None else getattr(torch, found.dtype),
        frozen=frozenset(),
        row_width=found.model.row_width,
        vocab_size=found.vocab_size,
        seq_length=64,
        execution=ExecutionConfig(),
        initialize=False,
    )
    with solo_world():
        return adapter_of(config).build(config, context)


def filled(folder: Path, module: str, places: Mapping[str, tuple[int, int]]) -> Any:
    """The same with its weights."""
    from megatron_mimo.modules.hf.config import describe
    from megatron_mimo.modules.hf.weights import fill
    from megatron_mimo.weights.folder import WeightFolder

    stage = stage_of(folder, module, places)
    one = (0, 1)
    with WeightFolder(folder) as weights:
        fill(
            stage.model,
            weights,
            describe(weights.config),
            tp=places.get("tp", one),
            ep=places.get("ep", one),
        )
    return stage

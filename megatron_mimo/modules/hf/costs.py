"""Work of the layers of a model of transformers, from the shapes of its weights."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from megatron_mimo.modules.hf.config import HfLanguageConfig
from megatron_mimo.modules.hf.cut import HEAD, LANGUAGE, meta_model
from megatron_mimo.modules.hf.experts import expert_layers


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer of a language model computes for a token.

    Attributes:
        weights: Number of weights that a token is multiplied with.
        attention: Sum of the widths of all heads of attention over earlier tokens; 0 without.
        window: Number of tokens that attention reaches back; None for all.
        state: Number of elements of the state of linear attention; 0 without.
    """

    weights: int
    attention: int = 0
    window: int | None = None
    state: int = 0

    def pairs(self, pairs: int, tokens: int) -> int:
        """Number of pairs of positions that attention computes.

        Args:
            pairs: Number of pairs of positions of one document.
            tokens: Number of tokens.
        """
        return pairs if self.window is None else min(pairs, tokens * self.window)

    def cost(self, seq_length: int) -> float:
        """Number of multiply-adds for a token of a full sequence."""
        reach = min(seq_length / 2, self.window or seq_length)
        return self.weights + 2 * reach * self.attention + 3 * self.state


def shape_of(layer: nn.Module, text: Any) -> LayerShape:
    """The shape of a decoder layer of a model without memory."""
    experts = expert_layers(layer)
    held = {id(parameter) for _, module in experts for parameter in module.parameters()}
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2 and id(p) not in held)
    names = ("num_experts_per_tok", "top_k_experts")
    chosen = next((int(found) for name in names if (found := getattr(text, name, None))), 0)
    for _, module in experts:
        whole = sum(parameter.numel() for parameter in module.parameters())
        weights += whole * chosen // int(module.num_experts)  # type: ignore[arg-type]
    attention: Any = getattr(layer, "self_attn", None)
    linear: Any = getattr(layer, "linear_attn", None)
    state = 0 if linear is None else linear.num_v_heads * linear.head_k_dim * linear.head_v_dim
    if attention is None:
        return LayerShape(weights, state=state)
    sliding = getattr(attention, "is_sliding", False) or getattr(attention, "sliding_window", None)
    window = getattr(text, "sliding_window", None) if sliding else None
    return LayerShape(weights, attention.o_proj.in_features, window, state)


@cache
def layer_shapes(description: str) -> tuple[LayerShape, ...]:
    """Shape of every layer of a model's language model."""
    model = meta_model(description)
    text = model.config.get_text_config()
    return tuple(shape_of(layer, text) for layer in model.get_submodule(LANGUAGE).layers)


@cache
def linear_shapes(description: str) -> dict[str, tuple[int, int]]:
    """Linear layers of the decoder's layers: path in the model -> widths of input and output.

    Experts behind a router, and the router, are not among them.
    """
    model = meta_model(description)
    few = max(int(getattr(model.config.get_text_config(), "num_experts", None) or 0), 1)
    return {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if path.startswith(f"{LANGUAGE}.layers.")
        and isinstance(module, nn.Linear)
        and module.out_features > few
        and "experts" not in path.split(".")
    }


def layer_costs(model: Any, config: HfLanguageConfig, seq_length: int) -> list[float]:
    """Multiply-adds of every layer for a token, of a whole model without memory."""
    shapes = (shape_of(layer, config.text) for layer in model.get_submodule(LANGUAGE).layers)
    return [shape.cost(seq_length) for shape in shapes]


def head_cost(model: Any) -> float:
    """Multiply-adds of the output layer for a token."""
    return float(model.get_submodule(HEAD).weight.numel())

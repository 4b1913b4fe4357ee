"""Architecture of the projector."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """Architecture of `Projector`.

    Attributes:
        kind: "mlp" has two linear layers, "affine" one.
        normalization: In front, or "none".
        activation: Between the layers of an MLP.
        ffn_hidden_size: Width inside the MLP.
        bias: Of the linear layers.
        layernorm_epsilon: Of the norm.
        init_method_std: Standard deviation of the initial weights.
    """

    kind: Literal["mlp", "affine"] = "mlp"
    normalization: Literal["RMSNorm", "LayerNorm", "none"] = "RMSNorm"
    activation: Literal["squared_relu", "gelu"] = "squared_relu"
    ffn_hidden_size: int = 20480
    bias: bool = False
    layernorm_epsilon: float = 1e-5
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        known = {
            "kind": ("mlp", "affine"),
            "normalization": ("RMSNorm", "LayerNorm", "none"),
            "activation": ("squared_relu", "gelu"),
        }
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ValueError(
                    f"projector {field} {getattr(self, field)!r}: expected one of "
                    f"{', '.join(values)}"
                )

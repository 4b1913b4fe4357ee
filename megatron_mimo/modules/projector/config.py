"""Architecture of the projector."""

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_mimo.settings import MoreThan, Within, check_fields
from megatron_mimo.settings.ranges import MOST_WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """Architecture of `Projector`.

    Attributes:
        kind: Kind of projector: "mlp" has two linear layers, "affine" one.
        normalization: Norm before the layers, or "none".
        activation: Activation between the layers of an MLP.
        ffn_hidden_size: Width inside the MLP.
        bias: Whether the linear layers have a bias.
        layernorm_epsilon: Epsilon of the norm.
        init_method_std: Standard deviation of the initial weights.
    """

    kind: Literal["mlp", "affine"] = "mlp"
    normalization: Literal["RMSNorm", "LayerNorm", "none"] = "RMSNorm"
    activation: Literal["squared_relu", "gelu"] = "squared_relu"
    ffn_hidden_size: Annotated[int, Within(1, MOST_WIDTH)] = 20480
    bias: bool = False
    layernorm_epsilon: Annotated[float, Within(1e-20, 1)] = 1e-5
    init_method_std: Annotated[float, MoreThan(0, 100)] = 0.02

    def __post_init__(self) -> None:
        check_fields(self)

"""The encoder of a model of transformers, with what maps its output to rows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from megatron_mimo.modules.adapter import BuildContext
from megatron_mimo.modules.hf.config import HfEncoderConfig
from megatron_mimo.modules.hf.cut import encoder_only, materialise, meta_model
from megatron_mimo.modules.hf.dtypes import cast
from megatron_mimo.modules.hf.rows import in_order, rows_of
from megatron_mimo.modules.hf.tensor_parallel import (
    divide,
    divide_heads,
    hook_gradients,
    tower_plan,
)
from megatron_mimo.modules.stage import ModuleStage
from megatron_mimo.runtime.megatron_core import transformer_config
from megatron_mimo.weights.initial import Draw

VISION, PROJECTOR = "vision", "projector"


class HfEncoder(ModuleStage):
    """The whole encoder and projector: the model's own `get_image_features`.

    Args:
        architecture: Architecture of both parts.
        context: Groups and settings of the run.

    Raises:
        ValueError: The encoder cannot be divided so; the message names what stands in the way.
    """

    def __init__(self, architecture: HfEncoderConfig, context: BuildContext) -> None:
        vision, pg = architecture.vision, context.pg_collection
        super().__init__(
            config=transformer_config(
                pg,
                params_dtype=context.params_dtype,
                sequence_parallel=False,
                num_layers=vision.num_layers,
                hidden_size=vision.hidden_size,
                num_attention_heads=vision.num_attention_heads,
            )
        )
        self.architecture = architecture
        self._dtype = context.params_dtype
        model = meta_model(vision.description)
        plan = tower_plan(model, architecture.family)
        model = encoder_only(model, architecture.family)
        divide(model, plan, pg.tp)
        divide_heads(model, architecture.family.tower_heads, pg.tp)
        cast(model, vision.wide, context.params_dtype)
        materialise(model)
        self.model = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.part_of(name) not in context.frozen)
        hook_gradients(model)

    def part_of(self, name: str) -> str:
        """The part that a parameter of the model belongs to, from its name."""
        paths = self.architecture.family.projector
        mine = any(name == path or name.startswith(f"{path}.") for path in paths)
        return PROJECTOR if mine else VISION

    @property
    def parts(self) -> Mapping[str, nn.Module | None]:
        """The vision encoder, and what maps its output to rows."""
        model: Any = self.model
        projector = nn.ModuleList(
            model.get_submodule(path)
            for path in self.architecture.family.projector
            if _is_module(model, path)
        )
        held = {id(parameter) for parameter in projector.parameters()}
        tower = nn.ParameterList(
            parameter for parameter in model.parameters() if id(parameter) not in held
        )
        return {VISION: tower, PROJECTOR: projector}

    def initial(self, name: str) -> Draw | None:
        """None: all weights are read from the folder."""
        return None

    def forward(self, images: Any, hidden: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            images: Packed images, a `ProcessedImages`, on this rank's device.
            hidden: None: there is one stage.

        Returns:
            Rows [R, parts * H of the language model], in the dtype of the run.
        """
        arguments = {
            name: tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            for name, tensor in zip(images.names, images.tensors, strict=True)
        }
        rows = rows_of(self.model.model.get_image_features(**arguments, return_dict=True))
        return in_order(rows, images.rows, images.places).to(self._dtype)


def _is_module(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return name in model.get_submodule(owner)._modules

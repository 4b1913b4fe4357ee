"""How long each stage's forward and backward take in a drawing, in the user's unit."""

from dataclasses import dataclass

from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.modules.families import adapter_of
from megatron_mimo.schedule.actions import Action, Kind
from megatron_mimo.topology import Layout

# Of a backward: as many operations for the gradients of inputs as for those of weights.
_WITHOUT_WEIGHTS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Times of the passes of each module.

    Attributes:
        forward: Time of a forward of a stage, by module.
        backward: Time of a backward of a stage, by module; 0 where only a projection trains.
    """

    forward: dict[str, float]
    backward: dict[str, float]

    def of(self, action: Action) -> float:
        """Time of a forward or a backward."""
        times = self.backward if action.kind is Kind.BACKWARD else self.forward
        return times[action.module]


def pass_costs(
    layout: Layout,
    architecture: ModelConfig,
    frozen: Frozen,
    *,
    source: float,
    target: float,
    backward: float,
) -> Costs:
    """Times of the passes of each module, less what frozen parts do not compute.

    A frozen language model computes gradients of its inputs alone, half of a backward. A source
    whose only part that trains is a projection runs the backward of that alone, which is short: it
    counts as nothing.

    Args:
        layout: The grids of all modules.
        architecture: Architecture of every module.
        frozen: Names of the parts that do not train.
        source: Time of a forward of a source's stage.
        target: Time of a forward of a language-model stage.
        backward: Time of a backward in which all parts train, in forwards.
    """
    forward = {name: source for name in layout.modules} | {layout.target.name: target}
    share = dict.fromkeys(layout.modules, 1.0)
    if not architecture.trains(layout.target.name, frozen):
        share[layout.target.name] = _WITHOUT_WEIGHTS
    for grid in layout.sources:
        config = architecture.modules[grid.name]
        if not adapter_of(config).trains_inside(config, architecture.frozen_in(grid.name, frozen)):
            share[grid.name] = 0.0
    return Costs(
        forward=forward,
        backward={name: time * backward * share[name] for name, time in forward.items()},
    )

"""The state of a rank that training changes and a checkpoint holds."""

from dataclasses import dataclass

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mimo.model.mimo import MimoModel
from megatron_mimo.optim.mimo_optimizer import MimoOptimizer
from megatron_mimo.topology.groups import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """The state of this rank that a checkpoint holds.

    Attributes:
        topology: Grids and groups of this rank.
        model: The modules of this rank.
        optimizer: Optimizer over the modules.
        scheduler: Schedule of the learning rate.
    """

    topology: Topology
    model: MimoModel
    optimizer: MimoOptimizer
    scheduler: OptimizerParamScheduler

"""What the dry run of one role found, as its process tells it."""

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSize:
    """What a rank holds of one module.

    Attributes:
        name: Name of the module.
        parameters: Number of its parameters on this rank, those that are frozen too.
        weights: Bytes of them, with the padding of buckets.
        gradients: Bytes of the buffers that gradients are summed in.
        optimizer: Bytes of this rank's part of the optimizer's state after a step: main weights
            and moments.
    """

    name: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """Messages of one operation in one group, in a step.

    Attributes:
        group: Name of the group: "llm dp_cp".
        size: Number of its ranks.
        operation: The operation: "all-reduce".
        messages: Number of them.
        bytes: Bytes of the tensors handed in; of an operation with an input and an output, of the
            larger.
    """

    group: str
    size: int
    operation: str
    messages: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """The first error of a role.

    Attributes:
        where: What was being done: "building the model", "llm forward 0".
        reason: The error in one line.
        traceback: Where it was raised.
    """

    where: str
    reason: str
    traceback: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Result of a role's process.

    Attributes:
        modules: What the rank holds; empty where building it failed.
        activations: Largest number of bytes that a step holds beside weights, gradients and
            optimizer state, in forward and backward.
        exchanges: Messages of the microbatches that were run and of the update, by group and
            operation.
        samples: One line on what a sequence holds.
        microbatches: Number of microbatches that were run.
        step_microbatches: Number of those of a step of the run.
        fault: The first error; None where everything ran.
    """

    modules: tuple[ModuleSize, ...] = ()
    activations: int = 0
    exchanges: tuple[Exchange, ...] = ()
    samples: str = ""
    microbatches: int = 0
    step_microbatches: int = 0
    fault: Fault | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The outcome that `to_json` was called on."""
        fault = data["fault"]
        return cls(
            **data
            | {
                "modules": tuple(ModuleSize(**module) for module in data["modules"]),
                "exchanges": tuple(Exchange(**exchange) for exchange in data["exchanges"]),
                "fault": None if fault is None else Fault(**fault),
            }
        )

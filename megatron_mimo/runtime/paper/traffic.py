"""What a paper rank would exchange with its peers, and whether the sizes agree."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup

# Names of torch's operators, without their ending, by what they do.
_WORDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "reduce_scatter_": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
    "barrier": "barrier",
}
# Of these, every input and output differ by the size of the group.
_GATHERS = ("_allgather_base_", "allgather_into_tensor_coalesced_")
_SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_")
_BARRIER = "barrier"


@dataclass(slots=True)
class Sent:
    """Messages of one operation in one group.

    Attributes:
        messages: Number of them; of a coalesced call, of its tensors.
        bytes: Bytes of the tensors that were handed in; of an operation with an input and an
            output, of the larger. Groups of this rank alone do not count.
    """

    messages: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Traffic:
    """Everything that a paper rank exchanged.

    Attributes:
        sent: (torch's name of the group, operation in words) -> messages.
        groups: Torch's name of a group -> its description, and its number of ranks.
    """

    sent: dict[tuple[str, str], Sent] = field(default_factory=dict)
    groups: dict[str, tuple[str, int]] = field(default_factory=dict)

    def record(self, operator: str, args: Sequence[Any]) -> None:
        """Add a call of one of torch's `c10d` operators.

        Args:
            operator: Name of the operator, such as "allreduce_".
            args: Its arguments.

        Raises:
            RuntimeError: Input and output do not fit each other and the group, which a backend that
                sends would refuse; the message names the group.
        """
        group = _group(args)
        if group.size() == 1:  # Nothing leaves the rank.
            return
        # The first argument is a tensor or several, or a number of lists of them; of operations
        # with an input and an output the output, and the second argument is the input.
        first, second = (_tensors(args[k]) if len(args) > k else [] for k in (0, 1))
        _check(operator, first, second, group)
        self.groups[group.group_name] = (group.group_desc, group.size())
        entry = self.sent.setdefault((group.group_name, _WORDS.get(operator, operator)), Sent())
        entry.messages += len(args[0]) if "coalesced" in operator else 1
        if operator != _BARRIER:
            entry.bytes += max(_bytes(first), _bytes(second))


def _group(args: Sequence[Any]) -> ProcessGroup:
    for argument in args:
        if type(argument).__name__ == "ScriptObject":
            return ProcessGroup.unbox(argument)
    raise AssertionError(args)


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, list | tuple):
        return [tensor for part in argument for tensor in _tensors(part)]
    return []


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check(
    operator: str,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    group: ProcessGroup,
) -> None:
    """Refuse tensors that a backend which sends would refuse."""
    size = group.size()
    for output, input_ in zip(outputs, inputs, strict=False):
        if operator in _GATHERS:
            small, large = input_.numel(), output.numel()
        elif operator in _SCATTERS:
            small, large = output.numel(), input_.numel()
        else:
            continue
        if large != small * size:
            raise RuntimeError(
                f"{_WORDS[operator]} between {size} ranks of group {group.group_desc}: "
                f"{large} elements on one side and {small} on the other, expected {small * size}"
            )

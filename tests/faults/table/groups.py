"""Faults of process groups: nothing is wrong over gloo, and a run over NCCL hangs or stalls."""

from tests.faults.fault import Fault

GROUPS = (
    Fault(
        "group-begins-with-a-barrier",
        "topology/groups.py",
        "dist.all_reduce(torch.zeros(1, device=self._device.torch), group=mine)",
        "dist.barrier(group=mine)",
        "The first operation of a boundary's group need not make NCCL's communicator, so messages "
        "between some of its ranks do: strict groups alone show it, with a bridge or pp > 1.",
    ),
    Fault(
        "group-begins-with-messages",
        "topology/groups.py",
        "if has_messages and backend != HOST_BACKEND:",
        "if has_messages and backend == HOST_BACKEND:",
        "As group-begins-with-a-barrier, with nothing in the place of the reduction.",
    ),
    Fault(
        "both-directions-in-one-group",
        "topology/groups.py",
        "return BoundaryGroups(forward=forward, backward=backward)",
        "return BoundaryGroups(forward=forward, backward=forward)",
        "Receives of gradients that were posted early hold up sends of rows behind them, until "
        "both ends of a boundary wait for each other: strict groups alone show it.",
    ),
    Fault(
        "objects-among-tensors-of-the-device",
        "optim/mimo_optimizer.py",
        "with world_is(replica.groups.stage_hosts):",
        "with world_is(replica.groups.pg_collection.tp_dp_cp):",
        "Parameter groups are agreed on over NCCL, in tensors that are copied to the device and "
        "back: strict groups alone show it, with a stage of several ranks.",
    ),
)

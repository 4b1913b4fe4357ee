"""Open the boundaries that a rank takes part in; they exist for the whole run."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from megatron_mimo.bridge.boundary import Boundary
from megatron_mimo.bridge.check import CheckConfig, CheckedChannel, ViewOf
from megatron_mimo.bridge.transport import Channel
from megatron_mimo.topology.groups import BoundaryGroups, Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportConfig:
    """Properties of all transfers between stages, equal on every rank.

    Attributes:
        row_width: Width of a row.
        hidden_widths: Module name -> width of the hidden states between its stages; that of a row
            where it is absent.
        dtype: Dtype of rows, hidden states and gradients.
        device: Device of the tensors.
        check: Whether both ends compare sample keys and checksums of every transfer over a bridge.
    """

    row_width: int
    hidden_widths: Mapping[str, int] = field(default_factory=dict)
    dtype: torch.dtype
    device: torch.device
    check: bool = False


def open_bridges(topology: Topology, config: TransportConfig) -> dict[str, Boundary]:
    """Source name -> the bridge along its edge, for the edges with an end on this rank."""
    names = [source.name for source in topology.layout.sources]
    return {
        name: _bridge(topology, config, name, number=names.index(name), count=len(names))
        for name in topology.bridges
    }


def open_pipelines(topology: Topology, config: TransportConfig) -> dict[str, tuple[Boundary, ...]]:
    """Module name -> boundaries between its stages, in the order of `Topology.pipelines`."""
    return {
        name: tuple(_between_stages(topology, config, name, groups) for groups in pair)
        for name, pair in topology.pipelines.items()
    }


def begin_check(bridge: Boundary, view: ViewOf) -> None:
    """Give checked channels what this rank expects of the step's messages."""
    for channel in (bridge.forward, bridge.backward):
        if isinstance(channel, CheckedChannel):
            channel.begin(view)


def _between_stages(
    topology: Topology, config: TransportConfig, module: str, groups: BoundaryGroups
) -> Boundary:
    width = config.hidden_widths.get(module, config.row_width)
    forward, backward = (
        Channel(
            name,
            group,
            rank=topology.rank,
            width=width,
            dtype=config.dtype,
            device=config.device,
        )
        for name, group in (
            (f"hidden states of the {module}", groups.forward),
            (f"gradients of hidden states of the {module}", groups.backward),
        )
    )
    return Boundary(forward=forward, backward=backward)


def _bridge(
    topology: Topology, config: TransportConfig, source: str, *, number: int, count: int
) -> Boundary:
    """The bridge along one of `count` edges."""
    groups = topology.bridges[source]
    receivers, senders = _peers(topology, source)
    # Each direction of each bridge has two tags of its own for its announcements.
    forward, backward = (
        _bridge_channel(
            name,
            group,
            topology,
            config,
            CheckConfig(
                control=topology.control,
                tag=4 * number + tag,
                stride=4 * count,
                receivers=to,
                senders=of,
                describe=topology.layout.describe_rank,
            ),
        )
        for name, group, tag, to, of in (
            (f"rows of the {source}", groups.forward, 0, receivers, senders),
            (f"gradients of rows of the {source}", groups.backward, 2, senders, receivers),
        )
    )
    return Boundary(forward=forward, backward=backward)


def _bridge_channel(
    name: str,
    group: torch.distributed.ProcessGroup,
    topology: Topology,
    config: TransportConfig,
    check: CheckConfig,
) -> Channel:
    kind = (
        (lambda *args, **rest: CheckedChannel(*args, config=check, **rest))
        if config.check
        else Channel
    )
    return kind(
        name,
        group,
        rank=topology.rank,
        width=config.row_width,
        dtype=config.dtype,
        device=config.device,
    )


def _peers(topology: Topology, source: str) -> tuple[dict[int, int], dict[int, int]]:
    """Rank -> lane of the ranks that this one may send a source's rows to, and receive from."""
    layout, rank = topology.layout, topology.rank
    producer, user = topology.modules.get(source), topology.target
    receivers: dict[int, int] = {}
    senders: dict[int, int] = {}
    if producer is not None and producer.is_last_stage:
        for lane in layout.reached(source, producer.place.dp):
            receivers |= dict.fromkeys(layout.users(lane), lane)
    if user is not None and user.is_first_stage:
        for dp in layout.runners(source, user.place.dp):
            senders |= dict.fromkeys(layout.producers(source, dp), user.place.dp)
    for peers in (receivers, senders):
        peers.pop(rank, None)
    return receivers, senders

"""The channels of every boundary that a rank takes part in; they outlive the steps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mimo.bridge.check import CheckConfig, CheckedChannel, ViewOf
from megatron_mimo.bridge.transport import Channel
from megatron_mimo.schedule.actions import GradientFlow, Module
from megatron_mimo.schedule.boundary import Channels
from megatron_mimo.topology import SequenceSharding
from megatron_mimo.topology.groups import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryConfig:
    """What crosses between stages, the same on every rank.

    Attributes:
        sharding: Which positions of a sequence each rank of the language model holds.
        row_width: H of the language model: elements of a row, and of its hidden states.
        encoder_width: Elements of the encoder's hidden states between its stages.
        dtype: Of all of them.
        device: Where they live.
        flow: Where gradients go back.
        language_trains: Whether the language model has anything to train.
        run_ahead: Microbatches that the encoder may be ahead of the language model.
        check: Compare sample keys and checksums of all that crosses the bridge.
    """

    sharding: SequenceSharding
    row_width: int
    encoder_width: int
    dtype: torch.dtype
    device: torch.device
    flow: GradientFlow
    language_trains: bool
    run_ahead: int = 1
    check: bool = False


def bridge_channels(topology: Topology, config: BoundaryConfig) -> Channels:
    """Both directions between the modules."""
    if not config.check:
        return Channels(
            forward=_channel("rows", topology.bridge.forward, topology, config),
            backward=_channel("gradients of rows", topology.bridge.backward, topology, config),
        )
    lanes, encoders = _bridge_peers(topology)
    return Channels(
        forward=_checked(
            "rows", topology.bridge.forward, topology, config, tag=0, to=lanes, of=encoders
        ),
        backward=_checked(
            "gradients of rows",
            topology.bridge.backward,
            topology,
            config,
            tag=2,
            to=encoders,
            of=lanes,
        ),
    )


def pipeline_channels(
    topology: Topology, config: BoundaryConfig
) -> dict[str, tuple[Channels, ...]]:
    """Module name -> channels between its stages; `Topology.pipelines` says which is whose."""
    widths = {Module.ENCODER: config.encoder_width, Module.LLM: config.row_width}
    return {
        name: tuple(
            Channels(
                forward=_channel(
                    f"hidden states of the {name}",
                    groups.forward,
                    topology,
                    config,
                    widths[Module(name)],
                ),
                backward=_channel(
                    f"gradients of hidden states of the {name}",
                    groups.backward,
                    topology,
                    config,
                    widths[Module(name)],
                ),
            )
            for groups in pair
        )
        for name, pair in topology.pipelines.items()
    }


def begin_check(bridge: Channels, view: ViewOf) -> None:
    """Tell checked channels what this rank believes of the step's messages."""
    for channel in (bridge.forward, bridge.backward):
        if isinstance(channel, CheckedChannel):
            channel.begin(view)


def _channel(
    name: str,
    group: dist.ProcessGroup,
    topology: Topology,
    config: BoundaryConfig,
    width: int | None = None,
) -> Channel:
    return Channel(
        name,
        group,
        rank=topology.rank,
        width=width or config.row_width,
        dtype=config.dtype,
        device=config.device,
    )


def _checked(
    name: str,
    group: dist.ProcessGroup,
    topology: Topology,
    config: BoundaryConfig,
    *,
    tag: int,
    to: Mapping[int, int],
    of: Mapping[int, int],
) -> CheckedChannel:
    return CheckedChannel(
        name,
        group,
        config=CheckConfig(
            control=topology.control,
            tag=tag,
            receivers=to,
            senders=of,
            describe=topology.layout.describe_rank,
        ),
        rank=topology.rank,
        width=config.row_width,
        dtype=config.dtype,
        device=config.device,
    )


def _bridge_peers(topology: Topology) -> tuple[dict[int, int], dict[int, int]]:
    """Rank -> lane of the ranks that this one, as an encoder, may send to; and the other way."""
    layout, rank = topology.layout, topology.rank
    encoder, llm = topology.encoder, topology.llm
    lanes: dict[int, int] = {}
    encoders: dict[int, int] = {}
    if encoder is not None and encoder.is_last_stage:
        for lane in layout.served(encoder.place.dp):
            lanes |= dict.fromkeys(layout.llm.stage_ranks(dp=lane, pp=0), lane)
    if llm is not None and llm.is_first_stage and layout.encoder is not None:
        for dp in layout.serving(llm.place.dp):
            last = layout.encoder.pp - 1
            encoders |= dict.fromkeys(layout.encoder.stage_ranks(dp=dp, pp=last), llm.place.dp)
    for peers in (lanes, encoders):
        peers.pop(rank, None)
    return lanes, encoders

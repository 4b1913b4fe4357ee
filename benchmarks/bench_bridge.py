"""Round trips of rows and gradients over the bridge: ours against megatron-core's.

Ours is what the executor does at the bridge in training, its actions in their order, without the
model between; the peer is megatron-core's `BridgeCommunicator`, unmodified. Both carry the same
rows between the same grids, and both know their peers ahead:

- *plain*: a microbatch's rows go forward and its gradients back before the next one starts;
- *1f1b*: eight microbatches; our encoder runs ahead by three more, the peer's cannot.

Messages and bytes are counted while one step runs, and must equal the plan's and the lower bound.

    python benchmarks/bench_bridge.py [--smoke | --quick] [--json FILE]
"""

from collections.abc import Callable, Iterator
from typing import Any

from benchlib.ranks import gloo_for_nccl, in_turns, run_ranks
from benchlib.report import Row, Size, run_benchmark

MICROBATCHES = 8
RUN_AHEAD = 3
# Of the peer's time, in 1F1B order.
TARGETS = {16: 0.33, 4096: 0.5}
# Encoder dp, llm dp, llm tp, and whether the sequence is sharded over it.
LAYOUTS = [
    (encoder_dp, llm_dp, tp, sharded)
    for encoder_dp, llm_dp in ((1, 4), (2, 2), (4, 1))
    for tp, sharded in ((1, False), (2, False), (2, True))
]
QUICK = [(1, 4, 1, False), (2, 2, 1, False), (2, 2, 2, False), (2, 2, 2, True)]
# Layouts, and sizes of what one encoder rank and one lane exchange: rows, and their width.
CASES: dict[Size, tuple[list[tuple[int, int, int, bool]], list[tuple[int, int]]]] = {
    "smoke": ([(1, 2, 1, False)], [(16, 256)]),
    "quick": (QUICK, [(16, 256), (4096, 256)]),
    "full": (LAYOUTS, [(rows, width) for rows in (16, 256, 4096) for width in (256, 2688)]),
}


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case.

    Raises:
        RuntimeError: Ours did not send exactly what it must.
    """
    layouts, sizes = CASES[size]
    for encoder_dp, llm_dp, tp, sharded in layouts:
        given = {
            "encoder_dp": encoder_dp,
            "llm_dp": llm_dp,
            "tp": tp,
            "sharded": sharded,
            "sizes": sizes,
            "repetitions": 3 if size == "smoke" else 15,
        }
        of_tp = "" if tp == 1 else f", tp {tp}{' sharded' if sharded else ''}"
        for found in run_ranks(work, encoder_dp + llm_dp * tp, given):
            yield from compared(f"{encoder_dp} to {llm_dp}{of_tp}", found)


def compared(layout: str, found: dict[str, Any]) -> Iterator[Row]:
    """The rows of one layout and size."""
    size = f"{found['rows']} x {found['width']}"
    for order, table in (("1f1b", "1F1B order"), ("plain", "Plain order")):
        yield Row(
            table=table,
            line=layout,
            column=size,
            ours=tuple(1e3 * seconds for seconds in found[order]["ours"]),
            peer=tuple(1e3 * seconds for seconds in found[order]["peer"]),
            target=TARGETS.get(found["rows"]) if order == "1f1b" else None,
            unit="ms",
        )
    for what in ("messages", "bytes"):
        ours, bound = found["traffic"][what], found["bound"][what]
        if ours != bound:
            raise RuntimeError(f"{layout}, {size}: {what} {ours}, expected exactly {bound}")
        yield Row(
            table=f"{what.capitalize()} of {MICROBATCHES} round trips",
            line=layout,
            column=size,
            ours=(ours,),
            peer=(found["peer_traffic"][what],),
            unit=what,
        )


def work(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Every size on one layout, on this rank."""
    return [exchanged(given, rows, width) for rows, width in given["sizes"]]


def exchanged(given: dict[str, Any], rows: int, width: int) -> dict[str, Any]:
    """Times and traffic of one size, on one layout."""
    import torch
    from benchlib.traffic import counted

    from megatron_mimo.bridge.manifest import ManifestEntry
    from megatron_mimo.topology import Layout, ModuleGridSpec, SequenceSharding
    from megatron_mimo.topology.groups import build_topology

    encoder = ModuleGridSpec(name="encoder", dp=given["encoder_dp"])
    llm = ModuleGridSpec(name="llm", offset=encoder.size, dp=given["llm_dp"], tp=given["tp"])
    layout = Layout.of(encoder, llm, world_size=encoder.size + llm.size)
    # `rows` is what one encoder rank and one lane exchange.
    per_lane = max(1, encoder.dp // llm.dp)
    sharding = SequenceSharding(
        seq_length=rows * per_lane, tp=llm.tp, sequence_parallel=given["sharded"]
    )
    manifest = tuple(
        ManifestEntry(
            module="encoder", source_rank=dp, lane=lane, rows=rows, sequence=0, start=rows * i
        )
        for lane in range(llm.dp)
        for i, dp in enumerate(layout.serving("encoder", lane))
    )
    topology = build_topology(layout)
    dtype = torch.float32
    ours, bound = our_orders(topology, sharding, manifest, width, dtype)
    peer = peer_orders(topology, rows, width, dtype)
    found: dict[str, Any] = {"rows": rows, "width": width, "bound": bound}
    repetitions = 5 if rows * width > 2**20 else given["repetitions"]
    for order in ("plain", "1f1b"):
        found[order] = in_turns(ours[order], peer[order], repetitions)
    for name, call in (("traffic", ours["1f1b"]), ("peer_traffic", peer["1f1b"])):
        with counted() as traffic:
            call()
        whole = traffic.over_all_ranks()
        found[name] = {
            "messages": whole.messages + whole.broadcasts,
            "bytes": whole.payload + whole.other,
        }
    return found


Orders = dict[str, Callable[[], None]]


def our_orders(
    topology: Any, sharding: Any, manifest: Any, width: int, dtype: Any
) -> tuple[Orders, dict[str, int]]:
    """Our round trips, and what they must send at least: each row once to each that uses it."""
    import torch

    from megatron_mimo.bridge.channels import TransportConfig
    from megatron_mimo.bridge.microbatch import MicrobatchManifest
    from megatron_mimo.schedule.actions import Kind
    from megatron_mimo.schedule.executor import Executor, ExecutorConfig
    from megatron_mimo.schedule.graph import GradientFlow

    executor = Executor(
        topology,
        ExecutorConfig(
            transport=TransportConfig(row_width=width, dtype=dtype, device=torch.device("cpu")),
            sharding=sharding,
            flow=GradientFlow(returning=frozenset({"encoder"}), inside=frozenset({"encoder"})),
            run_ahead=RUN_AHEAD,
        ),
    )
    layout, rank, planner = topology.layout, topology.rank, executor.planners["encoder"]
    rows = gradients = None
    if "encoder" in topology.modules:
        rows = torch.ones(planner.source_plan(rank, manifest).num_rows, width, dtype=dtype)
    if topology.target is not None:
        held = planner.target_plan(rank, manifest).num_rows
        gradients = torch.ones(held, width, dtype=dtype)
    plan = executor.plan(MicrobatchManifest(entries=manifest))

    def step(num_microbatches: int) -> None:
        """What `schedule.stage.Stage` does at the bridge, in the order of the schedule."""
        bridge = executor.bridge_traffic("encoder", [plan] * num_microbatches, gradients=True)

        def wait_input(m: int) -> None:
            bridge.wait_forward(m)

        def wait_grad(m: int) -> None:
            bridge.wait_backward(m)
            bridge.release_backward(m)

        def send_grad(m: int) -> None:
            bridge.post_backward(m, gradients)
            bridge.release_forward(m)

        handlers: dict[Kind, Callable[[int], None]] = {
            Kind.POST_INPUT: lambda m: bridge.post_forward(m, None),
            Kind.WAIT_INPUT: wait_input,
            Kind.SEND_OUTPUT: lambda m: bridge.post_forward(m, rows),
            Kind.POST_GRAD: lambda m: bridge.post_backward(m, None),
            Kind.WAIT_GRAD: wait_grad,
            Kind.SEND_GRAD: send_grad,
        }
        for action in executor.actions(num_microbatches, gradients=True):
            if action.kind in handlers:
                handlers[action.kind](action.microbatch)
        bridge.drain()

    def plain() -> None:
        for _ in range(MICROBATCHES):
            step(1)

    def one_forward_one_backward() -> None:
        step(MICROBATCHES)

    # Forward each row goes to every rank that uses it, backward to the one that produced it.
    copies = 1 if sharding.sequence_parallel else layout.target.tp
    moved = sum(entry.rows for entry in manifest) * (copies + 1)
    plans = [planner.source_plan(r, manifest) for r in layout.modules["encoder"].ranks]
    plans += [planner.target_plan(r, manifest) for r in layout.target.ranks]
    bound = {
        "messages": MICROBATCHES * sum(len(plan.sends) for plan in plans),
        "bytes": MICROBATCHES * moved * width * dtype.itemsize,
    }
    return {"plain": plain, "1f1b": one_forward_one_backward}, bound


def peer_orders(topology: Any, rows: int, width: int, dtype: Any) -> Orders:
    """The peer's round trips."""
    import torch
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator

    layout = topology.layout
    grids = [
        HyperCommGrid([g.tp, g.cp, g.pp, g.dp], ["tp", "cp", "pp", "dp"], rank_offset=g.offset)
        for g in layout.modules.values()
    ]
    with gloo_for_nccl():
        bridge = BridgeCommunicator(*grids, comm_dtype=dtype, tensor_ndim=2)
    encoder, llm = layout.modules["encoder"], layout.target
    held = rows * max(
        1,
        (llm if "encoder" in topology.modules else encoder).dp
        // (encoder if "encoder" in topology.modules else llm).dp,
    )
    tensor = torch.ones(held, width, dtype=dtype)

    def plain() -> None:
        for _ in range(MICROBATCHES):
            if "encoder" in topology.modules:
                bridge.send_forward(tensor)
                bridge.recv_backward()
            else:
                bridge.recv_forward()
                bridge.send_backward(tensor)

    def one_forward_one_backward() -> None:
        if "encoder" in topology.modules:
            bridge.send_forward(tensor)
            for _ in range(MICROBATCHES - 1):
                bridge.send_forward_recv_backward(tensor)
            bridge.recv_backward()
        else:
            bridge.recv_forward()
            for _ in range(MICROBATCHES - 1):
                bridge.send_backward_recv_forward(tensor)
            bridge.send_backward(tensor)

    return {"plain": plain, "1f1b": one_forward_one_backward}


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)

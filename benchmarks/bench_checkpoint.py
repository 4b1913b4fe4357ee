"""Saving a checkpoint: how long training waits, ours against torch's distributed checkpoint.

Four ranks, an encoder of dp 2 beside a language model of dp 2 and ep 2, hold weights, fp32 main
weights and Adam's two moments in fp32. Both sides save the same state to the same disk, each rank
the ranges that its optimizer owns, and both sync their files:

- *ours*: `Checkpointer`; each range is stored as a part of a tensor that any layout can read, and
  there are random states, a checksum of every file, and a rename that publishes;
- *the peer*: `torch.distributed.checkpoint.save` and `async_save` as they come, given this rank's
  ranges as plain tensors under names that no other rank has, so that it finds no copies to remove.
  What it writes cannot be read on another layout: it is the least that a save must do.

Seconds are those of the rank that waits longest. *Stall* is all that the loop spends in calls of
the saver: in the foreground `save`; in the background `save`, and `poll` after each step until
every rank has announced the checkpoint; for the peer `async_save` and its result. Ranks meet before
each of these, so that a step's own skew is not counted. *Lost by the steps* is what those that run
meanwhile take longer than steps just before: the writer needs processors, memory and Python's lock.
Stall and loss together are what a save costs a run. Foreground and background take turns.

    python benchmarks/bench_checkpoint.py [--smoke | --quick] [--json FILE]
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchlib.ranks import run_ranks, turns
from benchlib.report import Row, Size, run_benchmark

# Of our own save in the foreground.
STALL_TARGET = 0.2
SEQ_LENGTH = 128
# Of the language model: width, and width of an expert.
MODELS = {"tiny": (64, 64), "small": (256, 256), "large": (512, 1024)}
# Models, and saves of each.
CASES: dict[Size, tuple[tuple[str, ...], int]] = {
    "smoke": (("tiny",), 1),
    "quick": (("small",), 3),
    "full": (("small", "large"), 5),
}
SIDES = ("sync", "peer sync", "async", "peer async")
QUIET_STEPS = 3
# On disk, by the peer's: what a rank's files say of each tensor may differ.
BYTES, BYTES_TARGET = "bytes on disk", 1.02


def measure(size: Size) -> Iterator[Row]:
    """The rows of every case."""
    models, repetitions = CASES[size]
    for model in models:
        with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
            given = {"model": model, "folder": folder, "repetitions": repetitions}
            yield from compared(run_ranks(saved, 4, given))


def compared(found: dict[str, Any]) -> Iterator[Row]:
    """The rows of one model."""
    stall = found["stall"]
    cost = {side: both(found, side) for side in ("async", "peer async")}
    megabytes = {side: found["bytes"][side] / 1e6 for side in SIDES}

    def row(line: str, ours: list[float], peer: list[float], target: float | None = None) -> Row:
        # The peer writes nothing twice.
        column = f"{megabytes['peer sync']:.0f} MB"
        unit = "MB" if line == BYTES else "s"
        return Row(
            line=line, column=column, ours=tuple(ours), peer=tuple(peer), target=target, unit=unit
        )

    yield row("foreground, stall by DCP's save", stall["sync"], stall["peer sync"])
    yield row("background, stall by our foreground's", stall["async"], stall["sync"], STALL_TARGET)
    yield row("background, stall by DCP's async_save", stall["async"], stall["peer async"])
    yield row("background, stall and loss, by our foreground's stall", cost["async"], stall["sync"])
    yield row("background, stall and loss, by DCP's", cost["async"], cost["peer async"])
    yield row(BYTES, [megabytes["sync"]], [megabytes["peer sync"]], BYTES_TARGET)


def both(found: dict[str, Any], side: str) -> list[float]:
    """Stall and loss of each save of a side."""
    return [sum(pair) for pair in zip(found["stall"][side], found["lost"][side], strict=True)]


def saved(given: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every side, in turns; the first turn is not counted."""
    engine, step = trained(*MODELS[given["model"]])
    parts = engine
    root = Path(given["folder"])
    sides = our_sides(parts, step, root) | peer_sides(parts, step, root)
    found: dict[str, Any] = {
        "stall": {side: [] for side in SIDES},
        "lost": {side: [] for side in SIDES},
        "bytes": {},
    }
    for repetition in range(given["repetitions"] + 1):
        for side in turns(SIDES, repetition):
            num_quiet = QUIET_STEPS if "async" in side else 1
            quiet = statistics.median([waited(step) for _ in range(num_quiet)])
            stall, steps, folder = sides[side](repetition + 1)
            found["bytes"][side] = removed(folder)
            if repetition:
                found["stall"][side].append(stall)
                # Saving gives no time back: what is below zero is noise.
                found["lost"][side].append(max(0.0, sum(steps) - quiet * len(steps)))
    return found


type Side = Callable[[int], tuple[float, list[float], Path]]
"""Saves one checkpoint, numbered from 1: stall, each step's seconds meanwhile, and where it lies.
"""


def our_sides(parts: Any, step: Callable[[], Any], root: Path) -> dict[str, Side]:
    """Our checkpoints, in the foreground and in the background."""
    from megatron_mimo.checkpoint.checkpointer import Checkpointer
    from megatron_mimo.checkpoint.config import SaveConfig
    from megatron_mimo.checkpoint.folder import iteration_folder
    from megatron_mimo.checkpoint.progress import Progress

    def side(name: str, *, in_background: bool) -> Side:
        folder = root / name
        config = SaveConfig(root=str(folder), in_background=in_background)
        checkpoints = Checkpointer(parts, config, {})

        def call(number: int) -> tuple[float, list[float], Path]:
            stall = waited(lambda: checkpoints.save(Progress(number, number), {}))
            steps = []
            while largest(float(checkpoints.is_saving)):
                steps.append(waited(step))
                stall += waited(checkpoints.poll)
            return stall, steps, iteration_folder(folder, number)

        return call

    return {"sync": side("sync", in_background=False), "async": side("async", in_background=True)}


def peer_sides(parts: Any, step: Callable[[], Any], root: Path) -> dict[str, Side]:
    """Checkpoints of torch's own, over the same tensors."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import async_save, save

    state = plain_state(parts)
    # It communicates from a thread while training does.
    group = dist.new_group(backend="gloo")

    def sync(number: int) -> tuple[float, list[float], Path]:
        folder = root / f"peer-sync-{number}"
        return waited(lambda: save(state, checkpoint_id=folder)), [], folder

    def in_background(number: int) -> tuple[float, list[float], Path]:
        folder = root / f"peer-async-{number}"
        futures: list[Any] = []
        steps: list[float] = []

        def start() -> None:
            futures.append(async_save(state, checkpoint_id=folder, process_group=group))

        stall = waited(start)
        while largest(0.0 if futures[0].done() else 1.0):
            steps.append(waited(step))
        return stall + waited(futures[0].result), steps, folder

    return {"peer sync": sync, "peer async": in_background}


def plain_state(parts: Any) -> dict[str, Any]:
    """This rank's ranges of every weight and moment, by names that no other rank has."""
    import torch.distributed as dist

    rank, states = dist.get_rank(), parts.optimizer.param_states()
    found: dict[str, Any] = {}
    for replica in parts.model.replicas:
        for name, weight in replica.module.named_parameters():
            owned = states.get(weight.data_ptr())
            if owned is not None:
                own = weight.detach().view(-1)[owned.start : owned.stop]
                found |= {
                    f"{rank}.{name}.{kind}": tensor
                    for kind, tensor in {"weight": own, **owned.tensors}.items()
                }
    return found


def waited(call: Callable[[], Any]) -> float:
    """Seconds of a call on the rank that takes longest; ranks start together."""
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    call()
    return largest(time.perf_counter() - start)


def largest(value: float) -> float:
    """Largest value over all ranks."""
    import torch
    import torch.distributed as dist

    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def removed(folder: Path) -> int:
    """Remove a checkpoint; returns its size in bytes."""
    import torch.distributed as dist

    size = sum(path.stat().st_size for path in folder.iterdir())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    dist.barrier()
    return size


def trained(width: int, expert_width: int) -> tuple[Any, Callable[[], Any]]:
    """An engine of this rank, and a call that trains one step of it."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_mimo.config.presets import model_config
    from megatron_mimo.data import ByteTokenizer, DataConfig, RawSample, data_role
    from megatron_mimo.data.loader.stream_loader import build_list_loader
    from megatron_mimo.media.images import ImageInput
    from megatron_mimo.model.config import Frozen
    from megatron_mimo.model.mimo import BuildConfig
    from megatron_mimo.optim.config import AdamConfig, ScheduleConfig
    from megatron_mimo.runtime import Device
    from megatron_mimo.topology import Layout, ModuleGridSpec
    from megatron_mimo.training.runner import StepConfig, build_runner
    from megatron_mimo.training.step import train_step

    encoder = ModuleGridSpec(name="encoder", dp=2)
    llm = ModuleGridSpec(name="llm", offset=2, dp=2, ep=2)
    layout = Layout.of(encoder, llm, world_size=4)
    architecture = model_config(
        "nemotron-moe-vlm-tiny",
        [
            f"language.hidden_size={width}",
            f"language.moe_ffn_hidden_size={expert_width}",
            f"vision.hidden_size={width}",
            f"vision.ffn_hidden_size={4 * width}",
            f"projector.ffn_hidden_size={4 * width}",
        ],
    )
    random = np.random.default_rng(5)
    samples = [
        RawSample.asking(
            key=str(i),
            question="<image> what is it?",
            answer=f"it is number {i}",
            items={"encoder": (random.integers(0, 256, (64, 64, 3), dtype=np.uint8),)},
        )
        for i in range(2)
    ]
    config = DataConfig(
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        global_batch_size=2,
        inputs={
            "encoder": ImageInput(config=architecture.part("vision").image_config(max_patches=64))
        },
    )
    role = data_role(layout, dist.get_rank())
    data = build_list_loader(samples, config, role, ByteTokenizer()).next_step()

    class Given:
        def next_step(self) -> Any:
            return data

    engine = build_runner(
        layout,
        architecture,
        Frozen(),
        BuildConfig(
            params_dtype=torch.float32,
            seed=1,
            init="megatron",
            vocab_size=ByteTokenizer.vocab_size,
            seq_length=SEQ_LENGTH,
            sequence_parallel=False,
        ),
        AdamConfig(
            lr=1e-5, min_lr=0.0, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, clip_grad=1.0
        ),
        ScheduleConfig(style="constant", warmup_samples=0, decay_samples=1000),
        StepConfig(placeholder_ids=ByteTokenizer().placeholder_ids),
        device=Device("cpu"),
    )
    engine.model.train()
    return engine, lambda: train_step(engine, Given(), 1, 2)


if __name__ == "__main__":
    run_benchmark(__doc__, measure, threads=1)

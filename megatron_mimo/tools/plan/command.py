"""`megatron-mimo plan`: what a layout would do, without running it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.table import Table

from megatron_mimo.config.architecture import check_shards, frozen_parts
from megatron_mimo.config.custom import import_custom
from megatron_mimo.config.flags import CommandLine, to_yaml
from megatron_mimo.config.layout import grids
from megatron_mimo.config.lora import adapters
from megatron_mimo.config.model_file import read_architecture, read_folder
from megatron_mimo.config.sharding import check_sharding
from megatron_mimo.data.config import DataConfig
from megatron_mimo.model.config import Frozen, ModelConfig
from megatron_mimo.model.flow import gradient_flow
from megatron_mimo.schedule.actions import build_schedule
from megatron_mimo.schedule.timeline import timeline
from megatron_mimo.settings import File, MoreThan, Number, Switch, Within
from megatron_mimo.settings.ranges import MOST_RANKS
from megatron_mimo.tools.plan.costs import pass_costs
from megatron_mimo.tools.plan.draw import draw_png, draw_text, gather_rows
from megatron_mimo.tools.words import in_words
from megatron_mimo.topology import Layout

# Of a step whose batch sizes were not given: enough for a pipeline to fill.
_MICROBATCHES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanCommandLine(CommandLine):
    """Show what each rank of a layout does in a step, without starting any.

    Give the flags of the training run, or its --config: the grids, the model, and what is frozen
    decide. Other flags of training have no effect.

    Attributes:
        show_schedule: Whether to draw the step: who computes what when, and who waits.
        show_actions: Rank whose actions are listed, in order.
        params: Whether to count the parameters of each module, in all and on a rank.
        dry_run: Whether to build every distinct role of a run, and run a training step of it, on
            this machine with tensors that have shapes only. It takes --nproc N and the flags of
            `train` alone: --dry-run --help lists them.
        vocab_size: Number of tokens of the vocabulary, for --params.
        num_microbatches: Number of microbatches of the step; left out: those of
            --global-batch-size where it is given, else 8.
        evaluation: Whether to show a step of evaluation: forward only.
        encoder_cost: Time of a forward of a stage of the encoder, or of another source, in any
            unit.
        llm_cost: Time of a forward of a language-model stage, in the same unit.
        backward_cost: Time of a backward in which all parts train, in forwards.
        png: File to draw the schedule into too.
    """

    show_schedule: Switch = False
    show_actions: Annotated[Number, Within(0, MOST_RANKS)] = None
    params: Switch = False
    dry_run: Switch = False
    vocab_size: Annotated[int, Within(1, 10**9)] = 131072
    num_microbatches: Annotated[Number, Within(1, 100_000)] = None
    evaluation: Switch = False
    encoder_cost: Annotated[float, MoreThan(0, 1e6)] = 1.0
    llm_cost: Annotated[float, MoreThan(0, 1e6)] = 1.0
    backward_cost: Annotated[float, MoreThan(0, 1e6)] = 2.0
    png: File = None


def run_plan(line: PlanCommandLine) -> int:
    """Print the parts that the flags ask for.

    Args:
        line: Flags of this command, and those of the training run.

    Returns:
        Exit code 0.

    Raises:
        ValueError: A grid is impossible, a flag is wrong, or no flag asks for a part.
    """
    if line.print_config:
        sys.stdout.write(to_yaml(line.train))
        return 0
    if not (_wants_schedule(line) or line.params):
        raise ValueError(
            "nothing to show: add --show-schedule, --show-actions RANK, --png FILE, --params or "
            "--dry-run"
        )
    train = line.train
    model = train.model
    import_custom(model.custom_import)
    first = train.checkpoints.first_weights
    folder = read_folder(model.model_provider, first.load_hf, first.without)
    architecture = read_architecture(
        model.model_provider, model.model_config, model.override, folder
    )
    layout = grids(train.grids, tuple(architecture.modules), None)
    if line.params:
        _show_parameters(line, architecture, layout)
    if _wants_schedule(line):
        _show_schedule(line, architecture, layout)
    return 0


def _show_schedule(line: PlanCommandLine, architecture: ModelConfig, layout: Layout) -> None:
    frozen = frozen_parts(line.train.model, architecture, layout.modules)
    schedule = build_schedule(
        layout,
        num_microbatches=_num_microbatches(line, layout),
        run_ahead=line.train.grids.encoder_run_ahead,
        gradients=not line.evaluation,
        flow=gradient_flow(architecture, frozen, [source.name for source in layout.sources]),
    )
    if line.show_actions is not None:
        rank = line.show_actions
        if rank not in range(layout.world_size):
            raise ValueError(f"--show-actions {rank}: expected 0 to {layout.world_size - 1}")
        lines = [f"rank {rank}, {layout.describe_rank(rank)}:"]
        lines += [f"  {action}" for action in schedule[layout.stages_of(rank)]]
        sys.stdout.write("\n".join(lines) + "\n")
    if not line.show_schedule and line.png is None:
        return
    costs = pass_costs(
        layout,
        architecture,
        frozen,
        source=line.encoder_cost,
        target=line.llm_cost,
        backward=line.backward_cost,
    )
    step = timeline(layout, schedule, lambda _, action: costs.of(action))
    rows = gather_rows(layout, step)
    if line.show_schedule:
        sys.stdout.write(layout.table() + "\n\n")
        draw_text(rows, step.makespan, tuple(layout.modules))
        sys.stdout.writelines(_remarks(line, layout, architecture, frozen))
    if line.png is not None:
        draw_png(rows, step.makespan, line.png, tuple(layout.modules))
        sys.stdout.write(f"wrote {line.png}\n")


def _remarks(
    line: PlanCommandLine, layout: Layout, architecture: ModelConfig, frozen: Frozen
) -> Iterator[str]:
    """Lines on what does not train, and what that means for the drawing."""
    if line.evaluation:
        return
    for name in layout.modules:
        held = architecture.frozen_in(name, frozen)
        if not held:
            continue
        parts = ", ".join(sorted(held))
        if name == layout.target.name:
            what = "a backward computes gradients of its inputs alone, in half the time"
        elif architecture.trains(name, frozen):
            what = "the backward of the rest is short, and drawn without length"
        else:
            what = "it has no backward"
        yield f"{in_words(name)}: {parts} is frozen; {what}\n"


def _num_microbatches(line: PlanCommandLine, layout: Layout) -> int:
    """Microbatches of a step: those given, or of the batch sizes.

    Raises:
        ValueError: The global batch does not divide over the lanes' microbatches.
    """
    training = line.train.training
    if line.num_microbatches is not None:
        return line.num_microbatches
    if training.global_batch_size is None:
        return _MICROBATCHES
    sizes = DataConfig(
        micro_batch_size=training.micro_batch_size, global_batch_size=training.global_batch_size
    )
    return sizes.num_microbatches(layout.num_lanes)


def _wants_schedule(line: PlanCommandLine) -> bool:
    return line.show_schedule or line.show_actions is not None or line.png is not None


def _show_parameters(line: PlanCommandLine, architecture: ModelConfig, layout: Layout) -> None:
    # It takes the engine, which a drawing of the schedule does without.
    from megatron_mimo.tools.plan.parameters import count_parameters

    check_shards(layout, architecture)
    llm = layout.target
    if line.vocab_size % llm.tp:
        raise ValueError(
            f"--vocab-size is {line.vocab_size}: expected a multiple of {llm.flag('tp')} {llm.tp}"
        )
    table = Table(title=f"parameters of {line.train.model.model_provider}", title_justify="left")
    for name in ("module", "in all", "active", "on a rank"):
        table.add_column(name, justify="left" if name == "module" else "right")
    frozen = frozen_parts(line.train.model, architecture, layout.modules)
    lora = adapters(line.train.model.lora, architecture, frozen, layout.modules)
    reduce = line.train.training.reduce
    check_sharding(reduce, layout, architecture, frozen, lora)
    counts = count_parameters(
        architecture,
        layout.modules,
        line.vocab_size,
        lora,
        dtype=line.train.model.dtype,
        divided=() if reduce.sharding == "ddp" else (llm.name,),
    )
    for count in counts:
        ranks = " | ".join(f"{size:,}" for size in count.stages)
        table.add_row(count.name, f"{count.total:,}", f"{count.active:,}", ranks)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        "active: parameters that one token uses; on a rank: those of one rank, by pipeline stage"
        + ("" if reduce.sharding == "ddp" else ", of the rank with most")
    )

"""`megatron-mimo plan`: what a layout would do, on paper."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import UseAppendAction, arg

from megatron_mimo.schedule.actions import (
    Action,
    GradientFlow,
    Kind,
    Module,
    build_schedule,
    role_of,
)
from megatron_mimo.schedule.timeline import timeline
from megatron_mimo.tools.plan.draw import draw_png, draw_text, gather_rows
from megatron_mimo.topology import Layout
from megatron_mimo.training.config import (
    File,
    GridSection,
    Number,
    Preset,
    Switch,
    TrainConfig,
)
from megatron_mimo.training.model_file import read_architecture
from megatron_mimo.training.resolve import check_shards, grids


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Show what each rank of a layout does in a step, without starting any.

    Attributes:
        show_schedule: Draw the step: who computes what when, and who waits.
        show_actions: List the actions of this rank, in order.
        params: Count the parameters of each module, in all and on a rank.
        model_provider: Preset whose parameters are counted.
        model_config: YAML file of an architecture: sections vision, projector and language, whose
            fields replace the preset's.
        override: Change one field of the preset, as in language.num_layers=4.
        vocab_size: Tokens of the vocabulary.
        num_microbatches: Microbatches of the step.
        evaluation: A step of evaluation: forward only.
        training_stage: stage1 trains the projector only, stage2 all but the vision encoder, stage3
            everything.
        freeze_vit: Freeze the vision encoder, whatever the stage.
        freeze_projection: Freeze the projector, whatever the stage.
        encoder_cost: Time of an encoder stage's forward, in any unit.
        llm_cost: Time of a language-model stage's forward, in the same unit.
        backward_cost: Time of a backward, in forwards.
        png: Draw the schedule into this file too.
        grids: Ranks of each module, as in training.
    """

    show_schedule: Switch = False
    show_actions: Number = None
    params: Switch = False
    model_provider: Preset = "mock"
    model_config: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")] = None
    override: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SECTION.FIELD=VALUE")] = ()
    vocab_size: int = 131072
    num_microbatches: int = 8
    evaluation: Switch = False
    training_stage: Literal["stage1", "stage2", "stage3"] = "stage3"
    freeze_vit: Switch = False
    freeze_projection: Switch = False
    encoder_cost: float = 1.0
    llm_cost: float = 1.0
    backward_cost: float = 2.0
    png: File = None
    grids: Annotated[GridSection, arg(name="")] = field(default_factory=GridSection)


def run_plan(config: PlanConfig) -> int:
    """Print what was asked for.

    Returns:
        0.

    Raises:
        ValueError: A grid is impossible, a number out of range, or nothing was asked for.
    """
    _check(config)
    layout = _layout(config.grids)
    if config.params:
        _show_parameters(config, layout)
    if not _wants_schedule(config):
        return 0
    schedule = build_schedule(
        layout,
        num_microbatches=config.num_microbatches,
        run_ahead=config.grids.encoder_run_ahead,
        gradients=not config.evaluation,
        flow=_flow(config),
    )
    if config.show_actions is not None:
        rank = config.show_actions
        if rank not in range(layout.world_size):
            raise ValueError(f"--show-actions {rank}: expected 0 to {layout.world_size - 1}")
        lines = [f"rank {rank}, {layout.describe_rank(rank)}:"]
        lines += [f"  {action}" for action in schedule[role_of(layout, rank)]]
        sys.stdout.write("\n".join(lines) + "\n")
    if config.show_schedule or config.png is not None:

        def duration(_: int, action: Action) -> float:
            cost = config.encoder_cost if action.module is Module.ENCODER else config.llm_cost
            return cost * (config.backward_cost if action.kind is Kind.BACKWARD else 1.0)

        step = timeline(layout, schedule, duration)
        rows = gather_rows(layout, step)
        if config.show_schedule:
            sys.stdout.write(layout.table() + "\n\n")
            draw_text(rows, step.makespan)
        if config.png is not None:
            draw_png(rows, step.makespan, config.png)
            sys.stdout.write(f"wrote {config.png}\n")
    return 0


def _wants_schedule(config: PlanConfig) -> bool:
    return config.show_schedule or config.show_actions is not None or config.png is not None


def _show_parameters(config: PlanConfig, layout: Layout) -> None:
    # It takes the engine, which a drawing of the schedule does without.
    from megatron_mimo.tools.plan.parameters import count_parameters

    architecture = read_architecture(config.model_provider, config.model_config, config.override)
    check_shards(layout, architecture)
    if config.vocab_size < 1 or config.vocab_size % layout.llm.tp:
        raise ValueError(
            f"--vocab-size is {config.vocab_size}: expected a multiple of --llm-tp {layout.llm.tp}"
        )
    table = Table(title=f"parameters of {config.model_provider}", title_justify="left")
    for name in ("module", "in all", "active", "on a rank"):
        table.add_column(name, justify="left" if name == "module" else "right")
    for count in count_parameters(architecture, layout.encoder, layout.llm, config.vocab_size):
        ranks = " | ".join(f"{size:,}" for size in count.stages)
        table.add_row(count.name, f"{count.total:,}", f"{count.active:,}", ranks)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print("active: what a token meets; on a rank: of each pipeline stage")


def _check(config: PlanConfig) -> None:
    if not (_wants_schedule(config) or config.params):
        raise ValueError(
            "nothing to show: add --show-schedule, --show-actions RANK, --png FILE or --params"
        )
    for flag, value in (
        ("--encoder-cost", config.encoder_cost),
        ("--llm-cost", config.llm_cost),
        ("--backward-cost", config.backward_cost),
    ):
        if not value > 0:
            raise ValueError(f"{flag} is {value}: expected more than 0")
    if config.num_microbatches < 1:
        raise ValueError(f"--num-microbatches is {config.num_microbatches}: expected at least 1")
    if config.grids.encoder_run_ahead < 0:
        raise ValueError(
            f"--encoder-run-ahead is {config.grids.encoder_run_ahead}: expected at least 0"
        )


def _layout(section: GridSection) -> Layout:
    """The grids, and a world just large enough for them."""
    llm = section.llm_tp * section.llm_cp * section.llm_pp * section.llm_dp
    encoder = section.encoder_tp * section.encoder_cp * section.encoder_pp * section.encoder_dp
    first = section.encoder_offset or 0
    behind = section.llm_offset if section.llm_offset is not None else first + encoder
    if section.llm_only:
        first, encoder, behind = 0, 0, section.llm_offset or 0
    return grids(TrainConfig(grids=section), max(first + encoder, behind + llm))


def _flow(config: PlanConfig) -> GradientFlow:
    vision = not (config.freeze_vit or config.training_stage in ("stage1", "stage2"))
    return GradientFlow(encoder=vision, bridge=vision or not config.freeze_projection)

"""`megatron-mimo plan`: what a layout would do, without running it."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import UseAppendAction, arg

from megatron_mimo.config.architecture import check_shards, frozen_parts
from megatron_mimo.config.custom import import_custom
from megatron_mimo.config.layout import grids
from megatron_mimo.config.model_file import read_architecture
from megatron_mimo.config.sections import (
    CustomImport,
    GridSection,
    ModelSection,
    Preset,
)
from megatron_mimo.model.config import ModelConfig
from megatron_mimo.model.flow import gradient_flow
from megatron_mimo.schedule.actions import Action, Kind, build_schedule
from megatron_mimo.schedule.graph import GradientFlow
from megatron_mimo.schedule.timeline import timeline
from megatron_mimo.settings import File, MoreThan, Number, Switch, Within, check_bounds
from megatron_mimo.settings.ranges import MOST_RANKS
from megatron_mimo.tools.plan.draw import draw_png, draw_text, gather_rows
from megatron_mimo.topology import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Show what each rank of a layout does in a step, without starting any.

    Attributes:
        show_schedule: Draw the step: who computes what when, and who waits.
        show_actions: List the actions of this rank, in order.
        params: Count the parameters of each module, in all and on a rank.
        dry_run: Build every distinct role of a run, and run a training step of it, on this machine
            with tensors that have shapes only. It takes the flags of `train` in the place of those
            below, with --nproc N: --dry-run --help lists them.
        custom_import: Python module to import before the model is looked up: it may register
            families of modules, and presets.
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
    show_actions: Annotated[Number, Within(0, MOST_RANKS)] = None
    params: Switch = False
    dry_run: Switch = False
    custom_import: CustomImport = ()
    model_provider: Preset = "mock"
    model_config: Annotated[str | None, arg(metavar="PATH", help_behavior_hint="")] = None
    override: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="SECTION.FIELD=VALUE")] = ()
    vocab_size: Annotated[int, Within(1, 10**9)] = 131072
    num_microbatches: Annotated[int, Within(1, 100_000)] = 8
    evaluation: Switch = False
    training_stage: Literal["stage1", "stage2", "stage3"] = "stage3"
    freeze_vit: Switch = False
    freeze_projection: Switch = False
    encoder_cost: Annotated[float, MoreThan(0, 1e6)] = 1.0
    llm_cost: Annotated[float, MoreThan(0, 1e6)] = 1.0
    backward_cost: Annotated[float, MoreThan(0, 1e6)] = 2.0
    png: File = None
    grids: Annotated[GridSection, arg(name="")] = field(default_factory=GridSection)


def run_plan(config: PlanConfig) -> int:
    """Print the parts that the flags ask for.

    Returns:
        Exit code 0.

    Raises:
        ValueError: A grid is impossible, a number is out of range, or no flag asks for a part.
    """
    _check(config)
    import_custom(config.custom_import)
    architecture = read_architecture(config.model_provider, config.model_config, config.override)
    layout = grids(config.grids, tuple(architecture.modules), None)
    if config.params:
        _show_parameters(config, architecture, layout)
    if not _wants_schedule(config):
        return 0
    schedule = build_schedule(
        layout,
        num_microbatches=config.num_microbatches,
        run_ahead=config.grids.encoder_run_ahead,
        gradients=not config.evaluation,
        flow=_flow(config, architecture, layout),
    )
    if config.show_actions is not None:
        rank = config.show_actions
        if rank not in range(layout.world_size):
            raise ValueError(f"--show-actions {rank}: expected 0 to {layout.world_size - 1}")
        lines = [f"rank {rank}, {layout.describe_rank(rank)}:"]
        lines += [f"  {action}" for action in schedule[layout.stages_of(rank)]]
        sys.stdout.write("\n".join(lines) + "\n")
    if config.show_schedule or config.png is not None:

        def duration(_: int, action: Action) -> float:
            is_target = action.module == layout.target.name
            cost = config.llm_cost if is_target else config.encoder_cost
            return cost * (config.backward_cost if action.kind is Kind.BACKWARD else 1.0)

        step = timeline(layout, schedule, duration)
        rows = gather_rows(layout, step)
        if config.show_schedule:
            sys.stdout.write(layout.table() + "\n\n")
            draw_text(rows, step.makespan, tuple(layout.modules))
        if config.png is not None:
            draw_png(rows, step.makespan, config.png, tuple(layout.modules))
            sys.stdout.write(f"wrote {config.png}\n")
    return 0


def _wants_schedule(config: PlanConfig) -> bool:
    return config.show_schedule or config.show_actions is not None or config.png is not None


def _show_parameters(config: PlanConfig, architecture: ModelConfig, layout: Layout) -> None:
    # It takes the engine, which a drawing of the schedule does without.
    from megatron_mimo.tools.plan.parameters import count_parameters

    check_shards(layout, architecture)
    llm = layout.target
    if config.vocab_size % llm.tp:
        raise ValueError(
            f"--vocab-size is {config.vocab_size}: expected a multiple of {llm.flag('tp')} {llm.tp}"
        )
    table = Table(title=f"parameters of {config.model_provider}", title_justify="left")
    for name in ("module", "in all", "active", "on a rank"):
        table.add_column(name, justify="left" if name == "module" else "right")
    for count in count_parameters(architecture, layout.modules, config.vocab_size):
        ranks = " | ".join(f"{size:,}" for size in count.stages)
        table.add_row(count.name, f"{count.total:,}", f"{count.active:,}", ranks)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        "active: parameters that one token uses; on a rank: those of one rank, by pipeline stage"
    )


def _check(config: PlanConfig) -> None:
    if not (_wants_schedule(config) or config.params):
        raise ValueError(
            "nothing to show: add --show-schedule, --show-actions RANK, --png FILE, --params or "
            "--dry-run"
        )
    check_bounds(config)


def _flow(config: PlanConfig, architecture: ModelConfig, layout: Layout) -> GradientFlow:
    section = ModelSection(
        training_stage=config.training_stage,
        freeze_vit=config.freeze_vit,
        freeze_projection=config.freeze_projection,
    )
    frozen = frozen_parts(section, architecture, layout.modules)
    return gradient_flow(architecture, frozen, [source.name for source in layout.sources])

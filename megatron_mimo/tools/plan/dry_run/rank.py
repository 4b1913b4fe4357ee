"""One rank of a run on paper: built with the product's own code, and stepped once."""

import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_mimo.border import reason_of
from megatron_mimo.config.flags import CommandLine, parse
from megatron_mimo.config.model_file import table_size
from megatron_mimo.config.resolve import Resolved, resolve
from megatron_mimo.data.config import DataConfig
from megatron_mimo.modules.language import ExecutionConfig
from megatron_mimo.runtime import Device, prepare_megatron_core
from megatron_mimo.runtime.paper.groups import PAPER, open_world
from megatron_mimo.tools.plan.dry_run.result import Exchange, Fault, ModuleSize, Outcome
from megatron_mimo.topology.group_plan import CONTROL

if TYPE_CHECKING:
    from megatron_mimo.data import Tokenizer
    from megatron_mimo.runtime.paper.mode import PaperMode
    from megatron_mimo.runtime.paper.traffic import Traffic
    from megatron_mimo.training.runner import StepRunner

# Of a step, however few are under way at one time.
_MICROBATCHES = 8


class _Progress:
    """Notes what is being done, for the fault; and the peak of forward and backward."""

    def __init__(self) -> None:
        self.doing = "reading the flags"
        self.mode: PaperMode | None = None
        self.activations = 0
        self._before = 0

    def note(self, what: Any) -> None:
        """See `schedule.laps.Note`."""
        from megatron_mimo.schedule.laps import Phase

        self.doing = str(what)
        assert self.mode is not None
        memory = self.mode.memory
        if what is Phase.PREPARE:
            self._before = memory.held
            memory.begin()
        elif what is Phase.GRADIENTS:
            self.activations = memory.peak - self._before

    def planned(self, data: Any, plans: Any) -> None:
        """See `StepWatch.planned`."""


def run_role(argv: Sequence[str], *, rank: int, world_size: int, vocab_size: int | None) -> Outcome:
    """Build one rank on paper, and run a training step.

    Args:
        argv: Flags of `megatron-mimo train`.
        rank: Global rank.
        world_size: Number of ranks of the run.
        vocab_size: Number of tokens of the vocabulary in the place of the tokenizer's; None reads
            the tokenizer.
    """
    progress = _Progress()
    found: dict[str, Any] = {}
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        # Reading a folder's model imports megatron-core.
        prepare_megatron_core(PAPER)
        line = parse(argv, CommandLine, prog="megatron-mimo plan --dry-run")
        _run(resolve(line.train, world_size), rank, vocab_size, progress, found)
    except Exception as error:
        fault = Fault(
            where=progress.doing, reason=reason_of(error), traceback=traceback.format_exc()
        )
        return Outcome(**found, fault=fault)
    return Outcome(**found)


def _run(
    resolved: Resolved,
    rank: int,
    vocab_size: int | None,
    progress: _Progress,
    found: dict[str, Any],
) -> None:
    """Fill `found` with fields of the outcome, as far as it comes."""
    open_world(rank, resolved.layout.world_size)
    # These import megatron-core, which is prepared now.
    from megatron_mimo.kernels.outlines import install_outlines
    from megatron_mimo.runtime.paper.experts import share_tokens_evenly
    from megatron_mimo.runtime.paper.mode import PaperMode
    from megatron_mimo.runtime.paper.traffic import Traffic
    from megatron_mimo.tools.plan.dry_run.samples import full_step
    from megatron_mimo.training.step import train_step

    install_outlines(scan=resolved.runtime.device != "cpu")
    share_tokens_evenly()
    progress.doing = "making samples"
    tokenizer, data = read_tokenizer(resolved, vocab_size)
    data = shortened(data, resolved)
    loader = full_step(data, resolved.layout, rank, tokenizer)
    found["samples"] = loader.describe()
    found["microbatches"] = data.num_microbatches(resolved.layout.num_lanes)
    found["step_microbatches"] = resolved.data.num_microbatches(resolved.layout.num_lanes)
    vocab_size = vocab_size or table_size(tokenizer, resolved.folder)
    progress.mode = mode = PaperMode()
    with mode:
        progress.doing = "building the model"
        runner = build(resolved, tokenizer, vocab_size, PAPER)
        found["modules"] = sizes(runner)
        mode.traffic = Traffic()
        train_step(runner, loader, 1, data.global_batch_size, watch=progress)
    found["modules"] = sizes(runner)
    found["activations"] = progress.activations
    found["exchanges"] = exchanges(mode.traffic)


def shortened(data: DataConfig, resolved: Resolved) -> DataConfig:
    """The same settings for a step of no more microbatches than show what a longer one does.

    As many are under way as there are stages, and as sources may be ahead. Twice as many show each
    kind of action, and the schedule where it repeats itself.

    Args:
        data: Settings of the data.
        resolved: Checked settings of the run.
    """
    layout = resolved.layout
    stages = sum(grid.pp for grid in layout.modules.values())
    enough = max(_MICROBATCHES, 2 * (stages + resolved.grids.encoder_run_ahead))
    number = min(enough, data.num_microbatches(layout.num_lanes))
    return replace(data, global_batch_size=number * data.micro_batch_size * layout.num_lanes)


def read_tokenizer(resolved: Resolved, vocab_size: int | None) -> tuple["Tokenizer", DataConfig]:
    """The run's tokenizer and settings of the data.

    Args:
        resolved: Checked settings of the run.
        vocab_size: None reads the tokenizer; bytes take the place of one that is not read.

    Raises:
        ValueError: The tokenizer is missing, or cannot write the prompts.
    """
    from megatron_mimo.data import tokenizer_for

    data, path = resolved.data, resolved.model.tokenizer_model
    if vocab_size is not None:
        data, path = replace(data, prompt_format="plain"), None
    return tokenizer_for(data, path), data


def build(
    resolved: Resolved, tokenizer: "Tokenizer", vocab_size: int, device: Device
) -> "StepRunner":
    """What a rank of a run steps with, built as the run would, but for how weights are drawn.

    Args:
        resolved: Checked settings of the run.
        tokenizer: Tokenizer of the texts.
        vocab_size: Number of rows of the embedding table, V.
        device: Device of the rank.
    """
    from megatron_mimo.training.runner import build_runner
    from megatron_mimo.training.setup import build_config, step_config

    settings = build_config(resolved, vocab_size)
    return build_runner(
        resolved.layout,
        resolved.architecture,
        resolved.freeze,
        replace(
            settings,
            # Weights have no content to draw.
            init="megatron",
            execution=_on_host(settings.execution),
        ),
        resolved.adam,
        resolved.schedule,
        # The other end of a bridge has nothing to say that could be compared.
        replace(step_config(resolved, tokenizer), check_bridge=False),
        device=device,
    )


def _on_host(execution: ExecutionConfig) -> ExecutionConfig:
    """The settings without what only Transformer Engine has, since layers are a host's."""
    from megatron_mimo.modules.language.execution import FUSED_PARTS

    kept = tuple(part for part in execution.recompute_modules if part not in FUSED_PARTS)
    nothing = bool(execution.recompute_modules) and not kept
    return replace(
        execution,
        # Experts are computed one after the other.
        moe_grouped_gemm=None,
        recompute_modules=kept,
        recompute_granularity=None if nothing else execution.recompute_granularity,
    )


def sizes(runner: "StepRunner") -> tuple[ModuleSize, ...]:
    """What a rank holds of each module."""
    from megatron_mimo.runtime.paper.memory import bytes_of

    return tuple(
        ModuleSize(
            name=replica.name,
            parameters=sum(parameter.numel() for parameter in replica.module.parameters()),
            weights=bytes_of(replica.module.parameters()),
            gradients=bytes_of(replica.gradient_buffers),
            optimizer=bytes_of(runner.optimizer.state_tensors(replica.name)),
        )
        for replica in runner.model.replicas
    )


def exchanges(traffic: "Traffic") -> tuple[Exchange, ...]:
    """Messages of a rank by the names of its groups (`topology.group_plan`)."""
    return tuple(
        Exchange(
            group="world" if description == CONTROL else description,
            size=size,
            operation=operation,
            messages=sent.messages,
            bytes=sent.bytes,
        )
        for (group, operation), sent in traffic.sent.items()
        for description, size in [traffic.groups[group]]
    )

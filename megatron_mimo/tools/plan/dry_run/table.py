"""What a dry run found, as tables on the terminal."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_mimo.tools.plan.dry_run.result import Exchange, ModuleSize, Outcome
from megatron_mimo.tools.plan.dry_run.roles import Role

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

NOTES = """\
Shapes only: nothing was computed or sent. Activations are those of a host's layers with fused
attention, and of a GPU's Mamba scan unless --device cpu is given; every expert gets as many tokens.
What kernels, NCCL and the allocator need beside is not counted. Faults of order, and waits, cannot
show."""


def show(role: Role, outcome: Outcome) -> None:
    """Print what one role holds and exchanges."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"{role}", style="bold", markup=False, soft_wrap=True)
    if outcome.samples:
        number, step = outcome.microbatches, outcome.step_microbatches
        of = f" of a step's {step:,}" if number < step else ""
        console.print(
            f"  {number}{of} microbatches; a sequence: {outcome.samples}",
            markup=False,
            soft_wrap=True,
        )
    if outcome.fault is not None:
        return
    console.print(_sizes(outcome))
    console.print(_exchanges(outcome.exchanges))
    console.print()


def size(number: int) -> str:
    """Bytes with their unit: "1.50 GiB"."""
    value, unit = float(number), _UNITS[0]
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{number} B" if unit == "B" else f"{value:.2f} {unit}"


def _sizes(outcome: Outcome) -> Table:
    table = Table()
    for name in ("held", "parameters", "weights", "gradients", "optimizer", "in all"):
        table.add_column(name, justify="left" if name == "held" else "right")
    for module in outcome.modules:
        parts = (module.weights, module.gradients, module.optimizer)
        table.add_row(module.name, f"{module.parameters:,}", *map(size, parts), size(sum(parts)))
    table.add_row("activations at peak", "", "", "", "", size(outcome.activations))
    held = sum(map(_held, outcome.modules)) + outcome.activations
    table.add_row("at peak of the step", "", "", "", "", size(held), style="bold")
    return table


def _held(module: ModuleSize) -> int:
    return module.weights + module.gradients + module.optimizer


def _exchanges(exchanges: Sequence[Exchange]) -> Table:
    table = Table()
    for name in ("group", "ranks", "operation", "messages", "bytes"):
        table.add_column(name, justify="left" if name in ("group", "operation") else "right")
    for exchange in sorted(exchanges, key=lambda exchange: (exchange.group, exchange.operation)):
        table.add_row(
            exchange.group,
            f"{exchange.size:,}",
            exchange.operation,
            f"{exchange.messages:,}",
            size(exchange.bytes),
        )
    return table

"""Picture of two runs' curves, and of their relative difference."""

import math
from typing import TYPE_CHECKING, Any

from megatron_mimo.tools import picture

if TYPE_CHECKING:
    from megatron_mimo.tools.parity.compare import Comparison, Parity

_COLOURS = ("#9ecae1", "#e6550d")


def draw_png(parity: "Parity", path: str) -> None:
    """A column for each quantity: both curves on top, their relative difference below.

    Raises:
        ValueError: matplotlib is missing, or the file cannot be written.
    """
    columns = len(parity.comparisons)
    figure = picture.blank(figsize=(5.5 * columns, 5), layout="constrained")
    axes = figure.subplots(2, columns, sharex=True, squeeze=False, height_ratios=(2, 1))
    for column, comparison in enumerate(parity.comparisons):
        _draw_curves(axes[0, column], comparison)
        _draw_difference(axes[1, column], comparison)
    handles = axes[0, 0].get_lines()[:2]
    names = (f"A: {parity.a.name}", f"B: {parity.b.name}")
    figure.legend(handles, names, loc="outside upper left", ncols=2, frameon=False)
    figure.suptitle("PASS" if parity.passes else "FAIL", x=0.99, ha="right", weight="bold")
    picture.save(figure, path)


def _draw_curves(axes: Any, comparison: "Comparison") -> None:
    steps = [difference.step for difference in comparison.differences]
    # The reference wide and pale, so that a curve on top of it leaves it visible.
    axes.plot(steps, [d.a for d in comparison.differences], color=_COLOURS[0], linewidth=5)
    axes.plot(steps, [d.b for d in comparison.differences], color=_COLOURS[1], linewidth=1.2)
    axes.set_title(comparison.quantity.name, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_difference(axes: Any, comparison: "Comparison") -> None:
    sizes = [(d.step, d.size) for d in comparison.differences]
    shown = [(step, size) for step, size in sizes if 0 < size < math.inf]
    if shown:
        axes.plot(*zip(*shown, strict=True), ".-", color="#555555", ms=3)
    for step, size in sizes:
        if size == math.inf:
            axes.axvline(step, color=_COLOURS[1], linestyle=":")
    if comparison.tolerance > 0:
        axes.axhline(comparison.tolerance, color=_COLOURS[1], linestyle="--", linewidth=1)
        axes.text(
            1,
            comparison.tolerance,
            f" {comparison.tolerance:g}",
            color=_COLOURS[1],
            fontsize=8,
            va="center",
            transform=axes.get_yaxis_transform(),
        )
    bounds = [size for _, size in shown] + [comparison.tolerance] * (comparison.tolerance > 0)
    if bounds:
        axes.set_ylim(min(bounds) / 3, max(bounds) * 3)
        axes.set_yscale("log")
    axes.set_ylabel("|B - A| / |A|")
    axes.set_xlabel("iteration")
    axes.spines[["top", "right"]].set_visible(False)

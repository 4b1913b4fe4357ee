"""The layout of the modules on ranks, from the flags of the grids."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from megatron_mimo.config.sections import GridSection
from megatron_mimo.topology import Layout, ModuleGridSpec, balanced

# Modules whose sizes have separate flags, as in --llm-tp; --grid sets those of any module.
_NAMED = ("encoder", "llm")
_AXES = ("tp", "cp", "dp", "pp", "ep", "expt_tp")


def grids(section: GridSection, modules: Sequence[str], world_size: int | None) -> Layout:
    """The layout that the flags describe.

    Args:
        section: Flags as given.
        modules: Names of the modules, with the target, which all others feed, last.
        world_size: Number of started ranks; None for as many as the grids need.

    Raises:
        ValueError: A grid is impossible, or the grids do not cover the ranks; the message names
            both.
    """
    *sources, target = modules
    chosen = _chosen(section, modules)
    if section.llm_only:
        _refuse_sources(section, sources, chosen)
        sources = []
    specs: list[ModuleGridSpec] = []
    for name in (*sources, target):
        sizes = {axis: size for axis, size in chosen[name].items() if axis != "offset"}
        # Grids follow each other without gaps, unless offsets are given; one rank holds all grids.
        behind = specs[-1].ranks.stop if specs and world_size != 1 else 0
        form = "--{name}-{axis}" if name in _NAMED else "--grid {name}.{axis}"
        offset = chosen[name].get("offset", behind)
        specs.append(ModuleGridSpec(name=name, offset=offset, flag_form=form, **sizes))
    if world_size is None:
        world_size = max(spec.ranks.stop for spec in specs)
    return _dispatched(section, Layout.of(*specs, world_size=world_size))


def _dispatched(section: GridSection, layout: Layout) -> Layout:
    """The layout with its sources' domains."""
    size = section.encoder_dispatch_group_size
    if section.encoder_dispatch == "balanced":
        try:
            return balanced(layout, size)
        except ValueError as error:
            raise ValueError(f"--encoder-dispatch-group-size {size}: {error}") from error
    if size is not None:
        raise ValueError(
            f"--encoder-dispatch-group-size {size} with --encoder-dispatch lane, which moves no "
            f"items: leave one of them out"
        )
    return layout


def with_layout(section: GridSection, layout: Layout) -> GridSection:
    """The section with every size and first rank of a layout's grids filled in.

    Sizes of modules without flags are written only where they are above 1.
    """
    named, others = {}, []
    for name, spec in layout.modules.items():
        for axis in (*_AXES, "offset"):
            if name in _NAMED:
                named[f"{name}_{axis}"] = getattr(spec, axis)
            elif axis == "offset" or getattr(spec, axis) > 1:
                others.append(f"{name}.{axis}={getattr(spec, axis)}")
    return replace(section, grid=tuple(others), **named)


def _chosen(section: GridSection, modules: Sequence[str]) -> dict[str, dict[str, int]]:
    """Module name -> axis -> size, and "offset" -> first rank, of those that are given."""
    chosen: dict[str, dict[str, int]] = {name: {} for name in modules}
    for name in (name for name in _NAMED if name in chosen):
        for axis in ("offset", *_AXES):
            size = getattr(section, f"{name}_{axis}")
            if size is not None:
                chosen[name][axis] = size
    named = {name: dict(sizes) for name, sizes in chosen.items()}
    # The last one wins, since those of the command line follow those of a file.
    for name, axis, size in _parsed(section.grid, modules):
        if named[name].get(axis, size) != size:
            raise ValueError(
                f"--grid {name}.{axis}={size} contradicts --{name}-{axis.replace('_', '-')} "
                f"{named[name][axis]}: give one of them"
            )
        chosen[name][axis] = size
    return chosen


def _parsed(texts: Iterable[str], modules: Sequence[str]) -> Iterable[tuple[str, str, int]]:
    """(module, axis, size) of each --grid."""
    for text in texts:
        where, equals, number = text.partition("=")
        name, dot, typed = where.partition(".")
        if not (equals and dot):
            raise ValueError(f"--grid {text}: expected MODULE.AXIS=NUMBER, as in audio.tp=2")
        if name not in modules:
            raise ValueError(
                f"--grid {text}: there is no module {name!r}, the model has {', '.join(modules)}"
            )
        axis = typed.replace("-", "_")
        axes = ("offset", *_AXES)
        if axis not in axes:
            nearest = difflib.get_close_matches(axis, axes, n=1, cutoff=0)[0]
            raise ValueError(
                f"--grid {text}: there is no axis {typed!r}, the nearest is {nearest!r}; expected "
                f"one of {', '.join(axes)}"
            )
        try:
            yield name, axis, int(number)
        except ValueError:
            raise ValueError(f"--grid {text}: expected a whole number, not {number!r}") from None


def _refuse_sources(
    section: GridSection, sources: Sequence[str], chosen: dict[str, dict[str, int]]
) -> None:
    for name in sources:
        # Sizes of 1 stand in the files that `--print-config` wrote.
        if any(axis == "offset" or size > 1 for axis, size in chosen[name].items()):
            flags = f"the --{name}-… flags" if name in _NAMED else f"--grid {name}.…"
            raise ValueError(f"--llm-only trains no {name}: leave {flags} out")

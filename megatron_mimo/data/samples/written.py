"""Turns and items by module, from turns and items by kind.

Items that feed the module of another kind are written out here: the place of each in the text
becomes texts and placeholders of that kind, so that whatever follows knows modules alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mimo.data.inputs import Inputs, Item, Layout, module_of
from megatron_mimo.data.text.conversation import Turn
from megatron_mimo.data.text.placeholders import split_text

# Kind -> its items in the order of its placeholders.
ByKind = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A conversation in which every placeholder stands for one run of a module's rows.

    Attributes:
        turns: Turns with the placeholders of hosts alone.
        items: Module -> its items in token order; only modules with items.
        layouts: Module -> what becomes of each of its placeholders.
    """

    turns: tuple[Turn, ...]
    items: Mapping[str, tuple[Item, ...]]
    layouts: Mapping[str, tuple[Layout, ...]]


def write_out(turns: Sequence[Turn], items: ByKind, inputs: Inputs) -> Written:
    """Write out the items of a conversation.

    Args:
        turns: Turns with one placeholder for each item.
        items: Kind -> its encoded items, with their content or without.
        inputs: Kinds of items.
    """
    left = {name: iter(of_kind) for name, of_kind in items.items()}
    written: list[Turn] = []
    layouts: dict[str, list[Layout]] = {}
    for turn in turns:
        text = ""
        for piece, name in split_text(turn.text, inputs):
            text += piece
            if name is None:
                continue
            module = module_of(name, inputs)
            for before, layout in inputs[name].runs(next(left[name])):
                text += before + inputs[module].placeholder
                layouts.setdefault(module, []).append(layout)
        written.append(Turn(turn.role, text))
    return Written(
        turns=tuple(written),
        items=by_module(turns, items, inputs),
        layouts={module: tuple(of_module) for module, of_module in layouts.items()},
    )


def by_module(turns: Sequence[Turn], items: ByKind, inputs: Inputs) -> dict[str, tuple[Any, ...]]:
    """Module -> its items in token order; only modules with items.

    Args:
        turns: Turns with one placeholder for each item.
        items: Kind -> its items, or what stands for them.
        inputs: Kinds of items.
    """
    if all(inputs[name].feeds is None for name in items):
        return {name: tuple(items[name]) for name in inputs if items.get(name)}
    left = {name: iter(of_kind) for name, of_kind in items.items()}
    found: dict[str, list[Any]] = {}
    for turn in turns:
        for _, name in split_text(turn.text, inputs):
            if name is not None:
                found.setdefault(module_of(name, inputs), []).append(next(left[name]))
    # In the order of the settings, whichever comes first in the text.
    return {name: tuple(found[name]) for name in inputs if name in found}

"""A small set of layouts in which every two values of any two axes meet.

A fault of a layout shows where one axis has a certain value, or where two of them have (a fault of
expert parallelism with tensor parallelism, say); few need three. So a set in which all *pairs* meet
finds nearly what all combinations find, at a hundredth of the cost. `tests/faults` holds it against
faults that were planted, and docs/develop/testing.md has the table.
"""

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_mimo.topology import Layout, balanced
from tests.integration.engines import beside, layout

# So many gloo ranks share two cores with another test.
MOST_RANKS = 6

# The first value of each axis is the plainest.
AXES: Mapping[str, tuple[Any, ...]] = {
    "llm_dp": (1, 2, 3),
    "encoder_dp": (1, 2, 3),
    "place": ("encoder first", "llm first", "colocated"),
    "frozen": ("", "vision", "language", "vision+language"),
    "overlap": ("", "gradients", "gradients+weights"),
    "recompute": ("", "full", "selective"),
    "run_ahead": (1, 0, 3),
    "encoder_tp": (1, 2),
    "encoder_cp": (1, 2),
    "encoder_pp": (1, 2),
    "llm_tp": (1, 2),
    "llm_cp": (1, 2),
    "llm_pp": (1, 2),
    "llm_ep": (1, 2),
    "expt_tp": (1, 2),
    "model": ("hybrid", "dense", "dense tied"),
    "packed": (False, True),
    "text_only": (False, True),
    "sequence_parallel": (True, False),
    "check_bridge": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the cover.

    Attributes:
        llm_dp: Data-parallel size of the language model.
        encoder_dp: Data-parallel size of the encoder.
        place: Which grid has the first ranks, or "colocated".
        frozen: Modules that do not train, joined by "+".
        overlap: What is exchanged while the step still computes, joined by "+".
        recompute: Granularity; empty for none.
        run_ahead: Microbatches that the encoder may be ahead.
        encoder_tp: Tensor-parallel size of the encoder.
        encoder_cp: Context-parallel size of the encoder.
        encoder_pp: Pipeline stages of the encoder.
        llm_tp: Tensor-parallel size of the language model.
        llm_cp: Context-parallel size of the language model.
        llm_pp: Pipeline stages of the language model.
        llm_ep: Expert-parallel size of the language model.
        expt_tp: Tensor-parallel size inside an expert.
        model: "hybrid" of Mamba, experts and attention, "dense", or "dense tied" embeddings.
        packed: Whether several documents share a sequence.
        text_only: Whether half of the sequences have no image, whole microbatches among them.
        sequence_parallel: Whether tensor-parallel ranks share the sequence between layers.
        check_bridge: Whether keys and checksums of all that crosses are compared.
    """

    llm_dp: int
    encoder_dp: int
    place: str
    frozen: str
    overlap: str
    recompute: str
    run_ahead: int
    encoder_tp: int
    encoder_cp: int
    encoder_pp: int
    llm_tp: int
    llm_cp: int
    llm_pp: int
    llm_ep: int
    expt_tp: int
    model: str
    packed: bool
    text_only: bool
    sequence_parallel: bool
    check_bridge: bool

    @cached_property
    def layout(self) -> Layout:
        """Its grids.

        Two replicas of an encoder share out items by their cost, and three by their lanes: so each
        way meets every value of the other axes.
        """
        return balanced(self._grids) if self.encoder_dp == 2 else self._grids

    @property
    def _grids(self) -> Layout:
        encoder = {"tp": self.encoder_tp, "cp": self.encoder_cp}
        encoder |= {"pp": self.encoder_pp, "dp": self.encoder_dp}
        llm = {"tp": self.llm_tp, "cp": self.llm_cp, "pp": self.llm_pp, "dp": self.llm_dp}
        llm |= {"ep": self.llm_ep, "expt_tp": self.expt_tp}
        if self.place == "colocated":
            return layout(encoder, llm)
        if self.place == "encoder first":
            return beside(encoder, llm)
        size = self.llm_tp * self.llm_cp * self.llm_pp * self.llm_dp
        return layout(encoder | {"offset": size}, llm)

    @property
    def reference(self) -> "Case":
        """What the same run is on one rank, each step of it after the other."""
        plain = {axis: values[0] for axis, values in AXES.items()}
        kept = ("model", "packed", "text_only", "frozen")
        return Case(**plain | {"place": "colocated"} | {axis: getattr(self, axis) for axis in kept})

    def __str__(self) -> str:
        """Whatever is not plain, for a test's name; `named` reads it."""
        phrases = [_phrase(axis, getattr(self, axis)) for axis in AXES]
        return ", ".join(phrase for phrase in phrases if phrase) or "plain"


def named(name: str) -> "Case":
    """The case of a name."""
    plain = {axis: values[0] for axis, values in AXES.items()}
    spoken = {_phrase(axis, value): (axis, value) for axis in AXES for value in AXES[axis][1:]}
    return Case(**plain | dict(spoken[phrase] for phrase in name.split(", ")))


def _phrase(axis: str, value: Any) -> str:
    """A value in words; none for the plain one."""
    if value == AXES[axis][0]:
        return ""
    words = axis.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return value if axis in ("place", "model") else f"{words} {value}"


Values = Mapping[str, Any]
Pair = frozenset[tuple[str, Any]]

# What `fits` looks at; the other axes go with everything.
_BOUND = ("llm_dp", "encoder_dp", "place", "encoder_tp", "encoder_cp", "encoder_pp", "llm_tp")
_BOUND += ("llm_cp", "llm_pp", "llm_ep", "expt_tp", "model", "packed", "sequence_parallel")


def fits(values: Values) -> bool:
    """Whether values of the bound axes can be in one run."""
    encoder = values["encoder_tp"] * values["encoder_cp"]
    encoder *= values["encoder_pp"] * values["encoder_dp"]
    stage = values["llm_tp"] * values["llm_cp"] * values["llm_dp"]
    llm = stage * values["llm_pp"]
    experts = values["llm_ep"] * values["expt_tp"]
    colocated = values["place"] == "colocated"
    has_experts = values["model"] == "hybrid"
    return (
        (llm if colocated else encoder + llm) <= MOST_RANKS
        and (not colocated or encoder == llm)
        and stage % experts == 0
        and (experts == 1 or has_experts)
        # megatron-core's experts need it.
        and (values["sequence_parallel"] or values["llm_tp"] == 1 or not has_experts)
    )


def pairs(values: Values) -> set[Pair]:
    """Every two values of a run."""
    return set(map(frozenset, itertools.combinations(values.items(), 2)))


def possible_pairs() -> set[Pair]:
    """Every two values that some run can have."""
    found: set[Pair] = set()
    for values in bound_values():
        found |= pairs(values)
    free = [(axis, value) for axis in AXES if axis not in _BOUND for value in AXES[axis]]
    bound = {one for pair in found for one in pair}
    found |= {frozenset((one, other)) for one in free for other in bound}
    return found | {
        frozenset(two) for two in itertools.combinations(free, 2) if two[0][0] != two[1][0]
    }


def bound_values() -> list[dict[str, Any]]:
    """All that fits of the bound axes."""
    choices = itertools.product(*(AXES[axis] for axis in _BOUND))
    every = (dict(zip(_BOUND, chosen, strict=True)) for chosen in choices)
    return [values for values in every if fits(values)]


def choose(seed: int) -> list[dict[str, Any]]:
    """A set of runs in which every possible pair meets, each taken for what it adds."""
    chance = random.Random(seed)
    left = possible_pairs()
    everything = bound_values()
    free = [axis for axis in AXES if axis not in _BOUND]
    runs = []
    while left:
        best: tuple[float, dict[str, Any]] = (-math.inf, {})
        wanted = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        fitting = [v for v in everything if all(v.get(a, x) == x for a, x in wanted.items())]
        for values in chance.sample(fitting, min(300, len(fitting))):
            run = values | {axis: chance.choice(AXES[axis]) for axis in free} | wanted
            # What is frozen hides faults, and ranks cost.
            worth = len(pairs(run) & left) - 8 * bool(run["frozen"]) - 0.5 * ranks(run)
            best = max(best, (worth, run), key=lambda one: one[0])
        runs.append({axis: best[1][axis] for axis in AXES})
        left -= pairs(best[1])
    return runs


def ranks(values: Values) -> int:
    """Processes of a run."""
    return Case(**values).layout.world_size


def _read() -> list[Case]:
    lines = Path(__file__).with_suffix(".txt").read_text().splitlines()
    return [named(line) for line in lines if line and not line.startswith("#")]


CASES = _read()

if __name__ == "__main__":
    tries = [choose(seed) for seed in range(30)]
    for chosen in min(tries, key=lambda runs: sum(ranks(run) + 2 for run in runs)):
        print(Case(**chosen))

"""The rules of the report, most urgent first: numbers, data, waits, balance.

Each is a function of the measurements and a threshold. A flag is suggested only with a value that
the run with its other flags can take; otherwise there are words.
"""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import isfinite

from megatron_mimo.tools.report.conclusions import Conclusion, Rule
from megatron_mimo.tools.report.measured import Measured
from megatron_mimo.tools.words import in_words
from megatron_mimo.topology import Layout, ModuleGridSpec
from megatron_mimo.watch.rank_report import Part

# Of a source's ranks, once fewer are left: room for steps in which it has more to do.
_BUSY = 0.9
# Iterations from which on clipping is judged: before, gradients are large in any run.
_LEAST_CLIPPED = 200
_LEAST_CLIPPED_POINTS = 20
_NEARLY_ALWAYS = 0.95
_LEAST_SCALED = 50
_LEAST_VALIDATIONS = 4
_HALF = 0.5
# Share of a step that both sides wait where they compute in turns.
_TURNS = 0.2
_FEWER = {2: "half as many", 3: "a third as many", 4: "a quarter as many"}

Flags = Mapping[str, object]


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.1 else f"{share * 100:.1f} %"


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


# -- numbers ---------------------------------------------------------------------------------------


def _not_finite(run: Measured, threshold: float) -> Iterator[Conclusion]:
    lost = sum(run.curves.get("nan_iterations", {}).values())
    if run.flags.get("fp16") or lost <= threshold:
        return
    first = next(at for at, value in run.curves["nan_iterations"].items() if value)
    rate, least = run.flags.get("lr"), run.flags.get("min-lr") or 0.0
    updates = "update was" if lost == 1 else "updates were"
    yield Conclusion(
        found=f"{lost:,.0f} {updates} left out because the loss or a gradient was not finite, "
        f"first by iteration {first:,}",
        advice="look at the samples and the learning rate before it",
        flags={"lr": f"{rate / 2:g}"} if rate and rate / 2 >= least else {},
    )


def _loss_scale(run: Measured, threshold: float) -> Iterator[Conclusion]:
    skipped = sum(run.curves.get("skipped_iterations", {}).values())
    if not run.flags.get("fp16") or run.iterations < _LEAST_SCALED:
        return
    share = skipped / run.iterations
    if share <= threshold:
        return
    scales = [value for value in run.curves.get("loss-scale", {}).values() if isfinite(value)]
    flags: dict[str, object] = {}
    if run.flags.get("loss-scale") is None and scales:
        lowest, least = min(scales), run.flags.get("min-loss-scale") or 0.0
        if least <= lowest < (run.flags.get("initial-loss-scale") or 0.0):
            flags = {"initial-loss-scale": f"{lowest:g}"}
    yield Conclusion(
        found=f"{_percent(share)} of the updates ({skipped:,.0f}) were skipped because the loss "
        f"scale was too high for float16",
        advice="" if flags else "train in bfloat16 with --bf16 where the hardware has it",
        flags=flags,
    )


def _clipped(run: Measured, threshold: float) -> Iterator[Conclusion]:
    most = run.flags.get("clip-grad")
    norms = [value for value in run.steady.get("grad-norm", {}).values() if isfinite(value)]
    norms = norms[len(norms) // 2 :]
    if not most or run.iterations < _LEAST_CLIPPED or len(norms) < _LEAST_CLIPPED_POINTS:
        return
    share = sum(norm > most * threshold for norm in norms) / len(norms)
    if share < _NEARLY_ALWAYS:
        return
    usual = statistics.median(norms)
    yield Conclusion(
        found=f"the gradients of the second half of the run were clipped to a fraction of "
        f"their length nearly always: the norm is about {usual:.3g}, the bound {most:g}",
        advice="lower --lr if the loss is not smooth, else raise the bound",
        flags={"clip-grad": f"{usual:.1g}"},
    )


def _validation(run: Measured, threshold: float) -> Iterator[Conclusion]:
    held_out = {
        at: value
        for at, value in run.curves.get("lm loss validation", {}).items()
        if isfinite(value)
    }
    if len(held_out) < _LEAST_VALIDATIONS:
        return
    best = min(held_out, key=lambda at: held_out[at])
    last = max(held_out)
    rise = held_out[last] / held_out[best] - 1 if held_out[best] > 0 else 0.0
    # At least two evaluations in a row are above the best one.
    if rise <= threshold or sum(at > best for at in held_out) < 2:
        return
    train = [(at, v) for at, v in run.curves["lm loss"].items() if isfinite(v)]
    window = max(1, len(train) // 10)
    before = [value for at, value in train if at <= best][-window:]
    after = [value for _, value in train][-window:]
    if not before or statistics.fmean(after) >= statistics.fmean(before):
        return
    warmup = run.flags.get("lr-warmup-iters") or 0
    iters = run.flags.get("train-iters")
    ends = {"train-iters": best} if iters and warmup < best < iters else {}
    yield Conclusion(
        found=f"the held-out loss rose by {_percent(rise)} from its lowest, "
        f"{held_out[best]:.4g} at iteration {best:,}, while the training loss went on falling: "
        f"the model begins to know its samples by heart",
        advice=f"use a checkpoint of about iteration {best:,}, or add samples",
        flags=ends,
    )


# -- data ------------------------------------------------------------------------------------------


def _skipped(run: Measured, threshold: float) -> Iterator[Conclusion]:
    skipped = run.curves.get("data/skipped samples", {})
    consumed = run.curves.get("consumed_samples", {})
    if not skipped or not consumed:
        return
    lost, used = skipped[max(skipped)], consumed[max(consumed)]
    share = lost / (lost + used) if lost + used else 0.0
    if share > threshold:
        path = run.flags.get("data-path")
        yield Conclusion(
            found=f"{lost:,.0f} samples were left out, {_percent(share)} of those read",
            advice=f"see why with `megatron-mimo data inspect {path}`"
            if path
            else "see why with `megatron-mimo data inspect`",
        )


def _slow_loader(run: Measured, threshold: float) -> Iterator[Conclusion]:
    if run.flags.get("dataset-provider") != "energon":
        return
    shares = {module: run.share(module, Part.DATA) for module in run.modules}
    module = max(shares, key=lambda name: shares[name], default=None)
    if module is None or shares[module] <= threshold:
        return
    workers = run.flags.get("num-workers") or 0
    processes = run.flags.get("loader-processes")
    flags: dict[str, object] = {}
    advice = f"measure it with `megatron-mimo data bench {run.flags.get('data-path')}`"
    if workers == 0:
        flags = {"num-workers": 2}
        advice = f"{advice}, as it is read in the training process"
    elif processes is not None and processes < workers:
        flags = {"loader-processes": min(workers, max(1, 2 * processes))}
    yield Conclusion(
        found=f"the {in_words(module)}'s ranks wait for samples {_percent(shares[module])} of a "
        f"step: the loader is too slow",
        advice=advice,
        flags=flags,
    )


def _packing(run: Measured, threshold: float) -> Iterator[Conclusion]:
    fill = run.median("packing fill")
    size = run.flags.get("packing-buffer-size")
    if fill is None or 1 - fill <= threshold:
        return
    yield Conclusion(
        found=f"{_percent(1 - fill)} of the positions of packed sequences are padding",
        advice="choose among more samples, or shorten --seq-length",
        flags={"packing-buffer-size": 2 * size} if size and size < 100_000 else {},
    )


# -- waits -----------------------------------------------------------------------------------------


def _source_waits(run: Measured, threshold: float) -> Iterator[Conclusion]:
    if run.layout is None:
        return
    alone = run.microbatches == 1
    if alone and run.share(run.layout.target.name, Part.BRIDGE) > _TURNS:
        return  # Which side is slower shows when both may compute at the same time.
    for source in run.disjoint_sources:
        waits = run.share(source.name, Part.BRIDGE)
        if waits <= threshold:
            continue
        busy = run.share(source.name, Part.COMPUTE)
        # Fewer replicas compute for longer, in the time in which all of them wait today.
        needed = max(1, math.ceil(source.dp * busy / (_BUSY * (busy + waits))))
        fewer = next((dp for dp in range(needed, source.dp) if source.dp % dp == 0), source.dp)
        flags, ranks = (
            _resized(run.layout, source.name, dp=fewer, fixed_offsets=run.fixed_offsets)
            if fewer < source.dp
            else ({}, 0)
        )
        found = (
            f"the {in_words(source.name)}'s ranks wait for the language model {_percent(waits)} "
            f"of a step"
        )
        if flags:
            share = _FEWER.get(source.dp // fewer, f"{fewer} replicas instead of {source.dp}")
            longer = _percent(busy * (source.dp / fewer - 1))
            yield Conclusion(
                found=f"{found}: {share} would do, on {_ranks(ranks)} in all",
                advice=f"a step, which has one microbatch, may take {longer} longer"
                if alone
                else "",
                flags=flags,
            )
        else:
            yield Conclusion(
                found=f"{found}, which is the slower side",
                advice="give the language model more ranks",
            )


def _target_waits(run: Measured, threshold: float) -> Iterator[Conclusion]:
    sources = run.disjoint_sources
    if not sources or run.layout is None or (run.microbatches or 0) < 2:
        return
    waits = run.share(run.layout.target.name, Part.BRIDGE)
    if waits <= threshold:
        return
    found = f"the language model's ranks wait for rows {_percent(waits)} of a step"
    # The one that computes for longest is the one that is waited for.
    slowest = max(sources, key=lambda source: run.share(source.name, Part.COMPUTE))
    name = in_words(slowest.name)
    if run.share(slowest.name, Part.BRIDGE) > threshold:
        ahead = run.flags.get("encoder-run-ahead")
        yield Conclusion(
            found=f"{found}, and the {name}'s ranks wait too: their times vary from microbatch to "
            f"microbatch",
            advice="let the source work further ahead",
            flags={"encoder-run-ahead": 3} if ahead is not None and ahead < 3 else {},
        )
        return
    flags, ranks = _resized(
        run.layout, slowest.name, dp=2 * slowest.dp, fixed_offsets=run.fixed_offsets
    )
    yield Conclusion(
        found=f"{found}: the {name} is the slower side",
        advice=f"give it more ranks, {_ranks(ranks)} in all" if flags else "give it more ranks",
        flags=flags,
    )


def _one_microbatch(run: Measured, threshold: float) -> Iterator[Conclusion]:
    if run.microbatches != 1 or run.layout is None:
        return
    target = run.share(run.layout.target.name, Part.BRIDGE)
    for source in run.disjoint_sources:
        waits = min(run.share(source.name, Part.BRIDGE), target)
        if waits > threshold:
            advice, flags = _more_microbatches(run)
            yield Conclusion(
                found=f"{in_words(source.name)} and language model take turns: a step has one "
                f"microbatch for each lane, so that each waits at least {_percent(waits)} of a "
                f"step for the other",
                advice=advice,
                flags=flags,
            )


def _bubble(run: Measured, threshold: float) -> Iterator[Conclusion]:
    if run.layout is None or run.microbatches is None:
        return
    for name, grid in run.layout.modules.items():
        waits = run.share(name, Part.PIPELINE)
        if grid.pp < 2 or waits <= threshold:
            continue
        least = (grid.pp - 1) / (run.microbatches + grid.pp - 1)
        found = (
            f"the stages of the {in_words(name)} wait for each other {_percent(waits)} of a step"
        )
        if least > waits * _HALF:
            advice, flags = _more_microbatches(run)
            yield Conclusion(
                found=f"{found}: with {run.microbatches} microbatches for {grid.pp} stages "
                f"{_percent(least)} cannot be avoided",
                advice=advice,
                flags=flags,
            )
        else:
            yield Conclusion(
                found=f"{found}, and {_percent(least)} would do for {run.microbatches} "
                f"microbatches: a stage is slower than the others",
                advice="look at the timeline, and move layers between the stages",
            )


def _gradients(run: Measured, threshold: float) -> Iterator[Conclusion]:
    if run.layout is None:
        return
    for name, grid in run.layout.modules.items():
        share = run.share(name, Part.GRADIENTS)
        if grid.dp * grid.cp < 2 or share <= threshold:
            continue
        overlaps = run.flags.get("overlap-grad-reduce")
        flags: dict[str, object] = {}
        if grid is run.layout.target and not overlaps:
            flags = {"overlap-grad-reduce": True}
        elif run.flags.get("global-batch-size"):
            flags = {"global-batch-size": 2 * run.flags["global-batch-size"]}
        yield Conclusion(
            found=f"the replicas of the {in_words(name)} spend {_percent(share)} of a step on "
            f"summing gradients",
            flags=flags,
        )


def _straggler(run: Measured, threshold: float) -> Iterator[Conclusion]:
    timeline = run.timeline
    if timeline is None or run.layout is None or len(timeline.iterations) < 2:
        return
    computed: dict[tuple[int, int], float] = {}
    for bar in timeline.bars:
        if bar.part is Part.COMPUTE:
            at = bar.rank, bar.iteration
            computed[at] = computed.get(at, 0.0) + bar.duration
    peers: dict[object, list[int]] = {}
    for rank in timeline.roles:
        if rank < run.layout.world_size:
            peers.setdefault(run.layout.stages_of(rank), []).append(rank)
    for ranks in peers.values():
        for rank in ranks:
            others = [other for other in ranks if other != rank]
            excess = (
                [
                    computed.get((rank, at), 0.0) / usual - 1
                    for at in timeline.iterations
                    if (usual := statistics.median(computed.get((o, at), 0.0) for o in others)) > 0
                ]
                if len(others) > 1
                else []
            )
            # Not in one iteration alone, in which its samples may be larger.
            if excess and min(excess) > threshold:
                yield Conclusion(
                    found=f"{timeline.roles[rank]} computes at least {_percent(min(excess))} "
                    f"longer than its peers in every traced iteration, and all others wait for it",
                    advice="look at its machine with `megatron-mimo doctor`, and at the balance "
                    "of images and experts below",
                )


def _checkpoints(run: Measured, threshold: float) -> Iterator[Conclusion]:
    stalled = sum(run.curves.get("time/checkpoints ms", {}).values())
    stepped = sum(filter(isfinite, run.curves.get("iteration-time-ms", {}).values()))
    share = stalled / (stalled + stepped) if stalled else 0.0
    if share <= threshold:
        return
    interval = run.flags.get("save-interval")
    flags: dict[str, object] = {}
    if run.flags.get("save") and not run.flags.get("async-save"):
        flags = {"async-save": True}
    elif interval:
        flags = {"save-interval": 2 * interval}
    yield Conclusion(
        found=f"training stood still for {_percent(share)} of the time, while checkpoints were "
        f"written",
        flags=flags,
    )


# -- balance ---------------------------------------------------------------------------------------


def _unbalanced(run: Measured, threshold: float) -> Iterator[Conclusion]:
    for name, tag in run.matching("balance/", " rows max over mean"):
        ratio = run.median(tag)
        if ratio is not None and ratio > threshold:
            advice, flags = _more_microbatches(run, batch=True)
            if run.flags.get("encoder-dispatch") == "lane":
                advice, flags = "", {"encoder-dispatch": "balanced"}
            yield Conclusion(
                found=f"the fullest replica of the {in_words(name)} has {ratio:.1f} times its even "
                f"share of rows, and the others wait for it",
                advice=advice,
                flags=flags,
            )


def _experts(run: Measured, threshold: float) -> Iterator[Conclusion]:
    curve = run.steady.get("experts/max over mean load", {})
    late = [value for value in list(curve.values())[len(curve) // 2 :] if isfinite(value)]
    if len(late) < 2 or statistics.median(late) <= threshold:
        return
    fields = [text.partition("=")[0] for text in run.flags.get("override") or ()]
    name = "language.moe_aux_loss_coeff"
    preset = str(run.flags.get("model-provider")).startswith("nemotron")
    yield Conclusion(
        found=f"the fullest expert of a layer has {statistics.median(late):.1f} times the mean "
        f"load in the second half of the run",
        advice="" if preset and name not in fields else f"raise {name}",
        flags={"override": f"{name}=1e-3"} if preset and name not in fields else {},
    )


# -- flags -----------------------------------------------------------------------------------------


def _more_microbatches(run: Measured, *, batch: bool = False) -> tuple[str, Flags]:
    """Advice and flags that double the microbatches of a step.

    Args:
        run: Measurements of the run.
        batch: Whether only a larger global batch will do.
    """
    size, whole = run.flags.get("micro-batch-size"), run.flags.get("global-batch-size")
    if not size or not whole:
        return "train with more microbatches in a step", {}
    if size % 2 == 0 and not batch:
        return "", {"micro-batch-size": size // 2}
    return (
        "more samples in a step even this out; they also change the training",
        {"global-batch-size": 2 * whole},
    )


def _resized(layout: Layout, name: str, *, dp: int, fixed_offsets: bool) -> tuple[Flags, int]:
    """Flags of a source with another number of replicas, and the number of ranks then; or none."""
    placed: list[ModuleGridSpec] = []
    before = 0
    try:
        for grid in layout.modules.values():
            # Only grids that follow each other can be moved by the size of one.
            if grid.offset != before:
                return {}, 0
            before += grid.size
            changed = replace(grid, dp=dp) if grid.name == name else grid
            placed.append(replace(changed, offset=sum(each.size for each in placed)))
        after = Layout.of(*placed, world_size=sum(each.size for each in placed))
    except ValueError:
        return {}, 0
    flags: dict[str, object] = {}
    of_others = []
    for new in after.modules.values():
        old = layout.modules[new.name]
        axes = ("dp", "offset") if fixed_offsets else ("dp",)
        for axis in (axis for axis in axes if getattr(old, axis) != getattr(new, axis)):
            if new.name in ("encoder", "llm"):
                flags[f"{new.name}-{axis}"] = getattr(new, axis)
            else:
                of_others.append(f"{new.name}.{axis}={getattr(new, axis)}")
    if of_others:
        flags["grid"] = " --grid ".join(of_others)
    return flags, after.world_size


RULES = (
    Rule(
        name="steps not finite",
        threshold=0,
        percent=False,
        fires="more than {} updates were left out because a loss or gradient was not finite, "
        "without `--fp16`",
        tries="half the `--lr`",
        find=_not_finite,
    ),
    Rule(
        name="loss scale",
        threshold=0.05,
        fires="`--fp16` skipped more than {} of the updates, from iteration 50 on",
        tries="the lowest scale of the run as `--initial-loss-scale`, or `--bf16`",
        find=_loss_scale,
    ),
    Rule(
        name="validation rises",
        threshold=0.05,
        fires="the held-out loss is more than {} above its lowest, two evaluations or more after "
        "it, and the training loss has fallen since",
        tries="a checkpoint of that iteration, or that `--train-iters`",
        find=_validation,
    ),
    Rule(
        name="clipped nearly always",
        threshold=3,
        percent=False,
        fires="19 of 20 gradient norms of the second half are more than {} times `--clip-grad`, "
        "from iteration 200 on",
        tries="a lower `--lr`, or a `--clip-grad` as high as the usual norm",
        find=_clipped,
    ),
    Rule(
        name="skipped samples",
        threshold=0.01,
        fires="more than {} of the samples that were read were left out",
        tries="`megatron-mimo data inspect`",
        find=_skipped,
    ),
    Rule(
        name="loader too slow",
        threshold=0.15,
        fires="ranks of a module wait for samples of a dataset more than {} of a step",
        tries="`megatron-mimo data bench`; `--num-workers`, or more `--loader-processes`",
        find=_slow_loader,
        of_times=True,
    ),
    Rule(
        name="encoder waits",
        threshold=0.5,
        fires="a source's last stage, on ranks of its own, waits at the bridge more than {} of a "
        "step",
        tries="the smaller `--encoder-dp` that would still keep up, or more ranks for the language "
        "model",
        find=_source_waits,
        of_times=True,
    ),
    Rule(
        name="language model waits",
        threshold=0.3,
        fires="the language model's first stage waits at the bridge more than {} of a step of "
        "several microbatches",
        tries="twice the `--encoder-dp`; `--encoder-run-ahead 3` where both sides wait",
        find=_target_waits,
        of_times=True,
    ),
    Rule(
        name="one microbatch",
        threshold=_TURNS,
        fires="a step has one microbatch, and source and language model each wait more than {} of "
        "it for the other",
        tries="half the `--micro-batch-size`, or twice the `--global-batch-size`",
        find=_one_microbatch,
        of_times=True,
    ),
    Rule(
        name="pipeline bubble",
        threshold=0.3,
        fires="stages of a module wait for each other more than {} of a step",
        tries="half the `--micro-batch-size`, or twice the `--global-batch-size`; where "
        "microbatches are many, other boundaries between the stages",
        find=_bubble,
        of_times=True,
    ),
    Rule(
        name="sums of gradients",
        threshold=0.4,
        fires="replicas of a module spend more than {} of a step on summing gradients",
        tries="`--overlap-grad-reduce`, or twice the `--global-batch-size`",
        find=_gradients,
        of_times=True,
    ),
    Rule(
        name="straggling rank",
        threshold=0.3,
        fires="a rank computes more than {} longer than the median of two or more ranks of the "
        "same stage, in every traced iteration of two or more",
        tries="`megatron-mimo doctor` on its machine",
        find=_straggler,
    ),
    Rule(
        name="checkpoints stall",
        threshold=0.1,
        fires="training stands still for checkpoints more than {} of the time, the last one left "
        "out",
        tries="`--async-save`, or twice the `--save-interval`",
        find=_checkpoints,
        of_times=True,
    ),
    Rule(
        name="source unbalanced",
        threshold=1.6,
        percent=False,
        fires="the fullest replica of a source has more than {} times its even share of rows",
        tries="`--encoder-dispatch balanced`; with it, twice the `--global-batch-size`",
        find=_unbalanced,
        of_times=True,
    ),
    Rule(
        name="experts unbalanced",
        threshold=4,
        percent=False,
        fires="in the second half, the fullest expert of a layer has more than {} times the mean "
        "load",
        tries="a higher `language.moe_aux_loss_coeff`",
        find=_experts,
        of_times=True,
    ),
    Rule(
        name="padding",
        threshold=0.2,
        fires="more than {} of the positions of packed sequences are padding",
        tries="twice the `--packing-buffer-size`",
        find=_packing,
        of_times=True,
    ),
)
"""Every rule, in the order in which conclusions are shown."""

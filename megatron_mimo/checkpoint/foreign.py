"""Loading of weights from a checkpoint that is not this run's: one of Megatron, or of another run.

Transformer layers and language model have megatron-core's names in our checkpoints too. Other parts
of its `RADIOViTModel` and `MultimodalProjector` have different names, which the table below
translates. Both embed patches with pixels in the order (channel, y, x), so no weight is rearranged.
"""

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.collectives import check_whole, compare, listed, on_first_rank
from megatron_mimo.checkpoint.sharded_files import read
from megatron_mimo.checkpoint.start import weights_of
from megatron_mimo.checkpoint.tensors import Replica, base_reads
from megatron_mimo.modules.language.adapter import STORED_PREFIX
from megatron_mimo.modules.radio.adapter import STORED_PREFIXES
from megatron_mimo.optim.train_state import TrainState
from megatron_mimo.weights.names import separate_name
from megatron_mimo.weights.torch_dist import StoredTensor, describe

logger = logging.getLogger(__name__)

_VISION, _PROJECTOR = STORED_PREFIXES["vision."], STORED_PREFIXES["projector."]
_LANGUAGE = STORED_PREFIX
_PREFIXES = (_VISION, _PROJECTOR, _LANGUAGE)
# Part of the model -> beginnings of names that only our checkpoints have, and only Megatron's.
_MARKS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    _VISION: (("embedding.",), ("embedder.", "position_embeddings")),
    _PROJECTOR: (("mlp.", "linear."), ("encoder.",)),
}
_POSITION = f"{_VISION}position_embeddings"
# Beginning of a name, ours -> Megatron's, of which a checkpoint has one.
_TABLE: Mapping[str, tuple[str, ...]] = {
    f"{_VISION}embedding.projection.": (f"{_VISION}embedder.",),
    f"{_VISION}embedding.position": (_POSITION,),
    f"{_VISION}embedding.class_token": (f"{_VISION}class_token",),
    f"{_VISION}decoder.final_layernorm.": (
        f"{_VISION}decoder.final_layernorm.",
        f"{_VISION}ln_post.",
    ),
    # Fused into the next linear layer: that of an MLP, or the affine layer itself.
    f"{_PROJECTOR}norm.": (
        f"{_PROJECTOR}encoder.linear_fc1.layer_norm_",
        f"{_PROJECTOR}encoder.layer_norm_",
    ),
    f"{_PROJECTOR}mlp.": (f"{_PROJECTOR}encoder.",),
    f"{_PROJECTOR}linear.": (f"{_PROJECTOR}encoder.",),
}
_STACKED = re.compile(r"(.*\.decoder\.layers\.)(?!\d)(.*)")
# Tensors of a checkpoint that must not be left out, as the model would compute something else: the
# reason, and what to do.
_LAST_NORM = "a norm after the last layer: expected one, vision.final_layernorm=true makes it"
_NO_LAYER = "of a layer, or a part of one, that this model has not"
_PATCH_BIAS = "a bias of patches: --override vision.patch_bias=true"
_FIRST_NORM = "a norm in front: --override projector.normalization=RMSNorm, or LayerNorm"
_NEEDED: Mapping[str, str] = {
    f"{_VISION}ln_pre.": "a norm in front of the first layer, which the encoder here has not",
    f"{_VISION}ln_post.": _LAST_NORM,
    f"{_VISION}decoder.final_layernorm.": _LAST_NORM,
    f"{_VISION}decoder.": _NO_LAYER,
    f"{_LANGUAGE}decoder.": _NO_LAYER,
    f"{_VISION}embedder.bias": _PATCH_BIAS,
    f"{_VISION}embedding.projection.bias": _PATCH_BIAS,
    f"{_PROJECTOR}norm.": _FIRST_NORM,
    f"{_PROJECTOR}encoder.linear_fc1.layer_norm_": _FIRST_NORM,
    f"{_PROJECTOR}encoder.layer_norm_": _FIRST_NORM,
}
_BIAS = re.compile(rf"{re.escape(_PROJECTOR)}(encoder|mlp|linear)\.(linear_fc[12]\.)?bias")
_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|.*_extra_state(/|$)")


def load_nemotron(state: TrainState, path: Path, *, trust: bool = False) -> None:
    """Load every weight of a flat checkpoint of a Nemotron vision-language model.

    Collective over the world; each rank reads its own shards. Nothing changes before all ranks have
    found every name and shape that they need.

    Args:
        state: State of this rank, freshly built.
        path: Path to a root with a tracker, or to the folder of one iteration.
        trust: Whether files may run code.

    Raises:
        ValueError: There is no checkpoint, or it lacks tensors of the model; the message lists
            them.
    """
    fill_nemotron(
        state.model.replicas,
        path,
        state.topology.control,
        text_alone=not state.topology.layout.sources,
        trust=trust,
    )
    # The optimizer has copies of the initial weights.
    state.optimizer.refresh_main_params()


def fill_nemotron(
    replicas: Iterable[Replica],
    path: Path,
    control: dist.ProcessGroup,
    *,
    text_alone: bool,
    trust: bool = False,
) -> None:
    """As `load_nemotron`, for modules without an optimizer.

    Args:
        replicas: Modules on this rank.
        path: Path to a root with a tracker, or to the folder of one iteration.
        control: Group of the ranks.
        text_alone: Whether the language model is the only module of the run.
        trust: Whether files may run code.

    Raises:
        ValueError: There is no checkpoint, or it lacks tensors of the model; the message lists
            them.
    """
    wanted = (_LANGUAGE,) if text_alone else _PREFIXES
    flag = "--load-nemotron-checkpoint"
    _load(replicas, path, control, flag, wanted, roots=("",), trust=trust)


def load_vision(state: TrainState, path: Path, *, trust: bool = False) -> None:
    """Load the vision encoder of a checkpoint, without its projector, as `load_nemotron` does.

    Args:
        state: State of this rank, freshly built, with an encoder.
        path: Path to a root with a tracker, or to the folder of one iteration; names of its tensors
            begin with `model.vision_model.`, or with `vision_model.`.
        trust: Whether files may run code.

    Raises:
        ValueError: There is no checkpoint, or it lacks tensors of the vision encoder; the message
            lists them.
    """
    replicas, control = state.model.replicas, state.topology.control
    roots = ("model.", "")
    _load(replicas, path, control, "--load-vision-from", (_VISION,), roots=roots, trust=trust)
    # The optimizer has copies of the initial weights.
    state.optimizer.refresh_main_params()


def _load(
    replicas: Iterable[Replica],
    path: Path,
    control: dist.ProcessGroup,
    flag: str,
    modules: tuple[str, ...],
    *,
    roots: tuple[str, ...],
    trust: bool,
) -> None:
    start = time.perf_counter()
    folder: Path = on_first_rank(control, lambda: weights_of(path, flag))
    # Our checkpoints have one, Megatron's have none.
    if on_first_rank(control, (folder / folders.CHECKSUMS).is_file):
        check_whole(folder, control)
    described = describe(folder, trust=trust)
    stored = described.tensors
    root = _root(stored, f"{flag} {folder}", modules, roots)
    tensors = {key.removeprefix(root): tensor for key, tensor in stored.items()} if root else stored
    foreign = {module: _is_foreign(tensors, f"{flag} {folder}", module) for module in modules}
    wanted = [
        _found(part, tensors, foreign=foreign[module])
        for replica in replicas
        for part in base_reads(replica)
        for module in modules
        if part.key.startswith(module)
    ]
    _require(wanted, tensors, f"{flag} {folder}", modules, control)
    read([replace(part, key=root + part.key) for part in wanted], described, trust=trust)
    logger.info(
        "loaded %s of %s [ %.1f s ]",
        ", ".join(f"{root}{module}*" for module in modules),
        folder,
        time.perf_counter() - start,
    )


def _root(
    stored: Mapping[str, StoredTensor], where: str, modules: tuple[str, ...], roots: tuple[str, ...]
) -> str:
    """Common beginning of all names.

    Raises:
        ValueError: There is no such beginning, or there are several.
    """
    held = [root for root in roots if any(key.startswith(root + modules[0]) for key in stored)]
    if len(held) == 1:
        return held[0]
    expected = " or ".join(f"{root}{modules[0]}*" for root in roots)
    if held:
        raise ValueError(f"{where} holds both {expected}: expected one of them")
    tops = sorted({key.split(".")[0] for key in stored if not _NOT_WEIGHTS.match(key)})
    shown = ", ".join(f"{top}.*" for top in tops) or "no weights"
    raise ValueError(f"{where} holds {shown}: expected {expected}")


def _is_foreign(stored: Mapping[str, StoredTensor], where: str, module: str) -> bool:
    """Whether a part of the model has Megatron's names, and not ours.

    Raises:
        ValueError: The part has neither, or both.
    """
    if module not in _MARKS:
        return False
    marks = [tuple(module + mark for mark in side) for side in _MARKS[module]]
    ours, theirs = (any(key.startswith(side) for key in stored) for side in marks)
    if ours == theirs:
        either, or_else = ("both", "and") if ours else ("neither", "nor")
        raise ValueError(
            f"{where} holds {module}* {either} by the names of this program "
            f"({', '.join(f'{mark}*' for mark in marks[0])}) {or_else} by Megatron's "
            f"({', '.join(f'{mark}*' for mark in marks[1])}): expected one of them"
        )
    return theirs


def _found(
    part: ShardedTensor, stored: Mapping[str, StoredTensor], *, foreign: bool
) -> ShardedTensor:
    """The tensor that a rank needs, in the form of a checkpoint; the usual form if it has none."""
    forms = list(_forms(part, foreign=foreign))
    return next((form for form in forms if form.key in stored), forms[0])


def _forms(part: ShardedTensor, *, foreign: bool) -> Iterator[ShardedTensor]:
    """The same memory under every possible name, the usual one first."""
    for key in list(_keys(part.key, foreign=foreign)):
        if key == _POSITION:
            yield _reshaped(part, key, leading=(1,), dropped=0)
            continue
        yield replace(part, key=key)
        if stacked := _STACKED.fullmatch(key):
            # Layer by layer, as Megatron stores layers of different kinds.
            (layer, *_) = part.global_offset
            yield _reshaped(part, f"{stacked[1]}{layer}.{stacked[2]}", leading=(), dropped=1)


def _keys(key: str, *, foreign: bool) -> Iterator[str]:
    names = [key]
    if foreign:
        for ours, theirs in _TABLE.items():
            if key.startswith(ours):
                names = [other + key.removeprefix(ours) for other in theirs]
    for name in names:
        yield name
        if (separate := separate_name(name)) != name and ".decoder.layers." in name:
            yield separate


def _reshaped(
    part: ShardedTensor, key: str, *, leading: tuple[int, ...], dropped: int
) -> ShardedTensor:
    """A part of a tensor with other leading dimensions, all of size one."""
    assert part.data is not None
    assert part.local_shape[:dropped] == (1,) * dropped, part
    shape = leading + part.local_shape[dropped:]
    return replace(
        part,
        key=key,
        data=part.data.view(shape),
        local_shape=shape,
        global_shape=leading + part.global_shape[dropped:],
        global_offset=(0,) * len(leading) + part.global_offset[dropped:],
    )


def _require(
    wanted: list[ShardedTensor],
    stored: Mapping[str, StoredTensor],
    where: str,
    modules: tuple[str, ...],
    control: dist.ProcessGroup,
) -> None:
    """Refuse a checkpoint that lacks tensors, or has some that cannot be left out; log the others.

    Raises:
        ValueError: Tensors are missing, have another shape, or have no place here; the message
            lists them.
    """
    faults, asked = compare(wanted, stored, control)
    whole = len(modules) == len(_PREFIXES)
    others = sorted(
        key
        for key in stored.keys() - asked
        if not _NOT_WEIGHTS.match(key) and (whole or key.startswith(modules))
    )
    faults += [f"{key} is {why}" for key in others if (why := _needed(key, modules)) is not None]
    if faults:
        raise ValueError(
            f"{where} does not hold what this model asks for: {listed(faults, '; ')}. Check "
            f"--model-provider, --override and the tokenizer's size; nothing was loaded"
        )
    if others:
        logger.warning(
            "%d tensors of %s are not of this model: %s", len(others), where, listed(others, ", ")
        )


def _needed(key: str, modules: tuple[str, ...]) -> str | None:
    """Reason why a tensor cannot be left out; None where it can."""
    if not key.startswith(modules):
        return None
    if _BIAS.fullmatch(key):
        return "a bias: --override projector.bias=true"
    return next((why for name, why in _NEEDED.items() if key.startswith(name)), None)

"""Weights of a checkpoint that is not this run's, into its modules: Megatron's own, or another's.

Decoder and language model have megatron-core's names in our checkpoints too. Around the decoder its
`RADIOViTModel` and `MultimodalProjector` use others, which the table below translates. Both embed
patches whose pixels stand in the order (channel, y, x), so that no weight is rearranged.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.agreement import check_whole, compare, listed, on_first_rank
from megatron_mimo.checkpoint.checkpointer import TrainedParts
from megatron_mimo.checkpoint.tensors import PREFIXES, reads
from megatron_mimo.runtime.sharded_files import StoredTensor, read, stored_tensors

logger = logging.getLogger(__name__)

_VISION, _PROJECTOR, _LANGUAGE = PREFIXES.values()
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
    # Fused into the linear layer behind it: of an MLP, or the affine layer itself.
    f"{_PROJECTOR}norm.": (
        f"{_PROJECTOR}encoder.linear_fc1.layer_norm_",
        f"{_PROJECTOR}encoder.layer_norm_",
    ),
    f"{_PROJECTOR}mlp.": (f"{_PROJECTOR}encoder.",),
    f"{_PROJECTOR}linear.": (f"{_PROJECTOR}encoder.",),
}
# A layer's norms, which Transformer Engine fuses into the linear layer behind them.
_NORMS: Mapping[str, str] = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_STACKED = re.compile(r"(.*\.decoder\.layers\.)(?!\d)(.*)")
# What of a checkpoint must not be left out, for the model would compute something else: why, and
# what to do.
_LAST_NORM = "a norm behind the last layer: expected one, vision.final_layernorm=true makes it"
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


def load_nemotron(parts: TrainedParts, path: Path) -> None:
    """Begin with every weight of a flat checkpoint of a Nemotron vision-language model.

    Collective over the world; each rank reads what it holds. Nothing changes before all ranks have
    found every name and shape that they ask for.

    Args:
        parts: Freshly built.
        path: A root with a tracker, or the folder of one iteration.

    Raises:
        ValueError: There is no checkpoint, or it does not hold what the model asks for; lists it.
    """
    has_encoder = parts.topology.layout.encoder is not None
    wanted = (_VISION, _PROJECTOR, _LANGUAGE) if has_encoder else (_LANGUAGE,)
    _load(parts, path, "--load-nemotron-checkpoint", wanted, roots=("",))


def load_vision(parts: TrainedParts, path: Path) -> None:
    """Begin with the vision encoder of a checkpoint, without its projector; as `load_nemotron`.

    Args:
        parts: Freshly built, with an encoder.
        path: A root with a tracker, or the folder of one iteration; its names begin with
            `model.vision_model.`, or with `vision_model.`.

    Raises:
        ValueError: As `load_nemotron`.
    """
    _load(parts, path, "--load-vision-from", (_VISION,), roots=("model.", ""))


def find_checkpoint(path: Path, flag: str) -> Path:
    """The folder with a checkpoint's files.

    Args:
        path: A root with a tracker, or that folder.
        flag: That the path was given with.

    Raises:
        ValueError: Neither is there.
    """
    tracker = path / folders.TRACKER
    if tracker.is_file():
        # What Megatron's converters write.
        if tracker.read_text(encoding="utf-8").strip() == "release":
            return path / "release"
        iteration = folders.latest_iteration(path)
        assert iteration is not None
        return folders.iteration_folder(path, iteration)
    if (path / ".metadata").is_file():
        return path
    raise ValueError(
        f"{flag} {path} holds neither {folders.TRACKER} nor .metadata: expected a folder of "
        f"checkpoints in torch_dist format, or one of its iter_… folders"
    )


def _load(
    parts: TrainedParts, path: Path, flag: str, modules: tuple[str, ...], roots: tuple[str, ...]
) -> None:
    start, control = time.perf_counter(), parts.topology.control
    folder: Path = on_first_rank(control, lambda: find_checkpoint(path, flag))
    # Ours have one, Megatron's have none.
    if on_first_rank(control, (folder / folders.CHECKSUMS).is_file):
        check_whole(folder, control)
    stored, _ = stored_tensors(folder)
    root = _root(stored, f"{flag} {folder}", modules, roots)
    tensors = {key.removeprefix(root): tensor for key, tensor in stored.items()} if root else stored
    foreign = {module: _is_foreign(tensors, f"{flag} {folder}", module) for module in modules}
    wanted = [
        _found(part, tensors, foreign=foreign[module])
        for replica in parts.model.replicas
        for part in reads(replica)
        for module in modules
        if part.key.startswith(module)
    ]
    _require(wanted, tensors, f"{flag} {folder}", modules, control)
    read([replace(part, key=root + part.key) for part in wanted], folder)
    # The optimizer copied what the weights were initialised with.
    parts.optimizer.refresh_main_params()
    logger.info(
        "loaded %s of %s [ %.1f s ]",
        ", ".join(f"{root}{module}*" for module in modules),
        folder,
        time.perf_counter() - start,
    )


def _root(
    stored: Mapping[str, StoredTensor], where: str, modules: tuple[str, ...], roots: tuple[str, ...]
) -> str:
    """What stands in front of every name.

    Raises:
        ValueError: No module is there, or there are several.
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
        ValueError: It has neither, or both.
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
    """What a rank asks for, in the form that a checkpoint has; the usual one if it has none."""
    forms = list(_forms(part, foreign=foreign))
    return next((form for form in forms if form.key in stored), forms[0])


def _forms(part: ShardedTensor, *, foreign: bool) -> Iterator[ShardedTensor]:
    """The same memory under every name that it may have, the usual one first."""
    for key in list(_keys(part.key, foreign=foreign)):
        if key == _POSITION:
            yield _reshaped(part, key, leading=(1,), dropped=0)
            continue
        yield replace(part, key=key)
        if stacked := _STACKED.fullmatch(key):
            # Layer by layer, as Megatron stores those that are not all alike.
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
        for fused, separate in _NORMS.items():
            if ".decoder.layers." in name and fused in name:
                yield name.replace(fused, separate)


def _reshaped(
    part: ShardedTensor, key: str, *, leading: tuple[int, ...], dropped: int
) -> ShardedTensor:
    """A part of a tensor with other dimensions in front, all of size one."""
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
    """Refuse a checkpoint that lacks something, or has what cannot be left out; tell the rest.

    Raises:
        ValueError: Lists what is missing, has another shape, or has no place here.
    """
    faults, asked = compare(wanted, stored, control)
    whole = len(modules) == len(PREFIXES)
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
    """Why a tensor cannot be left out; None where it can."""
    if not key.startswith(modules):
        return None
    if _BIAS.fullmatch(key):
        return "a bias: --override projector.bias=true"
    return next((why for name, why in _NEEDED.items() if key.startswith(name)), None)

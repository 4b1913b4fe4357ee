"""What is asked: the settings and the weights of a run, or of a folder of transformers.

A checkpoint holds the flags of its run. Those that describe the model and its data are read again;
layout, training and logging do not matter to a model that answers in one process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.saved_run import saved_run
from megatron_mimo.config.flags import from_values
from megatron_mimo.config.model_file import HUGGING_FACE, table_size
from megatron_mimo.config.resolve import Resolved, resolve
from megatron_mimo.config.sections import TrainConfig
from megatron_mimo.data import Tokenizer, tokenizer_for
from megatron_mimo.data.config import DataConfig
from megatron_mimo.data.text.tokenizer import read_image_tokens
from megatron_mimo.media.images.input import tag_type
from megatron_mimo.model.hf import read_hf
from megatron_mimo.model.omni.config import is_omni, read_omni
from megatron_mimo.settings import declared
from megatron_mimo.weights.folder import WeightFolder

_CONFIG = "config.json"
# Flags of the model's section that change training, or how fast it is, but no answer; so does the
# scale of the loss.
TRAINING_ONLY = frozenset(
    {
        "training-stage",
        "freeze-vit",
        "freeze-lm",
        "freeze-projection",
        "freeze",
        "moe-router-force-load-balancing",
        "moe-grouped-gemm",
        "recompute-granularity",
        "recompute-modules",
        "init",
    }
)
# Those by which a run with adapters finds the weights that it did not change.
_OF_BASE = frozenset(
    {"training-stage", "freeze-vit", "freeze-lm", "freeze-projection", "freeze", "init"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A model with everything that its answers depend on, weights not read yet.

    Attributes:
        path: Folder of the weights: that of one checkpoint, or a folder of transformers.
        is_checkpoint: Whether it is a checkpoint.
        iteration: Iteration of the checkpoint; None for a folder.
        resolved: Checked settings, on a layout of one rank.
        data: Settings of prompts and items, without augmentation.
        tokenizer: Tokenizer of the texts.
        vocab_size: Number of rows of the embedding table, V.
    """

    path: Path
    is_checkpoint: bool
    iteration: int | None
    resolved: Resolved
    data: DataConfig
    tokenizer: Tokenizer
    vocab_size: int


def read_run(
    path: str | Path,
    *,
    tokenizer_model: str | None = None,
    load_hf: str | None = None,
    custom_import: Sequence[str] = (),
    trust: bool = False,
) -> Run:
    """Read what a run, or a folder, says of its model.

    Args:
        path: Folder that `--save` named, of which the newest checkpoint is taken, or the folder of
            one checkpoint; or a folder of transformers.
        tokenizer_model: Folder of the tokenizer in place of the run's.
        load_hf: Folder that the run began from, in place of where it was.
        custom_import: Modules that a run's `--custom-import` may name: a checkpoint does not choose
            code by itself.
        trust: Whether files of the checkpoint may run code.

    Raises:
        ValueError: There is no model, it is damaged, or something that it needs is not there; the
            message names it.
    """
    path = Path(path)
    iteration = None
    if is_checkpoint := not (path / _CONFIG).exists():
        path = _checkpoint(path)
        saved = saved_run(path, trust=trust)
        iteration, flags = saved.iteration, _of_model(saved.flags)
        where = f"{path / folders.COMMON}"
        if "model_provider" not in flags:
            flags = _of_converted(flags, path)
        _refuse_imports(flags, custom_import, path)
    else:
        flags, where = _of_folder(path), str(path / _CONFIG)
    if load_hf is not None:
        if flags.get("tokenizer_model") == flags.get("load_hf"):
            # The folder has moved, and its tokenizer with it.
            flags["tokenizer_model"] = load_hf
        flags["load_hf"] = load_hf
    if is_checkpoint:
        _require_source(flags.get("load_hf"), path)
    if tokenizer_model is not None:
        flags["tokenizer_model"] = tokenizer_model
    resolved = resolve(from_values(flags, where), 1, trains=False)
    tokenizer = tokenizer_for(resolved.data, resolved.model.tokenizer_model)
    return Run(
        path=path,
        is_checkpoint=is_checkpoint,
        iteration=iteration,
        resolved=resolved,
        data=resolved.data.without_augmentation(),
        tokenizer=tokenizer,
        vocab_size=table_size(tokenizer, resolved.folder),
    )


def _checkpoint(path: Path) -> Path:
    """Folder of the checkpoint that a path names.

    Raises:
        ValueError: There is none; folders below that have one are named.
    """
    found = folders.find(path, flag="RUN")
    if found is not None:
        return found
    if not path.is_dir():
        raise ValueError(
            f"RUN {path} is not there: expected the folder of --save, or a folder of a "
            f"model of transformers"
        )
    below = sorted(str(tracker.parent) for tracker in path.glob(f"*/{folders.TRACKER}"))
    hint = f"; {' and '.join(below)} {'has' if len(below) == 1 else 'have'}" if below else ""
    raise ValueError(
        f"RUN {path} has neither a checkpoint nor {_CONFIG}: expected the folder of --save, or a "
        f"folder of a model of transformers{hint}"
    )


def _of_model(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved flags that answers depend on."""
    names = {
        flag.name
        for flag in declared(TrainConfig)
        if flag.path[0] == "model" and "scaling" not in flag.path
    }
    if saved.get("lora_rank") is None:
        names -= TRAINING_ONLY
    else:
        names -= TRAINING_ONLY - _OF_BASE | {"load-lora"}
        names |= {"seed", "load-base", "load-nemotron-checkpoint"}
    names |= {"llm-only", "load-hf", "load-hf-without"}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in saved.items()
        if name.replace("_", "-") in names
    }


def _of_converted(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Flags for a checkpoint of `checkpoint convert`, which knows of its folder alone."""
    folder = saved.get("load_hf")
    if folder is None:
        raise ValueError(
            f"{path / folders.COMMON} does not say which model this is: expected a checkpoint of "
            f"`megatron-mimo train`, or of `megatron-mimo checkpoint convert`"
        )
    return _of_folder(Path(folder))


def _of_folder(path: Path) -> dict[str, Any]:
    """The flags with which a run from a folder of transformers sees what transformers sees."""
    flags: dict[str, Any] = {
        "model_provider": HUGGING_FACE,
        "load_hf": str(path),
        "tokenizer_model": str(path),
    }
    with WeightFolder(path) as folder:
        if not is_omni(folder):
            # Its processor and template say how images are written.
            return flags | {"seq_length": read_hf(folder).seq_length}
        omni = read_omni(folder)
    image, tags = read_image_tokens(str(path), omni.image_token_id)
    if image is None:
        raise ValueError(
            f"{path}: its tokenizer has no token {omni.image_token_id}, the image_token_id of "
            f"{_CONFIG}: expected the model's own tokenizer"
        )
    return flags | {
        "seq_length": omni.seq_length,
        "image_token": image,
        "image_tag_type": tag_type(tags, str(path)),
    }


def _require_source(folder: str | None, path: Path) -> None:
    """Refuse a run whose folder has gone: it describes the model."""
    if folder is not None and not (Path(folder) / _CONFIG).exists():
        raise ValueError(
            f"{path} is of a run that began from {folder}, which is not there: put the folder "
            f"back, or make one with `megatron-mimo checkpoint convert --hf FOLDER`"
        )


def _refuse_imports(flags: Mapping[str, Any], allowed: Sequence[str], path: Path) -> None:
    for module in flags.get("custom_import") or ():
        if module not in allowed:
            raise ValueError(
                f"{path} is of a run with --custom-import {module}, which runs code: give "
                f"--custom-import {module} again if you trust it"
            )

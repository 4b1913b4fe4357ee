"""`megatron-mimo checkpoint convert`: weights between checkpoints and folders of transformers.

In both directions one process holds the whole model: it is built and filled, and then written.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from megatron_mimo.config.sections import CustomImport
from megatron_mimo.settings import Folder, Switch
from megatron_mimo.tools.checkpoint.inspect import (
    Damaged,
    check_sizes,
    entries_of,
    locate,
    read_common,
    read_metadata,
    verify,
)

if TYPE_CHECKING:
    # megatron-core has to be adapted to a host before anything imports it.
    import torch

    from megatron_mimo.checkpoint.whole import WholeModule
    from megatron_mimo.model.omni.whole import WholeOmni

_CONFIG = "config.json"
_EMBEDDING = "language_model.embedding.word_embeddings.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Convert a checkpoint into a folder that transformers loads, or such a folder into one.

    --from is a folder of checkpoints, of which the newest is taken, or the folder of one; or a
    folder of transformers' NemotronH_Omni_Reasoning_V3.

    Attributes:
        to: Folder to make.
        hf: Where the folder of --load-hf is now, for a checkpoint of a run that began from one;
            what the run did not train is carried over.
        tokenizer_model: Folder of the tokenizer in place of the run's, such as where it is now.
        custom_import: Module that the run was started with; its code runs here too.
        peft: Whether to write the adapters of a run with --lora-rank alone, as a folder of peft;
            otherwise they are merged into the weights.
    """

    to: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    hf: Folder = None
    tokenizer_model: Folder = None
    custom_import: CustomImport = ()
    peft: Switch = False


def run_convert(source: str | None, config: ConvertConfig) -> int:
    """Convert, and print what was written.

    Args:
        source: Value of `--from`.
        config: Values of the other flags.

    Returns:
        0, or 1 for a checkpoint that is damaged.

    Raises:
        ValueError: A flag is missing, a folder does not have the expected contents, or the
            checkpoint and `--hf` are of different models.
    """
    if source is None or config.to is None:
        raise ValueError(
            f"--{'from' if source is None else 'to'} is missing: expected --from PATH --to DIR"
        )
    origin, target = Path(source), Path(config.to)
    _refuse_to_clobber(target)
    try:
        if config.peft and (origin / _CONFIG).exists():
            raise ValueError(
                f"--peft: --from {origin} is a folder of a model: --peft goes with a checkpoint"
            )
        if (origin / _CONFIG).exists():
            if config.hf is not None:
                raise ValueError(
                    f"--hf {config.hf}: --from {origin} is such a folder already; --hf goes with "
                    f"a checkpoint"
                )
            _require_omni(origin)
            what = to_checkpoint(origin, target)
        else:
            what = _from_checkpoint(locate(origin), origin, config, target)
    except Damaged as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"error: --to {target} cannot be written: {error}\n")
        return 1
    sys.stdout.write(f"wrote {what} to {target}\n")
    return 0


def _require_omni(folder: Path) -> None:
    """Refuse a folder of another model, from which runs begin without a checkpoint."""
    from megatron_mimo.model.omni.config import is_omni
    from megatron_mimo.modules.hf.family import FAMILIES
    from megatron_mimo.weights.folder import WeightFolder

    with WeightFolder(folder) as found:
        kind = found.config.get("model_type")
        if not is_omni(found) and kind in FAMILIES:
            raise ValueError(
                f"--from {folder} is a folder of a {kind} model, of which no checkpoint is made: "
                f"train from it with --model-provider hf --load-hf {folder}"
            )


def _from_checkpoint(checkpoint: Path, origin: Path, config: ConvertConfig, target: Path) -> str:
    """Export a run; or the weights of a checkpoint that knows of a folder alone."""
    flags = _flags(checkpoint)
    if "model_provider" not in flags:
        if config.hf is None:
            folder = flags.get("load_hf")
            raise ValueError(
                f"--from {origin} is a checkpoint: add --hf, the nemotron_h_omni folder that "
                f"its run began from{'' if folder is None else f' ({folder})'}"
            )
        return to_folder(checkpoint, Path(config.hf), target)
    if config.hf is not None and flags.get("load_hf") is None:
        raise ValueError(
            f"--hf {config.hf}: the run of {checkpoint} did not begin from a folder, but with "
            f"--model-provider {flags['model_provider']}: leave --hf out"
        )
    _check(checkpoint)
    from megatron_mimo.tools.checkpoint.export import export_adapters, export_run

    export = export_adapters if config.peft else export_run
    return export(
        checkpoint,
        target,
        load_hf=config.hf,
        tokenizer_model=config.tokenizer_model,
        custom_import=config.custom_import,
    )


def _flags(checkpoint: Path) -> dict[str, Any]:
    """Flags of the run that wrote a checkpoint; empty where it does not have them."""
    common = read_common(checkpoint, read_metadata(checkpoint)) or {}
    return dict(getattr(common.get("args"), "__dict__", {}))


def _check(checkpoint: Path) -> None:
    """Find damage, with one line that names the file.

    Raises:
        Damaged: Files are missing or damaged.
    """
    check_sizes(checkpoint, read_metadata(checkpoint))
    from megatron_mimo.checkpoint import folder as folders

    if (checkpoint / folders.CHECKSUMS).exists():
        verify(checkpoint)


def to_checkpoint(source: Path, root: Path) -> str:
    """Write the weights of a folder as the checkpoint of iteration 0.

    Args:
        source: Folder of transformers' NemotronH_Omni_Reasoning_V3.
        root: Folder of checkpoints to create.

    Returns:
        Description of what was written.

    Raises:
        ValueError: `source` is damaged, or holds an architecture that is not supported.
    """
    from megatron_mimo.model.omni.whole import WholeOmni

    model = WholeOmni(source)
    import torch

    from megatron_mimo.checkpoint import folder as folders
    from megatron_mimo.checkpoint.checkpointer import VERSION
    from megatron_mimo.checkpoint.sharded_files import ShardedWriter
    from megatron_mimo.checkpoint.tensors import writes
    from megatron_mimo.runtime.solo import solo_world
    from megatron_mimo.topology import ModuleGridSpec

    common = {
        "args": Namespace(load_hf=str(source), iteration=0, consumed_train_samples=0),
        "checkpoint_version": VERSION,
        "iteration": 0,
        "consumed_train_samples": 0,
        "opt_param_scheduler": {"num_steps": 0},
        "grids": {name: asdict(ModuleGridSpec(name=name)) for name in model.config.model.modules},
    }
    staged = folders.staging_folder(root, 0, "convert")
    staged.mkdir(parents=True)
    try:
        with solo_world():
            writer = ShardedWriter(rank=0)
            written = writer.write(writes(_whole(model), {}), staged)
            writer.describe([written], staged)
        torch.save(common, staged / folders.COMMON)
        folders.seal(staged, {})
        folders.publish(staged, root, 0)
    finally:
        # Of one that was published there is nothing left.
        shutil.rmtree(staged, ignore_errors=True)
    return f"the weights of {source}, as iteration 0,"


def to_folder(checkpoint: Path, source: Path, target: Path) -> str:
    """Write the weights of a checkpoint as a folder that transformers loads.

    Args:
        checkpoint: Folder of the checkpoint of one iteration.
        source: Folder that the run began from.
        target: Folder to create.

    Returns:
        Description of what was written.

    Raises:
        ValueError: The checkpoint does not hold the model that `source` describes; the message
            lists what is missing, unexpected or of another shape.
        Damaged: Files are missing or damaged; the message names them.
    """
    _check(checkpoint)
    metadata = read_metadata(checkpoint)
    stored = {entry.key: entry for entry in entries_of(metadata) if entry.kind is None}
    if _EMBEDDING not in stored:
        raise ValueError(
            f"{checkpoint} holds no {_EMBEDDING}: expected a checkpoint of `megatron-mimo train` "
            f"with vision encoder, projector and language model"
        )
    from megatron_mimo.model.omni.whole import WholeOmni

    model = WholeOmni(source, stored[_EMBEDDING].dtype)
    from megatron_mimo.checkpoint.sharded_files import read
    from megatron_mimo.checkpoint.tensors import reads
    from megatron_mimo.runtime.solo import solo_world

    with solo_world():
        wanted = reads(_whole(model))
        _require_same(
            {part.key: (tuple(part.global_shape), part.dtype) for part in wanted},
            {key: (entry.shape, entry.dtype) for key, entry in stored.items()},
            checkpoint,
            source,
        )
        read(wanted, metadata)
    model.save(target)
    return f"the weights of {checkpoint}"


def _whole(model: "WholeOmni") -> "WholeModule":
    """A whole model, by the names of its modules' parts in training."""
    from torch import nn

    from megatron_mimo.checkpoint.whole import SoloGroups, WholeModule
    from megatron_mimo.runtime.solo import solo_groups

    prefixes: dict[str, str] = {}
    for of_module in model.config.model.prefixes().values():
        prefixes |= of_module
    return WholeModule(nn.ModuleDict(model.parts), SoloGroups(solo_groups()), prefixes)


type _Described = Mapping[str, "tuple[tuple[int, ...], torch.dtype]"]


def _require_same(wanted: _Described, stored: _Described, checkpoint: Path, source: Path) -> None:
    """Refuse a checkpoint that lacks something of the model, or holds more.

    Raises:
        ValueError: Tensors are missing, unexpected, or of another shape or dtype; the message lists
            them.
    """
    faults = [f"{key} is missing" for key in wanted.keys() - stored.keys()]
    faults += [f"{key} is not of that model" for key in stored.keys() - wanted.keys()]
    faults += [
        f"{key} is {_words(*stored[key])}, that model's is {_words(*wanted[key])}"
        for key in wanted.keys() & stored.keys()
        if wanted[key] != stored[key]
    ]
    if faults:
        raise ValueError(
            f"{checkpoint} does not hold the model of --hf {source}: {_shown(sorted(faults))}; "
            f"expected the folder that the run began from"
        )


def _shown(faults: list[str], most: int = 20) -> str:
    rest = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join([*faults[:most], *rest])


def _words(shape: Iterable[int], dtype: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _refuse_to_clobber(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"--to {target} is a file: expected a folder to make")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"--to {target} is not empty: name another folder")

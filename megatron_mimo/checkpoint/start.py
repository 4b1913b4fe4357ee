"""What a run begins with must be where its flags say, before anything is built.

Only an empty or missing folder of a plain `--load` means "begin": the same command then starts and
goes on. Nothing here communicates.
"""

from pathlib import Path

from megatron_mimo.checkpoint import folder as folders
from megatron_mimo.checkpoint.config import FirstWeightsConfig, LoadConfig, ReaderConfig, SaveConfig


def check_start(
    save: SaveConfig, load: LoadConfig, first: FirstWeightsConfig, readers: ReaderConfig
) -> None:
    """Refuse paths that are not there or hold nothing, where a run cannot begin without.

    Args:
        save: Flags of saving; a folder that the run itself fills may be empty.
        load: Checkpoint to continue from.
        first: Sources of initial weights.
        readers: Positions to continue from.

    Raises:
        ValueError: A flag names something that is not there; the message names both.
    """
    if load.root is not None:
        try:
            start_of(load)
        except folders.HalfReplacedError:
            # A run that saves in the folder puts it back first.
            if load.root != save.root:
                raise
    if readers.load is not None:
        position_of(Path(readers.load), own=own_positions(readers, save))
    if first.load_hf is not None and not Path(first.load_hf).is_dir():
        raise ValueError(
            f"--load-hf {first.load_hf} is not there: expected a folder of a model and its weights"
        )
    for flag, path in (
        ("--load-nemotron-checkpoint", first.load_nemotron_checkpoint),
        ("--load-vision-from", first.load_vision_from),
        ("--load-base", first.load_base),
    ):
        if path is not None:
            weights_of(Path(path), flag)


def start_of(load: LoadConfig) -> Path | None:
    """Folder of the checkpoint that --load names; None where a run begins.

    Raises:
        ValueError: The path names a checkpoint that is not there, or --finetune finds none.
    """
    path = load.folder
    found = folders.find(path, flag="--load")
    if found is None and load.finetune:
        raise ValueError(
            f"--load {path} {_nothing(path)}: --finetune begins with the weights of a checkpoint; "
            f"name the folder of one, or leave both flags out"
        )
    return found


def position_of(path: Path, *, own: bool) -> Path | None:
    """Folder of the newest position that --dataloader-load names; None where there is none yet.

    Args:
        path: Value of the flag.
        own: Whether this run writes its positions there too, so that there may be none yet.

    Raises:
        ValueError: The path names a position that is not there, or there is none.
    """
    found = folders.find(path, flag="--dataloader-load")
    if found is None and not own:
        raise ValueError(
            f"--dataloader-load {path} {_nothing(path)}: expected a folder that --dataloader-save "
            f"or --save has written"
        )
    return found


def own_positions(readers: ReaderConfig, save: SaveConfig) -> bool:
    """Whether --dataloader-load names a folder that this run writes positions to."""
    return readers.load in (readers.save, save.root)


def weights_of(path: Path, flag: str) -> Path:
    """Folder of a checkpoint whose weights a run begins with, of this program or of Megatron.

    Args:
        path: Path to a root with a tracker, or to the folder of one checkpoint.
        flag: Flag with which the path was given.

    Raises:
        ValueError: There is no checkpoint.
    """
    # A folder of torch.distributed.checkpoint has any name.
    if (path / folders.METADATA).is_file():
        return path
    found = folders.find(path, flag=flag, release=True)
    if found is None or not (found / folders.METADATA).is_file():
        wrong = f"{_nothing(path)}" if found is None else f"has no {found / folders.METADATA}"
        raise ValueError(
            f"{flag} {path} {wrong}: expected a folder of checkpoints in torch_dist format, or one "
            f"of its iter_… folders"
        )
    return found


def _nothing(path: Path) -> str:
    if not path.is_dir():
        return "is not there"
    return f"holds neither {folders.TRACKER} nor {folders.METADATA}"

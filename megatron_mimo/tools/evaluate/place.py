"""Where the samples of an evaluation are, as flags say it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_mimo.data.samples.media import check_roots

Split = Literal["train", "val"]
LINES, ARRAY = (".jsonl", ".ndjson"), ".json"
"""Endings of files with a sample in each line, and of files with an array of samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetPlace:
    """Where the samples are.

    Attributes:
        path: Path to a JSON Lines or JSON file, a prepared dataset's folder, or a metadataset.
        split: Split of a prepared dataset; None for val. Files have none.
        image_root: Folder that paths in a file are relative to; None for the file's own.
        media_root: Further folders whose files samples may name.
        trust_dataset_code: Whether Python that a prepared dataset names may run.
        task_field: Field by which results are counted apart; None for task, else category.
    """

    path: str
    split: Split | None = None
    image_root: str | None = None
    media_root: tuple[str, ...] = ()
    trust_dataset_code: bool = False
    task_field: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a JSON Lines or JSON file."""
        return Path(self.path).suffix.lower() in (*LINES, ARRAY)

    def check(self) -> None:
        """Refuse what can be seen to be wrong before anything is read.

        Raises:
            ValueError: The path leads nowhere, or flags do not fit it.
        """
        path = Path(self.path)
        if not path.exists() or (self.is_file and not path.is_file()):
            wrong = "is not a file" if path.exists() else "is not there"
            raise ValueError(
                f"--data {path} {wrong}: expected a .jsonl or .json file, the folder of a prepared "
                f"dataset, or the .yaml file of a blend"
            )
        if self.is_file and self.split is not None:
            raise ValueError(f"--split {self.split} with --data {path}: a file has no splits")
        if self.image_root is not None and not self.is_file:
            raise ValueError(
                f"--image-root with --data {path}: expected it with a .jsonl or .json file, whose "
                f"images lie elsewhere"
            )
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise ValueError(f"--image-root {self.image_root} is not a folder")
        check_roots(self.media_root)

"""`megatron-mimo data digits`: write a dataset to try things on."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from megatron_mimo.data.digits import DigitsConfig, write_digits_dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsCommandLine(DigitsConfig):
    """Write an Energon dataset of handwritten digits, with questions and answers.

    Attributes:
        out: Folder to make.
        overwrite: Replace what is in the folder.
    """

    out: Annotated[str, arg(metavar="DIR")] = "runs/digits"
    overwrite: bool = False


def run_digits(line: DigitsCommandLine) -> int:
    """Write the dataset, and say where it is.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: The folder has something in it, and is not to be overwritten.
    """
    names = [field.name for field in dataclasses.fields(DigitsConfig)]
    config = DigitsConfig(**{name: getattr(line, name) for name in names})
    path = write_digits_dataset(line.out, config, overwrite=line.overwrite)
    sys.stdout.write(f"wrote {config.num_train} train and {config.num_val} val samples to {path}\n")
    return 0

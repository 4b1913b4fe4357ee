"""`megatron-mimo data omni-digits`: write a small dataset of pictures, calls and videos."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from megatron_mimo.border import reason_of, show_traceback
from megatron_mimo.data.samples.omni.dataset import write_omni_digits
from megatron_mimo.data.samples.omni.questions import OmniDigitsConfig

_FAILED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniDigitsCommandLine(OmniDigitsConfig):
    """Write an Energon dataset of digits that are shown, dialled and move, with questions.

    Attributes:
        out: Folder to create.
        overwrite: Whether to replace the contents of the folder.
    """

    out: Annotated[str, arg(metavar="DIR")] = "runs/omni-digits"
    overwrite: bool = False


def run_omni_digits(line: OmniDigitsCommandLine) -> int:
    """Write the dataset, and print its path.

    Returns:
        The exit code: 0, or 1 when a file could not be written.

    Raises:
        ValueError: The folder is not empty and is not to be overwritten.
    """
    names = [field.name for field in dataclasses.fields(OmniDigitsConfig)]
    config = OmniDigitsConfig(**{name: getattr(line, name) for name in names})
    try:
        path = write_omni_digits(line.out, config, overwrite=line.overwrite)
    except OSError as error:
        show_traceback(error)
        sys.stderr.write(f"error: {line.out} was not written: {reason_of(error)}\n")
        return _FAILED
    sys.stdout.write(f"wrote {config.num_train} train and {config.num_val} val samples to {path}\n")
    return 0

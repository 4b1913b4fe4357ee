"""Import of Python modules of the user, which extend the package before the model is looked up."""

import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

_SELF = "import_custom"
_IMPORTS = (
    importlib.__file__,
    "<frozen importlib._bootstrap>",
    "<frozen importlib._bootstrap_external>",
)


def import_custom(names: Iterable[str]) -> None:
    """Import modules by name, also from the current directory; repeating it has no effect.

    Args:
        names: Names of the modules, the values of `--custom-import`.

    Raises:
        ValueError: A module does not exist, or fails while it is imported; the message has the
            error.
    """
    names = tuple(names)
    here = str(Path.cwd())
    if names and here not in sys.path:
        # A console script, unlike `python -m`, does not search there.
        sys.path.append(here)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
            raise ValueError(
                f"--custom-import {name!r}: expected the name of a Python module, as in "
                f"my_project.audio, not a path"
            )
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name):
                raise ValueError(
                    f"--custom-import {name}: there is no module {error.name!r} in {here} or "
                    f"where Python looks; check the name, or set PYTHONPATH"
                ) from error
            raise ValueError(_failed(name, error)) from error
        # Every kind of error is one of the user's code, and so is an exit: a script that trains
        # nothing must not look like a run that is done.
        except (Exception, SystemExit) as error:
            raise ValueError(_failed(name, error)) from error


def _failed(name: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    # What stands before are this function's and Python's own frames of the import.
    machinery = [n for n, at in enumerate(frames) if at.filename in _IMPORTS or at.name == _SELF]
    places = frames[max(machinery) + 1 :]
    line = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
    text = " ".join(str(error).split())
    return f"--custom-import {name} fails: {type(error).__name__}: {text}{line}"

"""Python that a dataset's own files name, and that opening the dataset would run.

Energon makes objects of any class that a `dataset.yaml` or a metadataset names, and compiles the
files that it names for sample loaders and part filters. Both go through one function each, which
are guarded here while a dataset is opened: only energon's own classes are made, unless the user
trusts the dataset.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import megatron.energon as energon
from megatron.energon.flavors import BaseCoreDatasetFactory, Sample
from megatron.energon.metadataset.loader_interface import DatasetLoaderInterface
from megatron.energon.module_loader import ModuleLoader
from megatron.energon.typed_converter import JsonParser

_OWN = "megatron.energon"
_KINDS = (BaseCoreDatasetFactory, DatasetLoaderInterface, Sample)
# The guard changes energon's classes, which all threads share.
_lock = threading.RLock()


class _NamesCodeError(Exception):
    """A dataset names Python that is not energon's.

    It is no ValueError, which energon takes for a value of another type and goes on.
    """


@contextlib.contextmanager
def only_energons(path: str, *, trust: bool) -> Iterator[None]:
    """Refuse what a dataset would run, while it is opened.

    Args:
        path: Path to the dataset, for error messages.
        trust: Whether it may run.

    Raises:
        ValueError: The dataset names Python that is not energon's; the message names it.
    """
    if trust:
        yield
        return
    refused: list[str] = []

    def refuse(what: str) -> NoReturn:
        refused.append(ascii(what[:300])[1:-1])
        raise _NamesCodeError(what)

    def resolve(_parser: JsonParser, module: Any, name: Any, *_: Any, **_flags: Any) -> Any:
        """A class of energon by its name; nothing is imported."""
        if module == _OWN:
            found = getattr(energon, str(name), None)
            if isinstance(found, type) and issubclass(found, _KINDS):
                return found
            if found is None:
                # As energon says it.
                raise ModuleNotFoundError(f"Object {name} not found in {module}")
        refuse(f"{module}.{name}")

    def load(_loader: ModuleLoader, file: Any) -> NoReturn:
        refuse(f"the Python file {file}")

    try:
        with (
            _lock,
            _instead(JsonParser, "_resolve_object", resolve),
            _instead(ModuleLoader, "_load_module", load),
        ):
            yield
    except Exception:
        # Whatever became of the error on its way.
        if not refused:
            raise
    if refused:
        raise ValueError(
            f"--data-path {path}: its dataset.yaml, or a metadataset, names {refused[0]}, which "
            f"opening it would run: expected classes of {_OWN}, such as CrudeWebdataset; if you "
            f"trust whoever wrote the dataset, --trust-dataset-code runs it"
        )


@contextlib.contextmanager
def _instead(owner: type, name: str, method: Any) -> Iterator[None]:
    """Replace a method for a while."""
    original = getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)

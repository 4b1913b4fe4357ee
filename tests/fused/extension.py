"""A stand-in for the compiled module `transformer_engine_torch`.

The package takes three kinds of names from it. Kernels are those of `kernels`. Enumerations have
every member that the package asks for; only the numbers of dtypes meet a kernel of ours. Of all
other names most are imported and never used here: a class without content, or a function that says
which kernel lacks a stand-in when it is called.
"""

import enum
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

EXTENSION = "transformer_engine_torch"
_DTYPES = re.compile(r"tex\.DType\.(k(?!X\b)\w+)")
_ASKED = ((".is_cuda", ".is_cpu"), ("torch.cuda.is_available()", "True"))
# Packages of Triton kernels, and an export format that asks for a package of its own.
_REPLACED = (
    "transformer_engine.common.triton",
    "transformer_engine.pytorch.triton",
    "transformer_engine.pytorch.onnx_extensions",
)


class _Open(type):
    """The type of classes that have every member; a member is a number, in the order of asking."""

    __members__: dict[str, int]

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls.__members__.setdefault(name, len(cls.__members__))


class StandIn(ModuleType):
    """A module that has every name; see the head of this file for what they mean."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = _missing(f"{self.__name__}.{name}")
        if name[0].isupper():
            found = _Open(name, (), {"__members__": {}})
        setattr(self, name, found)
        return found


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*_args: Any, **_kwargs: Any) -> Any:
        # Loud on purpose: a kernel that returned nothing would let a test pass by accident.
        raise RuntimeError(
            f"Transformer Engine called {name}, which has no stand-in: write one in tests/fused"
        )

    return kernel


class _OnHost(importlib.machinery.SourceFileLoader):
    """Loads a module of the package so that it finds a GPU, and tensors on it, on a host."""

    def get_code(self, fullname: str) -> CodeType | None:
        source = self.get_data(self.path).decode()
        changed = source
        for asked, answer in _ASKED:
            changed = changed.replace(asked, answer)
        if changed == source:
            return super().get_code(fullname)
        # Never from the cache, which has the module as published.
        return self.source_to_code(changed.encode(), self.path)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the package, with stand-ins in the place of modules that need a GPU's compiler."""

    def __init__(self, contents: Mapping[str, ModuleType]) -> None:
        self._contents = contents

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "transformer_engine.pytorch":
            # It would look for a library to load; ours is loaded.
            common: Any = sys.modules["transformer_engine.common"]
            common.load_framework_extension = lambda _framework: None
        if fullname.startswith(_REPLACED):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname.startswith("transformer_engine."):
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                spec.loader = _OnHost(spec.loader.name, spec.loader.path)
            return spec
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        content = self._contents.get(module.__name__)
        if content is not None:
            vars(module).update({k: v for k, v in vars(content).items() if not k.startswith("__")})


def install_extension(
    folder: Path, kernels: Mapping[str, Callable[..., Any]], modules: Mapping[str, ModuleType]
) -> None:
    """Make the package in `folder` importable.

    Args:
        folder: Folder of the package.
        kernels: Functions of the compiled module by name.
        modules: Name of a module of Triton kernels -> module with functions in their place.
    """
    extension: Any = StandIn(EXTENSION)
    constants = folder / "transformer_engine" / "pytorch" / "constants.py"
    # Used by one module of 2.11 only.
    names = dict.fromkeys([*_DTYPES.findall(constants.read_text()), "kFloat4E2M1"])
    extension.DType = enum.IntEnum("DType", {name: i for i, name in enumerate(names)})
    for name, kernel in kernels.items():
        setattr(extension, name, kernel)
    sys.modules[EXTENSION] = extension
    sys.meta_path.insert(0, _Finder(modules))
    sys.path.insert(0, str(folder))

"""Folders as transformers writes them: config.json, and safetensors in one file or several."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class WeightFolder:
    """Reads a folder tensor by tensor; nothing is loaded before it is asked for.

    Use it in a `with` statement.

    Args:
        path: The folder.

    Raises:
        ValueError: A file is missing, or is not what its name says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = _read_json(self.path / _CONFIG)
        self._files: dict[str, Any] = {}
        self._where = dict(self._locate())

    def __enter__(self) -> "WeightFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()

    @property
    def names(self) -> frozenset[str]:
        """Of every tensor."""
        return frozenset(self._where)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            ValueError: There is no such tensor.
        """
        if name not in self._where:
            raise ValueError(f"the weights in {self.path} lack {name}")
        return self.tensor(name).dtype

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole, on the host."""
        tensor: Tensor = self._file(self._where[name]).get_tensor(name)
        return tensor

    def _locate(self) -> Iterator[tuple[str, str]]:
        """Each tensor's name and file."""
        index = self.path / _INDEX
        if not index.exists():
            for name in self._file(_SINGLE).keys():
                yield name, _SINGLE
            return
        listed: dict[str, str] = _read_json(index).get("weight_map", {})
        for file in sorted(set(listed.values())):
            held = set(self._file(file).keys())
            absent = sorted(name for name, at in listed.items() if at == file and name not in held)
            if absent:
                raise ValueError(
                    f"{self.path / file} lacks {len(absent)} tensors that {index} says it holds, "
                    f"the first {absent[0]}: the folder is incomplete or mixed; copy it again"
                )
        yield from listed.items()

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = self.path / name
            if not path.exists():
                raise ValueError(f"{path} is missing: expected weights as transformers writes them")
            try:
                self._files[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}; copy it again") from error
        return self._files[name]


def write_folder(
    path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a folder that transformers loads; it is made where it does not exist.

    Args:
        path: The folder; files in it of the same names are replaced.
        config: What config.json holds.
        tensors: By name.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / _SINGLE, metadata={"format": "pt"})


def require_names(
    where: Path, wanted: Iterable[str], held: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """Refuse weights that are missing or that nothing asks for.

    Raises:
        ValueError: Lists them.
    """
    wanted, held, optional = set(wanted), set(held), set(optional)
    missing, unexpected = sorted(wanted - held), sorted(held - wanted - optional)
    if missing or unexpected:
        lists = ((missing, "missing"), (unexpected, "unexpected"))
        found = "; ".join(
            f"{len(names)} {what}: {', '.join(names)}" for names, what in lists if names
        )
        raise ValueError(
            f"the weights in {where} do not fit the architecture that its config.json describes: "
            f"{found}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: expected a folder as transformers writes it, with config.json "
            f"and safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found

"""Folders as transformers writes them: config.json, and safetensors in one or several files."""

import copy
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Files beside the weights: tokenizer, processor, chat template; and a folder of further templates.
_BESIDE = (".json", ".jinja", ".txt", ".model", ".py")
_TEMPLATES = "additional_chat_templates"


class WeightFolder:
    """Reads a folder tensor by tensor; a tensor is read only when it is requested.

    Files with weights may be absent as long as none of them is asked for. Use it in a `with`
    statement.

    Args:
        path: Path to the folder.

    Attributes:
        path: Path to the folder.
        config: Contents of config.json.
        config_name: Path to config.json and section in it, for error messages.

    Raises:
        ValueError: A file is missing, or does not have the format that its name states.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = _read_json(self.path / _CONFIG)
        self.config_name = str(self.path / _CONFIG)
        self._prefix = ""
        self._beside: Mapping[str, str] = {}
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "WeightFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()

    def part(
        self,
        prefix: str,
        *,
        section: str,
        config: dict[str, Any],
        without: Iterable[str] = (),
        beside: Mapping[str, str] = MappingProxyType({}),
    ) -> Self:
        """One of several models in the folder, as if it were in a folder of its own.

        Args:
            prefix: Prefix of its tensors' names, which is removed.
            section: Name of its section in config.json, for error messages.
            config: Contents of that section.
            without: Names in the folder of tensors with that prefix that do not belong to the
                model.
            beside: Name -> name in the folder, of tensors of the model without that prefix.
        """
        part = copy.copy(self)
        part.config = config
        part.config_name = f"{self.config_name}: {section}"
        part._prefix = self._prefix + prefix
        part._beside = beside
        left_out = set(without)
        part._where = {
            name.removeprefix(prefix): file
            for name, file in self._where.items()
            if name.startswith(prefix) and name not in left_out
        }
        part._where |= {ours: self._where[at] for ours, at in beside.items() if at in self._where}
        return part

    @cached_property
    def _where(self) -> dict[str, str]:
        """Each tensor's name -> its file."""
        return dict(self._locate())

    @property
    def has_weights(self) -> bool:
        """Whether there is any file with weights."""
        return any(self.path.glob("*.safetensors"))

    @property
    def names(self) -> frozenset[str]:
        """Name of every tensor."""
        return frozenset(self._where)

    def full_name(self, name: str) -> str:
        """Name in the folder of a tensor of this part."""
        return self._beside.get(name, self._prefix + name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            ValueError: The folder has no tensor of that name.
        """
        if name not in self._where:
            raise ValueError(f"the weights in {self.path} lack {self.full_name(name)}")
        empty = self.span(name, 0, 0, 0) if self.shape(name) else self.tensor(name)
        return empty.dtype

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor; the tensor itself is not read."""
        return list(self._slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor [...] in its stored dtype, onto the host."""
        file = self._file(self._where[name])
        tensor: Tensor = file.get_tensor(self.full_name(name))
        return tensor

    def span(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """Read a slice [..., stop - start, ...] of a tensor, in its stored dtype, onto the host.

        Nothing else of the tensor is read.

        Args:
            name: Name of the tensor.
            axis: Axis that is sliced.
            start: First index along the axis.
            stop: Index after the last one.
        """
        whole = (slice(None),) * axis
        tensor: Tensor = self._slice(name)[(*whole, slice(start, stop))]
        return tensor

    def box(self, name: str, slices: Iterable[slice]) -> Tensor:
        """Read a box [...] of a tensor, in its stored dtype, onto the host; nothing else is read.

        Args:
            name: Name of the tensor.
            slices: Slices of its first axes; the others are whole.
        """
        tensor: Tensor = self._slice(name)[tuple(slices)]
        return tensor

    def _slice(self, name: str) -> Any:
        return self._file(self._where[name]).get_slice(self.full_name(name))

    def _locate(self) -> Iterator[tuple[str, str]]:
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
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    file_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers loads; the folder is created where it does not exist.

    config.json is written last: an incomplete folder has none, and cannot be loaded.

    Args:
        path: Path to the folder; weights in it are replaced.
        config: Contents of config.json.
        tensors: Tensors [...] of any shapes and dtypes, each with its name. Of an iterator, no more
            tensors are in memory than one file holds.
        file_bytes: Bytes of weights after which a new file begins.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, dict[str, int]]] = []
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    for held in _batches(items, file_bytes):
        file = folder / f".unfinished-{len(written) + 1}"
        save_file(held, file, metadata={"format": "pt"})
        written.append((file, {name: _bytes(tensor) for name, tensor in held.items()}))
    stale = [folder / name for name in (_CONFIG, _INDEX, _SINGLE)]
    for file in (*stale, *folder.glob("model-*-of-*.safetensors")):
        file.unlink(missing_ok=True)
    index: dict[str, str] = {}
    for number, (file, sizes) in enumerate(written, 1):
        name = f"model-{number:05}-of-{len(written):05}.safetensors"
        name = name if len(written) > 1 else _SINGLE
        file.replace(folder / name)
        index |= dict.fromkeys(sizes, name)
    if len(written) > 1:
        total = sum(size for _, sizes in written for size in sizes.values())
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(folder / _CONFIG, config)


def copy_beside(source: Path, target: Path) -> None:
    """Copy the files of a folder that are not weights and do not describe weights.

    Args:
        source: Folder as transformers writes it.
        target: Folder to copy them to, which is created; nothing is done if it is the source.
    """
    target.mkdir(parents=True, exist_ok=True)
    if target.resolve() == source.resolve():
        return
    for file in sorted(source.iterdir()):
        if file.suffix in _BESIDE and file.is_file() and not _is_described(file.name):
            shutil.copyfile(file, target / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES, dirs_exist_ok=True)


def _is_described(name: str) -> bool:
    """Whether a file has a name that `write_folder` writes."""
    return name in (_CONFIG, _INDEX) or name.endswith(".safetensors")


def _batches(items: Iterable[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Tensors as files hold them, on the host; one batch at least."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in items:
        if batch and size + _bytes(tensor) > file_bytes:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor.detach().cpu().contiguous()
        size += _bytes(tensor)
    yield batch


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def require_names(
    where: Path, wanted: Iterable[str], held: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """Refuse weights that are missing or that are not expected.

    Raises:
        ValueError: Weights are missing or unexpected; the message lists them.
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

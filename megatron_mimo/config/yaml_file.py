"""Strict reading of mappings from YAML files."""

from pathlib import Path
from typing import Any

import yaml

from megatron_mimo.border import border


def load_mapping(path: str, *, flag: str) -> dict[Any, Any]:
    """Keys and values of a YAML file; an empty file has none.

    Args:
        path: Path to the file.
        flag: Flag that names the file, for error messages.

    Raises:
        ValueError: The file cannot be read, is not YAML, has no mapping, or a key twice.
    """
    with border(lambda why: f"{flag} {path} cannot be read: {why}"):
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is not a regular file")
        text = Path(path).read_text(encoding="utf-8")
    with border(lambda why: f"{flag} {path} is not YAML: {why}"):
        content = yaml.load(text, Loader=_StrictLoader)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {path}: expected keys and values, as in `train-iters: 100`")
    return content


class _StrictLoader(yaml.SafeLoader):
    """Safe loader of YAML that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping.

        Raises:
            ValueError: A key is given twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("_", "-")
            if name in seen:
                raise ValueError(f"key {key.value!r} is given twice, again in line {_line(key)}")
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _line(node: yaml.Node) -> int:
    """Number of the line on which a node begins, counted from 1."""
    line: int = node.start_mark.line
    return line + 1

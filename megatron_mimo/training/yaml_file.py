"""Mappings read from YAML files, strictly."""

from pathlib import Path
from typing import Any

import yaml


def load_mapping(path: str, *, flag: str) -> dict[Any, Any]:
    """Keys and values of a YAML file; none when it is empty.

    Args:
        path: The file.
        flag: That names the file, for errors.

    Raises:
        ValueError: The file cannot be read, is no YAML, holds no mapping or a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{flag} {path} is not YAML: {detail}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {path}: expected keys and values, as in `train-iters: 100`")
    return content


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping.

        Raises:
            yaml.YAMLError: A key is given twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("_", "-")
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(name)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping

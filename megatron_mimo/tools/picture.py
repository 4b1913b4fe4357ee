"""Pictures that a command draws into the file of `--png`."""

from typing import Any


def blank(**how: Any) -> Any:
    """A matplotlib figure that belongs to nobody: no window, no state of pyplot's.

    Args:
        how: As matplotlib's `Figure` takes it.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--png needs matplotlib: install megatron-mimo[demo]") from error
    return Figure(**how)


def save(figure: Any, path: str, **how: Any) -> None:
    """Write a figure.

    Args:
        figure: From `blank`.
        path: Its ending says the format.
        how: As `Figure.savefig` takes it.

    Raises:
        ValueError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=110, **how)
    except (OSError, ValueError) as error:
        raise ValueError(f"--png {path} cannot be written: {error}") from error

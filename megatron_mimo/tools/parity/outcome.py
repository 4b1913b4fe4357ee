"""Exit codes of `megatron-mimo parity`, and its result as JSON."""

import json
import math
import sys
from pathlib import Path
from typing import Any

EXIT_PASS, EXIT_FAIL = 0, 3


def write_json(path: str, values: dict[str, Any]) -> None:
    """Write values to a file and print its path; numbers that JSON does not have become null.

    Raises:
        ValueError: The file cannot be written.
    """
    text = json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--json {path} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"wrote {path}\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The id under which a service knows the run, kept in the run's folder."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptId:
    """What is kept of a service's run.

    Attributes:
        id: Id of the run in the service.
        identity: Settings that named the run (`Service.identity`).
        iteration: Last iteration that the service was given.
    """

    id: str
    identity: Mapping[str, str | None]
    iteration: int


def read_id(path: Path) -> KeptId | None:
    """What a file keeps; None where there is no file.

    Raises:
        ValueError: The file is damaged or cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = KeptId(**found)
        if not (
            isinstance(kept.id, str)
            and isinstance(kept.identity, dict)
            and isinstance(kept.iteration, int)
        ):
            raise TypeError("a value has another type")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the id of the run, as an earlier start has written it: {error}; "
            f"without the file, a new run is begun"
        ) from error
    return kept


def write_id(path: Path, kept: KeptId) -> None:
    """Write the file at once, so that no reader sees a part of it.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(asdict(kept)) + "\n", encoding="utf-8")
    os.replace(unfinished, path)

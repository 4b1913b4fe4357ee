"""Program of the watcher process; run by its path, never imported.

The watcher is code of this package, but must not run `megatron_mimo/runtime/__init__.py`, which
imports torch: seconds of start-up, and hundreds of megabytes for each rank. So the package and
that room are stand-ins that only say where their modules are.
"""

import sys
from pathlib import Path
from types import ModuleType


def _stand_in(name: str, folder: Path) -> None:
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


if __name__ == "__main__":
    _root = Path(__file__).resolve().parents[1]
    _stand_in("megatron_mimo", _root)
    _stand_in("megatron_mimo.runtime", _root / "runtime")
    from megatron_mimo.failfast.watcher import main

    main(int(sys.argv[1]), sys.argv[2])

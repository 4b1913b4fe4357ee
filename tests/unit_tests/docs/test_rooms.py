"""docs/develop/rooms.md names every room and sub-room, and no others."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "megatron_mimo"
PAGE = (ROOT / "docs/develop/rooms.md").read_text(encoding="utf-8")


def test_every_room_has_a_line() -> None:
    rooms = {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.rglob("*/__init__.py")}
    listed = re.findall(r"^\| `([\w/]+)` \|", PAGE.split("## What belongs where")[1], re.M)
    assert sorted(listed) == sorted({*rooms, "cli"})


def test_the_order_is_that_of_the_rules() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        contract["layers"]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    table = PAGE.split("## The order")[1].split("\n\nThree rules")[0]
    rows = [
        set(re.findall(r"`(\w+)`", line.split(" | ")[0]))
        for line in table.splitlines()
        if line.startswith("| `")
    ]
    assert rows == [set(re.findall(r"\w+", layer)) for layer in reversed(layers)]

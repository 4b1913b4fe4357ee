"""Any dataclass as a command line: values, errors of one line, help."""

from dataclasses import dataclass
from typing import Literal

import pytest

from megatron_mimo.config.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Bake:
    """Bake bread.

    Attributes:
        loaves: How many.
        hot_air: Blow.
        grain: Of the flour.
    """

    loaves: int = 1
    hot_air: bool = True
    grain: Literal["rye", "wheat"] = "rye"

    def __post_init__(self) -> None:
        if self.loaves < 1:
            raise ValueError(f"--loaves is {self.loaves}: expected at least 1")


def bake(*argv: str) -> Bake:
    return parse_arguments(argv, Bake, prog="bake")


def test_reads_values_in_both_spellings() -> None:
    assert bake() == Bake()
    assert bake("--loaves", "3", "--no-hot-air", "--grain=wheat") == Bake(
        loaves=3, hot_air=False, grain="wheat"
    )
    assert bake("--no-hot_air") == Bake(hot_air=False)


def test_the_last_of_two_holds() -> None:
    assert bake("--loaves", "3", "--loaves", "4").loaves == 4
    assert bake("--no-hot-air", "--hot-air").hot_air is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--loafs", "3"), "unknown flag --loafs: the nearest is --loaves"),
        (("--no-grain",), "unknown flag --no-grain: the nearest is --grain"),
        (("--loaves", "many"), "--loaves many: expected a whole number, not 'many'"),
        (("--loaves", "1.5"), "--loaves 1.5: expected a whole number, not '1.5'"),
        (("--grain", "oat"), "--grain oat: expected one of rye, wheat, not 'oat'"),
        (("--loaves",), "--loaves has no value: expected a whole number"),
        (("--loaves", "--hot-air"), "--loaves has no value: expected a whole number"),
        (("--hot-air=yes",), "--hot-air=yes: --hot-air takes no value"),
        (("bread",), "unexpected argument 'bread': expected a flag, which starts with --"),
        (("--loaves", "0"), "--loaves is 0: expected at least 1"),
    ],
)
def test_names_what_was_typed(
    argv: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as error:
        bake(*argv)
    assert str(error.value) == message
    assert capfd.readouterr() == ("", "")


def test_help_has_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bake("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Bake bread." in shown
    assert "How many. (default: 1)" in shown
    assert "--hot-air, --no-hot-air" in shown

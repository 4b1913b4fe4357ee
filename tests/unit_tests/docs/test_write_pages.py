"""docs/reference/flags.md: up to date, and with every flag of every command."""

import re
import shlex

import pytest

from docs.reference.write_flags import COMMANDS, PAGE, page
from megatron_mimo.cli import main


def shown_by(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command prints for its help."""
    try:
        assert main([*argv, "--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    return capsys.readouterr().out


def words(usage: str) -> list[str]:
    """Of a command, without its first."""
    return [word for word in shlex.split(usage)[1:] if word.islower() and word[0] != "-"]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "flags have changed: run `make docs`"


def test_every_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    def commands(*path: str) -> set[tuple[str, ...]]:
        listed = re.findall(r"^  ([a-z]+) ", shown_by(capsys, *path), re.M)
        return {
            command
            for name in listed
            for command in ([(*path, name)] if name not in groups else commands(*path, name))
        }

    groups = {words(usage)[0] for usage in COMMANDS if len(words(usage)) == 2}
    assert commands() == {tuple(words(usage)) for usage in COMMANDS}


@pytest.mark.parametrize("usage", COMMANDS)
def test_it_says_what_help_says(usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_by(capsys, *words(usage))
    assert shown.startswith(f"usage: {usage} [-h]")
    own = page().split(f"    {usage} [flags]\n")[1].split("\n## ")[0]
    forms = re.findall(r"--[a-z0-9-]+(?= [A-Z]| \{|,|`)", own)
    flags = set(re.findall(r"^│ (--[a-z0-9-]+)(?=[ ,])", shown, re.M))
    missing = flags - set(forms)
    if "And all flags of" in own:
        missing -= set(re.findall(r"`(--[a-z0-9-]+)", page()))
    assert not missing

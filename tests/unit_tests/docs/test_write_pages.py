"""The pages of docs/reference/ that come from the code: up to date, and with all there is."""

import re
import shlex

import pytest

from docs.reference.write_pages import COMMANDS, flags_page, pages
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


def test_the_pages_are_up_to_date() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run `make docs`"


def test_every_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    def commands(*path: str) -> set[tuple[str, ...]]:
        listed = re.findall(r"^  ([a-z-]+) ", shown_by(capsys, *path), re.M)
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
    own = flags_page().split(f"    {usage} [flags]\n")[1].split("\n## ")[0]
    forms = re.findall(r"--[a-z0-9-]+(?= [A-Z]| \{|,|`)", own)
    flags = set(re.findall(r"^│ (--[a-z0-9-]+)(?=[ ,])", shown, re.M))
    missing = flags - set(forms)
    if "And all flags of" in own:
        missing -= set(re.findall(r"`(--[a-z0-9-]+)", flags_page()))
    assert not missing

"""The page of `chat --web`: in a browser, and what the command says where it cannot be shown."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_mimo.cli import main
from tests.browser import Tab, find_browser, open_tab
from tests.harness.packages import NotFetched
from tests.harness.pool import REPOSITORY
from tests.integration.asked import pictures, save
from tests.integration.test_answers import DENSE

PACKAGES = REPOSITORY / ".cache/web/packages"
STOPS, ENDED = (
    "!document.querySelector('#stop').disabled",
    "document.querySelector('#stop').disabled",
)
READY = f"{ENDED} && !document.querySelector('textarea').disabled"
MESSAGES = "document.querySelectorAll('.message').length"


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command ends."""
    assert main(["chat", "nowhere", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    return err


def test_flags_of_the_page_want_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--web" in error_of(["--port", "7000"], capsys)
    assert "--port is 70000" in error_of(["--web", "--port", "70000"], capsys)
    assert "add images on the page" in error_of(["--web", "--image", "a.png"], capsys)


def fetched() -> dict[str, str]:
    """The environment of a process with gradio."""
    if not (PACKAGES / "gradio").is_dir():
        raise NotFetched(f"gradio is not in {PACKAGES}: run `make web-packages`, which fetches it")
    paths = [str(PACKAGES), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@contextmanager
def serving(run: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The command, the address that it prints, and further lines."""
    command = [sys.executable, "-m", "megatron_mimo.cli", "chat", str(run), "--web", *flags]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        env=fetched(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        address = re.search(r"http://\S+/", line)
        assert address is not None, line + process.stdout.read()
        yield process, address[0], [line]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(tab: Tab, question: str) -> None:
    """Type a question, and wait until it is being answered."""
    type_in(tab, question)
    tab.wait_for(f"document.body.innerText.includes({question!r})")


def type_in(tab: Tab, question: str) -> None:
    """Type a question, and send it."""
    tab.wait_for(READY)
    tab.type("textarea", question)
    tab.press_enter()


@pytest.mark.slow
def test_a_conversation_in_a_browser(run_ranks: Callable[..., list], tmp_path: Path) -> None:
    from PIL import Image

    find_browser()
    fetched()
    run, images = tmp_path / "run", []
    run_ranks(1, save, DENSE, str(run))
    for number, pixels in enumerate(pictures()):
        images.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(images[-1])
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    with (
        serving(run, "--port", "0", "--max-new-tokens", "4000") as (process, url, _),
        open_tab(url) as tab,
        open_tab(url) as other,
    ):
        # Two images; the answer comes piece by piece until it is stopped, and stays.
        tab.wait_for("document.querySelector('textarea')")
        tab.choose_files("input[type=file]", images)
        tab.wait_for("document.querySelectorAll('.thumbnail-item').length == 2")
        ask(tab, "Which colours?")
        answer = "[...document.querySelectorAll('.bot.message')].pop()?.innerText.length ?? 0"
        tab.wait_for(f"{STOPS} && ({answer}) > 20")
        length = tab.run(answer)
        tab.wait_for(f"({answer}) > {length}")
        # Another visitor waits for the turn, and sees nothing of this conversation.
        other.wait_for("document.querySelector('textarea')")
        type_in(other, "And I?")
        other.wait_for("document.body.innerText.includes('queue: ')")
        assert "Which colours?" not in other.text() and other.run(answer) == 0
        tab.run("document.querySelector('#stop').click()")
        tab.wait_for(ENDED)
        other.wait_for(f"({answer}) > 20")
        assert tab.run(answer) >= length and "Which colours?" in tab.text()
        assert "And I?" not in tab.text()
        other.run("document.querySelector('#stop').click()")
        # What cannot be answered is one line, without folders of the server.
        tab.wait_for(READY)
        tab.choose_files("input[type=file]", [broken])
        tab.wait_for("document.querySelectorAll('.thumbnail-item').length == 1")
        ask(tab, "And this?")
        tab.wait_for("document.body.innerText.includes('Not answered')")
        assert "broken.png cannot be used: " in tab.text() and "/tmp" not in tab.text()
        # A new conversation, in the middle of an answer.
        ask(tab, "Once more")
        tab.wait_for(STOPS)
        tab.run("document.querySelector('#new').click()")
        tab.wait_for(f"{ENDED} && !document.body.innerText.includes('Once more')")
        tab.picture(tmp_path / "page.png")
        addresses = [*tab.requested(), *other.requested()]
        assert not [a for a in addresses if not a.startswith((url, "data:", "blob:"))]
        # Under another name nobody is served.
        request = urllib.request.Request(url, headers={"Host": "elsewhere.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(request)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.read() == "" and process.wait(timeout=60) == 130


@pytest.mark.slow
def test_what_the_terminal_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_mimo.cli", "chat", "nowhere", "--web"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = subprocess.run(
            [*command, "--port", str(port)], env=fetched(), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith(f"error: cannot listen at --host 127.0.0.1 --port {port}: Address")
    assert len(ran.stderr.splitlines()) == 1
    # A folder without gradio comes before one with it.
    (tmp_path / "gradio").mkdir()
    (tmp_path / "gradio/__init__.py").write_text("raise ImportError('none')\n")
    ran = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2 and ran.stderr.startswith("error: --web needs gradio, which is not")


def test_a_page_for_everybody_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_mimo.tools.chat.serve import _announce

    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        with socket.create_server((host, 0)) as listener:
            _announce(listener)
        said = capsys.readouterr().out
        assert said.startswith("open http://127.0.0.1:") and ("everybody" in said) == warned

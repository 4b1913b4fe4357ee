"""A page in a real browser without a screen: its document, its picture, its complaints."""

import base64
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)
_ONE_PAGE = ("--enable-logging=stderr", "--virtual-time-budget=20000")


@dataclass(frozen=True)
class Shown:
    """What the browser made of a page."""

    document: str
    picture: Path
    complaints: list[str]


def show(page: Path, picture: Path, *, width: int, height: int) -> Shown:
    """Open a page, run its scripts, and take a picture of it."""
    browser = find_browser()
    url = page.resolve().as_uri()
    document, _ = _run(browser, "--dump-dom", url)
    _, log = _run(browser, f"--window-size={width},{height}", f"--screenshot={picture}", url)
    # "CONSOLE:12] "Uncaught TypeError: ...", source: file:///... (12)"
    return Shown(document, picture, re.findall(r"CONSOLE[^\n]*", log))


def find_browser() -> str:
    """Path to Chromium; without one the test is skipped, and in CI it fails."""
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on the PATH: .ci/run should have installed one")
        pytest.skip("no Chromium on the PATH to show the page in (Debian: apt install chromium)")
    return browser


class Tab:
    """A tab of a running browser, to click and type in; `open_tab` makes one.

    It speaks the DevTools protocol over two pipes: commands and answers are JSON that ends with a
    zero byte.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._read, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def attach(self, url: str, *, width: int, height: int) -> Self:
        """Open a page in a new tab."""
        target = self.send("Target.createTarget", url="about:blank")
        found = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url=url)
        return self

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                return message["result"]
            self.events.append(message)

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found)
        return found["result"].get("value")

    def wait_for(self, script: str, timeout_s: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + timeout_s
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, (script, self.text())
            time.sleep(0.05)

    def text(self) -> str:
        """What a reader sees of the page."""
        return str(self.run("document.body.innerText"))

    def type(self, selector: str, text: str) -> None:
        """Type into a field."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press the key Enter where the focus is."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.send("Input.dispatchKeyEvent", type="keyDown", **key)
        self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    def choose_files(self, selector: str, files: Sequence[Path]) -> None:
        """Give files to an input of files."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def picture(self, path: Path) -> None:
        """Write a picture of what is visible, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def requested(self) -> list[str]:
        """Addresses that the page has asked for, and those that it was kept from."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._answers], [], [], 60)
            piece = os.read(self._answers, 1 << 20) if ready else b""
            assert piece, "the browser says nothing any more"
            self._read += piece
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_tab(url: str, *, width: int = 1000, height: int = 800) -> Iterator[Tab]:
    """Open a page in a browser of its own, which ends with the block."""
    browser = find_browser()
    theirs, commands = os.pipe()
    answers, others = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3 and answers on 4.
        command = [browser, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{others}', "browser", *command],
            pass_fds=(theirs, others),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(others)
        try:
            yield Tab(commands, answers).attach(url, width=width, height=height)
        finally:
            process.terminate()
            process.wait(timeout=60)
            os.close(commands)
            os.close(answers)


def _run(browser: str, *arguments: str) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, *_FLAGS, *_ONE_PAGE, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr

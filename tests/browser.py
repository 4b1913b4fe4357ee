"""A page in a real browser without a screen: its document, its picture, its complaints."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=20000"),
)


@dataclass(frozen=True)
class Shown:
    """What the browser made of a page."""

    document: str
    picture: Path
    complaints: list[str]


def show(page: Path, picture: Path, *, width: int, height: int) -> Shown:
    """Open a page, run its scripts, and take a picture of it."""
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on the PATH: .ci/run should have installed one")
        pytest.skip("no Chromium on the PATH to show the page in (Debian: apt install chromium)")
    url = page.resolve().as_uri()
    document, _ = _run(browser, "--dump-dom", url)
    _, log = _run(browser, f"--window-size={width},{height}", f"--screenshot={picture}", url)
    # "CONSOLE:12] "Uncaught TypeError: ...", source: file:///... (12)"
    return Shown(document, picture, re.findall(r"CONSOLE[^\n]*", log))


def _run(browser: str, *arguments: str) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, *_FLAGS, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr

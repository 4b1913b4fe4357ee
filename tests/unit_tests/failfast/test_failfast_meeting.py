"""Where the watchers' secret comes from, and where the hub listens."""

import os
import stat
from pathlib import Path

import pytest

from megatron_mimo.failfast import meeting
from megatron_mimo.failfast.meeting import SECRET, Meeting, given_secret, new_secret
from megatron_mimo.runtime.environment import RankEnvironment


@pytest.fixture(autouse=True)
def without_a_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def place(host: str = "localhost", *, on_one_host: bool = False) -> Meeting:
    environment = RankEnvironment(
        rank=0,
        world_size=2,
        local_rank=0,
        init_method=f"tcp://{host}:1",
        on_one_host=on_one_host,
    )
    return Meeting(environment, "llm", 1.0)


def test_the_launchers_secret_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SECRET, "given by a launcher")
    assert place().make_secret() == "given by a launcher"
    assert not list(tmp_path.iterdir())


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="has 6 characters: expected at least 16; set MIMO"):
        given_secret({SECRET: "secret"})


def test_without_a_launcher_only_this_user_can_read_it() -> None:
    first = place("node7.example")
    secret = first.make_secret()
    assert first._file is not None
    assert stat.S_IMODE(first._file.stat().st_mode) == 0o600
    assert place()._secret(str(first._file)) == secret
    first.close()
    assert not first._file.exists()


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (new_secret(), 0o640, "others may read it"),
        ("root:x:0:0", 0o600, "not such a secret"),
        ("", 0o600, "not such a secret"),
        (new_secret() + "\n", 0o600, "not such a secret"),
    ],
    # Secrets are random, and names of tests are to be the same in every process.
    ids=["readable", "words", "empty", "line end"],
)
def test_what_the_store_names_is_checked(
    tmp_path: Path, content: str, mode: int, reason: str
) -> None:
    path = tmp_path / "secret"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(RuntimeError, match=f"cannot read the secret.*{reason}.*export MIMO_FAIL"):
        place()._secret(str(path))


def test_links_pipes_and_missing_files_are_no_secrets(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text(new_secret())
    target.chmod(0o600)
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe, 0o600)
    for path in (link, pipe, tmp_path / "missing", tmp_path):
        with pytest.raises(RuntimeError, match=f"{path} .*set MIMO_FAILFAST_SECRET"):
            place()._secret(str(path))


def test_a_rank_without_the_launchers_secret_is_told() -> None:
    with pytest.raises(RuntimeError, match="has no MIMO_FAILFAST_SECRET, but rank 0 has one"):
        place()._secret("-")


def test_several_machines_share_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(ValueError, match="no folder in which rank 0 can leave a secret.*dev/null"):
        place("node7.example").make_secret()
    made = place("node7.example", on_one_host=True)
    assert made.make_secret()
    made.close()


@pytest.mark.parametrize(
    ("host", "on_one_host", "address"),
    [
        ("localhost", False, "127.0.0.1"),
        ("127.0.0.1", False, "127.0.0.1"),
        ("[::1]", False, "127.0.0.1"),
        ("203.0.113.7", True, "127.0.0.1"),
        ("203.0.113.7", False, "203.0.113.7"),
    ],
)
def test_the_hub_listens_where_its_peers_are(host: str, on_one_host: bool, address: str) -> None:
    assert place(host, on_one_host=on_one_host).listening_address == address


def test_a_machine_that_takes_its_own_name_for_a_loopback_listens_on_all_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        meeting.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 0))]
    )
    assert place("node7").listening_address == ""

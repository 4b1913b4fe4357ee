"""Curves in W&B and MLflow: what they record, and what a run does where they fail."""

import json
import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_mimo.config.services_config import ServicesConfig
from megatron_mimo.config.watch_config import WatchConfig
from megatron_mimo.watch.services.courier import (
    Courier,
    chosen_services,
    end_services,
    start_services,
)
from megatron_mimo.watch.services.recorder import Recorder
from megatron_mimo.watch.services.run_id import KeptId, read_id, write_id
from megatron_mimo.watch.services.service import Refused, Row, Start, one_line
from megatron_mimo.watch.start_record import StartRecord
from tests.services import PACKAGES, fetched, read_mlflow, read_wandb

START = Start(iteration=0, flags={"lr": 1e-4}, facts={})


def record(iteration: int, **flags: Any) -> StartRecord:
    return StartRecord(
        time="2026-11-30T12:00:00+00:00",
        iteration=iteration,
        consumed_samples=8 * iteration,
        train_iters=20,
        world_size=2,
        layout="two grids",
        flags=flags,
        command=["--train-iters", "20"],
        software={"torch": "2.13"},
        machine={"host": "here"},
        kernels=["torch"],
        variables={},
    )


def watching(folder: Path, **flags: Any) -> WatchConfig:
    return WatchConfig(tensorboard_dir=str(folder), services=ServicesConfig(**flags))


def environment(monkeypatch: pytest.MonkeyPatch, values: Mapping[str, str]) -> None:
    """Replace the environment that processes of services get."""
    for name in os.environ.keys() - values.keys():
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def own_files(folder: Path) -> list[Path]:
    """W&B's files of a run, one of each start, in order."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime)


class Memory:
    """A service in memory, which fails while it is told to."""

    def __init__(self) -> None:
        self.identity = {"project": "p"}
        self.rows: list[int] = []
        self.ids: list[str | None] = []
        self.fails = False

    def check(self) -> None: ...

    def open(self, start: Start, run_id: str | None) -> tuple[str, str]:
        self.ids.append(run_id)
        return run_id or f"id{len(self.ids)}", "here"

    def log(self, row: Row) -> None:
        if self.fails:
            raise RuntimeError("no room")
        self.rows.append(row.iteration)

    def close(self, *, failed: bool) -> None:
        if self.fails:
            raise RuntimeError("no room")


def row(iteration: int) -> Row:
    return Row(iteration=iteration, samples=iteration, seconds=0.0, scalars={"a": 1.0})


def recorder(service: Memory, path: Path, said: list[str]) -> Recorder:
    return Recorder(service, path, lambda **answer: said.append(answer["text"]))


def test_rows_that_a_service_does_not_take_are_given_again(tmp_path: Path) -> None:
    service, said = Memory(), list[str]()
    one = recorder(service, tmp_path / "id.json", said)
    one.open(START)
    for iteration in range(1, 5):
        service.fails = iteration in (2, 3)
        one.add(row(iteration))
        one.deliver(now=True)
    assert service.rows == [1, 2, 3, 4]
    assert said[1:] == [
        "takes no curves at iteration 2: no room; training goes on, and what is missing there is "
        "tried again"
    ]
    kept = read_id(tmp_path / "id.json")
    assert kept is not None and (kept.id, kept.iteration) == ("id1", 4)


def test_a_failing_service_is_not_asked_with_every_row(tmp_path: Path) -> None:
    service = Memory()
    one = recorder(service, tmp_path / "id.json", [])
    one.open(START)
    service.fails = True
    one.add(row(1))
    one.deliver()
    service.fails = False
    one.deliver()
    assert service.rows == []


def test_what_a_service_never_took_is_counted_at_the_end(tmp_path: Path) -> None:
    service, said = Memory(), list[str]()
    one = recorder(service, tmp_path / "id.json", said)
    one.open(START)
    service.fails = True
    for iteration in (1, 2):
        one.add(row(iteration))
    one.close(failed=False)
    assert "lacks 2 log lines" in said[-2] and "did not end the run: no room" in said[-1]


def test_a_continued_run_keeps_its_id_and_never_goes_back(tmp_path: Path) -> None:
    service, said, path = Memory(), list[str](), tmp_path / "id.json"
    for start, rows in ((0, (2, 4, 6)), (4, (6, 8)), (0, (2,))):
        one = recorder(service, path, said)
        one.open(Start(iteration=start, flags={}, facts={}))
        for iteration in rows:
            one.add(row(iteration))
        one.deliver()
    # What starts anew in the same folder is another run.
    assert service.ids == [None, "id1", None]
    assert service.rows == [2, 4, 6, 8, 2]
    assert "iterations up to 6" in said[1] and "nothing before iteration 7" in said[1]


def test_a_run_of_another_name_is_another_run(tmp_path: Path) -> None:
    service, path = Memory(), tmp_path / "id.json"
    write_id(path, KeptId(id="old", identity={"project": "other"}, iteration=5))
    recorder(service, path, []).open(Start(iteration=5, flags={}, facts={}))
    assert service.ids == [None]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"id": 5, "identity": {}, "iteration": 0}'])
def test_a_damaged_id_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "id.json"
    path.write_text(content)
    with pytest.raises(Refused, match="id.json: expected the id of the run") as caught:
        recorder(Memory(), path, []).open(START)
    assert "\n" not in str(caught.value)


def test_errors_are_one_line_that_names_the_cause() -> None:
    try:
        try:
            raise ConnectionRefusedError(111, "Connection refused")
        except OSError as error:
            raise RuntimeError("Max retries\nexceeded " * 100) from error
    except RuntimeError as error:
        assert one_line(error) == "[Errno 111] Connection refused"
    assert one_line(ValueError("two\nlines")) == "two lines"
    assert len(one_line(ValueError("x" * 1000))) < 320


def test_a_password_in_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="--mlflow-tracking-uri has a password"):
        ServicesConfig(mlflow_experiment="e", mlflow_tracking_uri="https://me:secret@host/")


def test_files_lie_in_the_folder_of_the_run(tmp_path: Path) -> None:
    flags = {"wandb_project": "p", "mlflow_experiment": "e"}
    wandb, mlflow = chosen_services(watching(tmp_path, **flags), "saved")
    assert wandb.settings["folder"] == "saved"
    assert (wandb.id_file, mlflow.id_file) == (tmp_path / "wandb.json", tmp_path / "mlflow.json")
    only = WatchConfig(services=ServicesConfig(**flags, wandb_save_dir="own"))
    wandb, mlflow = chosen_services(only, None)
    assert (wandb.settings["folder"], wandb.id_file) == ("own", Path("own/wandb.json"))
    assert mlflow.id_file is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"wandb_project": "p"}, "--wandb-project needs packages .*wandb.*mimo.wandb."),
        ({"mlflow_experiment": "e"}, "--mlflow-experiment needs packages .*mlflow.*mimo.mlflow."),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    flags: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Also where the tester has installed them.
    for name in ("wandb", "mlflow"):
        (tmp_path / f"{name}.py").write_text(f'raise ModuleNotFoundError("no module {name}")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match=words):
        start_services(watching(tmp_path, **flags), None)


def test_wandb_records_offline_and_stopping_it_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two starts of a run; in the second one its process stands still for a while."""
    environment(monkeypatch, fetched())
    flags = watching(tmp_path, wandb_project="p", wandb_exp_name="first")
    values = {"lm loss": 6.5, "grad-norm": math.nan, "learning-rate": math.inf}
    (courier,) = start_services(flags, None)
    courier.open(record(0, lr=1e-4, bf16=False))
    courier.add_scalars(values, 2, 16)
    courier.add_scalars({"lm loss validation": 6.0}, 2, 16)
    courier.add_scalars(values, 4, 32)
    end_services([courier])

    (courier,) = start_services(flags, None)
    courier.open(record(2, lr=2e-4))
    process = courier._process
    os.kill(process.pid, signal.SIGSTOP)
    slowest = 0.0
    for iteration in range(4, 2000, 2):
        begin = time.perf_counter()
        courier.add_scalars({f"tag {n}": 0.5 for n in range(20)}, iteration, 8 * iteration)
        slowest = max(slowest, time.perf_counter() - begin)
    # More than a pipe takes, which is 64 KiB.
    assert len(courier._unsent) > 1 << 16
    assert slowest < 0.5
    os.kill(process.pid, signal.SIGCONT)
    end_services([courier])
    assert process.returncode == 0
    assert [one.levelname for one in caplog.records if one.levelno > logging.INFO] == []

    first, second = map(read_wandb, own_files(tmp_path))
    assert first.curves["lm loss"] == {2: 6.5, 4: 6.5}
    assert first.curves["lm loss validation"] == {2: 6.0}
    assert first.curves["lm loss vs samples"] == first.curves["lm loss"]
    assert first.curves["consumed-samples"] == {2: 16.0, 4: 32.0}
    assert math.isnan(first.curves["grad-norm"][2]) and first.curves["learning-rate"][2] == math.inf
    assert (first.config["lr"], first.config["bf16"], first.state) == ("0.0001", "False", 0)
    # What an earlier start has recorded does not come again.
    assert list(second.curves["tag 7"]) == list(range(6, 2000, 2))
    assert (second.config["lr"], second.state) == ("0.0002", 0)
    assert len({path.name for path in own_files(tmp_path)}) == 1


def test_mlflow_records_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, fetched())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    flags = watching(
        tmp_path, mlflow_experiment="e", mlflow_run_name="first", mlflow_tracking_uri=uri
    )
    (courier,) = start_services(flags, None)
    courier.open(record(0, lr=1e-4, train_iters=20, moe=None))
    courier.add_scalars({"lm loss": 6.5, "time/llm compute ms": 2.0}, 2, 16)
    courier.add_scalars({"lm loss": 5.5, "grad-norm": math.nan}, 4, 32)
    # A run that ends without a word has failed.
    courier._process.stdin.close()  # type: ignore[union-attr]
    assert courier._process.wait(timeout=60) == 0
    found = read_mlflow(uri, json.loads((tmp_path / "mlflow.json").read_text())["id"])
    assert found.curves["lm loss"] == {2: 6.5, 4: 5.5}
    assert found.curves["lm loss vs samples"] == {16: 6.5, 32: 5.5}
    assert found.curves["time/llm compute ms"] == {2: 2.0}
    assert math.isnan(found.curves["grad-norm"][4])
    assert found.config["lr"] == "0.0001" and found.config["moe"] == "None"
    assert found.config["start.layout"] == "two grids"
    assert found.state == "FAILED"


def test_no_login_and_no_server_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"HOME": str(tmp_path), "WANDB_MODE": "online"}
    environment(monkeypatch, fetched(**own))
    with pytest.raises(ValueError, match="no key for W&B at .*wandb login.*WANDB_MODE=offline"):
        start_services(watching(tmp_path, wandb_project="p"), None)
    assert not own_files(tmp_path)


def test_a_package_that_is_broken_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("x = y")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="^--wandb-project: W&B: .*NameError: name 'y' is not"):
        start_services(watching(tmp_path, wandb_project="p"), None)


@pytest.mark.slow
def test_servers_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The port for discarding, which nothing listens on.
    address = "http://127.0.0.1:9"
    own = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": address, "WANDB_MODE": "online"}
    environment(monkeypatch, fetched(HOME=str(tmp_path), **own))
    with pytest.raises(ValueError, match=f"W&B cannot be reached at {address}: .*refused"):
        start_services(watching(tmp_path, wandb_project="p"), None)
    flags = watching(tmp_path, mlflow_experiment="e", mlflow_tracking_uri=address)
    with pytest.raises(ValueError, match=f"MLflow at {address} cannot be reached.*refused"):
        start_services(flags, None)


def test_a_process_that_dies_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A process that starts, but records nothing: it waits for a message that does not come.
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))
    (choice,) = chosen_services(watching(tmp_path, mlflow_experiment="e"), None)
    courier = Courier(choice)
    courier._process.kill()
    courier._process.wait()
    for iteration in (1, 2):
        courier.add_scalars({"a": 1.0}, iteration, iteration)
    end_services([courier])
    (said,) = caplog.records
    assert "MLflow: the process that records there was ended by signal 9" in said.getMessage()

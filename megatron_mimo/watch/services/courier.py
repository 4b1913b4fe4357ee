"""The rank's side of a service: what it records is handed over here, and never waited for."""

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mimo.config.watch_config import WatchConfig
from megatron_mimo.runtime.output import require_folder
from megatron_mimo.watch.services.service import CLOSE_S
from megatron_mimo.watch.start_record import StartRecord

logger = logging.getLogger(__name__)

END_S = CLOSE_S + 10
_START_S = 120.0
_MOST_BYTES = 16 << 20
_PROGRAM = "megatron_mimo.watch.services.recorder"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceChoice:
    """A service that the flags ask for.

    Attributes:
        name: Key of `recorder.SERVICES`.
        title: Name in messages.
        flag: Flag that asks for it.
        settings: Arguments of the service.
        id_file: File that keeps the id of the run; None where the run has no folder.
    """

    name: str
    title: str
    flag: str
    settings: Mapping[str, str | None]
    id_file: Path | None


def chosen_services(watching: WatchConfig, save: str | None) -> list[ServiceChoice]:
    """The services that the flags ask for.

    Args:
        watching: Flags of logging.
        save: Folder of --save; None where nothing is saved.
    """
    flags, folder = watching.services, watching.tensorboard_dir or save
    chosen = []
    if flags.wandb_project is not None:
        _, own = _folder_of_wandb(watching, save)
        chosen.append(
            ServiceChoice(
                name="wandb",
                title="W&B",
                flag="--wandb-project",
                settings={
                    "project": flags.wandb_project,
                    "name": flags.wandb_exp_name,
                    "entity": flags.wandb_entity,
                    "folder": own,
                },
                id_file=Path(folder or own) / "wandb.json",
            )
        )
    if flags.mlflow_experiment is not None:
        chosen.append(
            ServiceChoice(
                name="mlflow",
                title="MLflow",
                flag="--mlflow-experiment",
                settings={
                    "experiment": flags.mlflow_experiment,
                    "run_name": flags.mlflow_run_name,
                    "tracking_uri": flags.mlflow_tracking_uri,
                },
                id_file=None if folder is None else Path(folder) / "mlflow.json",
            )
        )
    return chosen


def start_services(watching: WatchConfig, save: str | None) -> "list[Courier]":
    """Start the services that the flags ask for, and see that each can be used.

    Args:
        watching: Flags of logging.
        save: Folder of --save; None where nothing is saved.

    Raises:
        ValueError: A service cannot be used; the message is one line that says what to do.
    """
    if watching.services.wandb_project is not None:
        # W&B itself would go on in a temporary folder.
        flag, folder = _folder_of_wandb(watching, save)
        require_folder(flag, Path(folder))
    # They import their packages side by side.
    couriers = [Courier(choice) for choice in chosen_services(watching, save)]
    for courier in couriers:
        courier.wait_until_ready()
    return couriers


def _folder_of_wandb(watching: WatchConfig, save: str | None) -> tuple[str, str]:
    """Flag and folder of W&B's own files."""
    folders = {
        "--wandb-save-dir": watching.services.wandb_save_dir,
        "--save": save,
        "--tensorboard-dir": watching.tensorboard_dir,
    }
    # `resolve` has seen to it that there is one.
    return next((flag, folder) for flag, folder in folders.items() if folder is not None)


def end_services(couriers: "Sequence[Courier]") -> None:
    """Hand over what is left, and wait until the services have it, for a minute at most.

    Args:
        couriers: Services of a run that has ended well.
    """
    deadline = time.monotonic() + END_S
    for courier in couriers:
        courier.end()
    for courier in couriers:
        courier.wait(deadline)


class Courier:
    """Hands curves to a process that records them in a service.

    After `open` no method raises, and none but `wait` waits: what the process does not take at
    once is kept and offered again with the next values. When it fails, or has ended, a warning
    says so, once.

    Args:
        choice: Service.
    """

    def __init__(self, choice: ServiceChoice) -> None:
        self._title, self._flag = choice.title, choice.flag
        # Where this package lies may be known to this process only.
        paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[3])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # signals to the ranks spare it: it ends after its rank
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        self._unsent, self._unread = bytearray(), b""
        self._has_ended = False
        self._is_full = False
        self._send(
            kind="begin",
            service=choice.name,
            settings=dict(choice.settings),
            id_file=None if choice.id_file is None else str(choice.id_file),
        )

    def wait_until_ready(self) -> None:
        """Wait until the service is known to be usable.

        Raises:
            ValueError: It is not; the message is one line that says what to do.
        """
        self._wait_for("ready")

    def open(self, record: StartRecord) -> None:
        """Begin a run in the service, or go on with that of an earlier start.

        Raises:
            ValueError: It cannot be begun; the message is one line that says what to do.
        """
        facts = {
            "command": " ".join(record.command),
            "iteration": record.iteration,
            "kernels": list(record.kernels),
            "layout": record.layout,
            "machine": dict(record.machine),
            "software": dict(record.software),
            "time": record.time,
            "world_size": record.world_size,
        }
        self._send(kind="open", iteration=record.iteration, flags=dict(record.flags), facts=facts)
        self._wait_for("opened")

    def add_scalars(self, scalars: Mapping[str, float], iteration: int, samples: int) -> None:
        """Hand over the values of an iteration.

        Args:
            scalars: Values by TensorBoard tag.
            iteration: Number of the iteration.
            samples: Number of samples trained on so far.
        """
        if self._has_ended:
            return
        self._send(
            kind="row",
            iteration=iteration,
            samples=samples,
            seconds=time.time(),
            scalars=dict(scalars),
        )
        is_over = self._is_over()
        for answer in self._hear():
            self._tell(answer)
        if is_over:
            self._note_the_end()

    def end(self) -> None:
        """Tell the process that the run has ended well; it then does what is left to do."""
        if not self._has_ended:
            self._send(kind="close")

    def wait(self, deadline: float) -> None:
        """Wait until the process has ended, and end it where that takes too long.

        Args:
            deadline: Time of `time.monotonic` until which it may take.
        """
        while not self._has_ended and time.monotonic() < deadline:
            is_over = self._is_over()
            for answer in self._await(deadline):
                self._has_ended |= answer["kind"] == "closed"
                self._tell(answer)
            if is_over:
                self._note_the_end()
        if not self._has_ended:
            logger.warning(
                "%s: the process that records there did not end within %.0f s of the run's end and "
                "is ended; the service may lack the last values",
                *(self._title, END_S),
            )
            self._process.kill()
        self._process.wait()

    def _wait_for(self, kind: str) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            is_over = self._is_over()
            for answer in self._await(deadline):
                if answer["kind"] == "refused":
                    text = answer["text"]
                    raise ValueError(
                        text if text.startswith("--") else f"{self._flag}: {self._title}: {text}"
                    )
                self._tell(answer)
                if answer["kind"] == kind:
                    return
            if is_over:
                raise ValueError(
                    f"{self._flag}: the process that records in {self._title} {self._end}; train "
                    f"without the flag, or run `{Path(sys.executable).name} -m {_PROGRAM}` to see "
                    f"whether it starts"
                )
        self._process.kill()
        raise ValueError(
            f"{self._flag}: {self._title} did not answer within {_START_S:.0f} s; train without "
            f"the flag, or look whether its server is there"
        )

    def _send(self, **message: Any) -> None:
        line = (json.dumps(message) + "\n").encode()
        if len(self._unsent) + len(line) <= _MOST_BYTES:
            self._unsent += line
        elif not self._is_full:
            self._is_full = True
            logger.warning(
                "%s: the process that records there has taken nothing for long, and lacks values "
                "from now on; training goes on",
                self._title,
            )
        self._push()

    def _push(self) -> None:
        """Write as much as the pipe takes."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._to, self._unsent)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent.clear()

    def _hear(self) -> Sequence[dict[str, Any]]:
        """Answers that have come."""
        try:
            while found := os.read(self._from, 1 << 16):
                self._unread += found
        except BlockingIOError:
            pass
        *lines, self._unread = self._unread.split(b"\n")
        return [json.loads(line) for line in lines]

    def _await(self, deadline: float) -> Sequence[dict[str, Any]]:
        """Answers, after a wait for the first one, or for the process to take what is unsent."""
        to = [self._to] if self._unsent else []
        left = min(1.0, max(0.0, deadline - time.monotonic()))
        select.select([self._from], to, [], left)
        self._push()
        return self._hear()

    def _tell(self, answer: dict[str, Any]) -> None:
        if answer["kind"] in ("warning", "refused"):
            logger.warning("%s: %s", self._title, answer["text"])
        elif answer["kind"] == "opened":
            logger.info("%s", answer["text"])

    def _is_over(self) -> bool:
        """Whether the process has ended; ask before answers are read, so that none is missed."""
        return self._process.poll() is not None

    def _note_the_end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        logger.warning(
            "%s: the process that records there %s: it gets no more values; training goes on",
            *(self._title, self._end),
        )

    @property
    def _end(self) -> str:
        code = self._process.returncode
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

"""Weights & Biases."""

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from megatron_mimo.watch.services.service import CLOSE_S, Refused, Row, Start, missing, one_line
from megatron_mimo.watch.tags import over_samples

_SAMPLES = "consumed-samples"
_FLAG = "--wandb-project"
_OFFLINE = "WANDB_MODE=offline records without it, for `wandb sync` to send later"
_INIT_S = 30.0
_FLUSH_S = 2.0
_PROBE_S, _PROBE_BYTES = 60.0, 4096


class WandbService:
    """A run of Weights & Biases; its step is the iteration.

    Args:
        project: Name of the project.
        name: Name of the run; None for one that W&B makes up.
        entity: Name of the team or user; None for the user's own choice.
        folder: Folder in which W&B makes its folder `wandb`.
    """

    def __init__(self, *, project: str, name: str | None, entity: str | None, folder: str) -> None:
        self._project, self._name, self._entity = project, name, entity
        self._folder = folder
        self._defined: set[str] = set()
        self._probed = time.monotonic()

    @property
    def identity(self) -> Mapping[str, str | None]:
        """See `Service.identity`."""
        return {"entity": self._entity, "project": self._project, "name": self._name}

    def check(self) -> None:
        """See `Service.check`."""
        # Reports of its own faults go to W&B's makers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ["WANDB_SILENT"] = "true"
        try:
            import wandb
        except ImportError as error:
            raise missing(_FLAG, "wandb", error) from error
        self._wandb: Any = wandb
        try:
            settings = wandb.setup().settings
        # Its settings are read from the environment and from files, and checked by pydantic.
        except Exception as error:
            raise Refused(
                f"{_FLAG}: the settings of W&B are wrong: {one_line(error)}; see the variables "
                f"WANDB_... and the file wandb/settings"
            ) from error
        if settings.mode in ("offline", "dryrun", "disabled"):
            return
        try:
            is_logged_in = wandb.login(prompt=False, verify=True)
        except wandb.errors.Error as error:
            raise Refused(_why_not_in(settings.base_url, error)) from error
        if not is_logged_in:
            raise Refused(
                f"{_FLAG}: there is no key for W&B at {settings.base_url}: run `wandb login`, or "
                f"set WANDB_API_KEY; {_OFFLINE}"
            )

    def open(self, start: Start, run_id: str | None) -> tuple[str, str]:
        """See `Service.open`."""
        wandb = self._wandb
        try:
            self._run = wandb.init(
                project=self._project,
                entity=self._entity,
                name=self._name,
                id=run_id,
                resume="allow",
                dir=self._folder,
                config=dict(start.flags) | {"start": dict(start.facts)},
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    # A resumed run may have other flags than before.
                    allow_val_change=True,
                    init_timeout=_INIT_S,
                    finish_timeout=CLOSE_S,
                    finish_timeout_raises=True,
                    # What this process uses is nobody's interest.
                    x_stats_pid=os.getppid(),
                    x_transaction_log_flush_interval=_FLUSH_S,
                    # Left out, the page's button would interrupt this process.
                    stop_fn=lambda: None,
                ),
            )
        # W&B raises errors of its own and of pydantic, and OSErrors.
        except Exception as error:
            raise Refused(f"{_FLAG}: W&B begins no run: {one_line(error)}; {_OFFLINE}") from error
        run = self._run
        run.define_metric(_SAMPLES)
        if run.disabled:
            return run.id, "W&B: records nothing (WANDB_MODE=disabled)"
        if run.offline:
            where = run.settings.sync_dir
            return run.id, f"W&B: run {run.id}, offline; `wandb sync {where}` sends it"
        return run.id, f"W&B: run {run.id} at {run.url}"

    def log(self, row: Row) -> None:
        """See `Service.log`."""
        # On a full disk W&B goes on without a word.
        if time.monotonic() - self._probed > _PROBE_S:
            _require_space(self._folder)
            self._probed = time.monotonic()
        by_samples = over_samples(row.scalars)
        for tag in by_samples.keys() - self._defined:
            self._run.define_metric(tag, step_metric=_SAMPLES)
            self._defined.add(tag)
        values = dict(row.scalars) | by_samples | {_SAMPLES: row.samples}
        self._run.log(values, step=row.iteration)

    def close(self, *, failed: bool) -> None:
        """See `Service.close`."""
        where = self._run.settings.sync_dir
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except Exception as error:
            raise RuntimeError(
                f"{one_line(error)}; `wandb sync {where}` sends what is missing"
            ) from error


def _require_space(folder: str) -> None:
    """Raise an OSError where a file in a folder cannot be filled."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0" * _PROBE_BYTES)
        probe.flush()
        os.fsync(probe.fileno())


def _why_not_in(url: str, error: Exception) -> str:
    """What to do about a failed login. W&B's error does not tell a server that is not there."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme not in getproxies():
        try:
            socket.create_connection((parts.hostname or "", port), timeout=5).close()
        except OSError as reason:
            return (
                f"{_FLAG}: W&B cannot be reached at {url}: {reason}; check the network and "
                f"WANDB_BASE_URL; {_OFFLINE}"
            )
    return (
        f"{_FLAG}: W&B at {url} lets nobody in: {one_line(error)}; check the key of "
        f"`wandb login` or WANDB_API_KEY; {_OFFLINE}"
    )

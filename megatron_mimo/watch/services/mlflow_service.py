"""MLflow."""

import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from megatron_mimo.watch.services.service import Refused, Row, Start, missing, one_line
from megatron_mimo.watch.tags import over_samples

_FLAG = "--mlflow-experiment"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_LONGEST_VALUE = 6000  # MLflow's own limits, of a parameter, a tag and a request
_LONGEST_TAG = 5000
_MOST_VALUES, _MOST_PARAMETERS = 1000, 100
_DEFAULTS = {
    # Reports to its makers, about which functions are called.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A request is tried again with the next row. MLflow's own times come to many minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}


class MlflowService:
    """A run of MLflow; steps of its metrics are iterations, or samples.

    Args:
        experiment: Name of the experiment, which is created where there is none.
        run_name: Name of the run; None for one that MLflow makes up.
        tracking_uri: Address of a server or of a database; None for what MLflow chooses:
            MLFLOW_TRACKING_URI, or else mlflow.db in the working folder.
    """

    def __init__(self, *, experiment: str, run_name: str | None, tracking_uri: str | None) -> None:
        self._experiment, self._run_name, self._uri = experiment, run_name, tracking_uri
        self._shown = ""

    @property
    def identity(self) -> Mapping[str, str | None]:
        """See `Service.identity`."""
        return {"experiment": self._experiment, "run_name": self._run_name, "uri": self._shown}

    def check(self) -> None:
        """See `Service.check`."""
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            import mlflow
            from mlflow import entities
        except ImportError as error:
            raise missing(_FLAG, "mlflow", error) from error
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        uri: str = self._uri or mlflow.get_tracking_uri()
        self._shown = _without_password(uri)
        self._entities: Any = entities
        try:
            if uri.partition(":")[0].partition("+")[0] in _DATABASES:
                importlib.import_module("sqlalchemy")
                importlib.import_module("alembic")
        except ImportError as error:
            raise missing(_FLAG, "mlflow", error) from error
        try:
            self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(self._experiment)
            self._experiment_id: str = (
                self._client.create_experiment(self._experiment)
                if found is None
                else found.experiment_id
            )
        except ImportError as error:
            raise Refused(
                f"{_FLAG}: MLflow needs a package for {self._shown} that is not installed: "
                f"{one_line(error)}; install it, or name another --mlflow-tracking-uri"
            ) from error
        # MLflow passes on errors of requests, of sqlalchemy and of database drivers.
        except Exception as error:
            raise self._refused("cannot be reached, or lets nobody in", error) from error

    def open(self, start: Start, run_id: str | None) -> tuple[str, str]:
        """See `Service.open`."""
        try:
            if run_id is None:
                run = self._client.create_run(self._experiment_id, run_name=self._run_name)
            else:
                run = self._client.get_run(run_id)
                self._client.update_run(run_id, status="RUNNING")
            self._id: str = run.info.run_id
            self._record(start, run.data.params)
        except Exception as error:
            what = "begins no run" if run_id is None else f"does not go on with run {run_id}"
            raise self._refused(what, error) from error
        return self._id, (
            f"MLflow: run {run.info.run_name} ({self._id}) of experiment {self._experiment}, in "
            f"{self._shown}"
        )

    def log(self, row: Row) -> None:
        """See `Service.log`."""
        milliseconds = int(row.seconds * 1000)
        axes = (row.scalars, row.iteration), (over_samples(row.scalars), row.samples)
        metrics = [
            self._entities.Metric(tag, float(value), milliseconds, step)
            for scalars, step in axes
            for tag, value in scalars.items()
        ]
        for part in _parts(metrics, _MOST_VALUES):
            self._client.log_batch(self._id, metrics=part)

    def close(self, *, failed: bool) -> None:
        """See `Service.close`."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _record(self, start: Start, known: Mapping[str, str]) -> None:
        """Record flags as parameters, which never change, and what has changed since as a tag."""
        flags = {name: str(value)[:_LONGEST_VALUE] for name, value in start.flags.items()}
        new = [
            self._entities.Param(name, text) for name, text in flags.items() if name not in known
        ]
        for part in _parts(new, _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=part)
        tags = {f"start.{name}": _text(value) for name, value in start.facts.items()}
        changed = {name: text for name, text in flags.items() if known.get(name, text) != text}
        if changed:
            tags[f"changed after iteration {start.iteration}"] = _text(changed)
        entities = [self._entities.RunTag(name, text) for name, text in tags.items()]
        self._client.log_batch(self._id, tags=entities)

    def _refused(self, what: str, error: Exception) -> Refused:
        return Refused(
            f"{_FLAG}: MLflow at {self._shown} {what}: {one_line(error)}; check "
            f"--mlflow-tracking-uri or MLFLOW_TRACKING_URI, and where it wants a login, "
            f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; --mlflow-tracking-uri "
            f"sqlite:///mlflow.db needs no server"
        )


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:_LONGEST_TAG]


def _parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(values), size):
        yield values[first : first + size]

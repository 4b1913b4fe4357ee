"""Flags of services for curves: W&B and MLflow."""

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from tyro.conf import arg

from megatron_mimo.settings import Folder, Name, OnlyWith, check_bounds

_Address = Annotated[str | None, arg(metavar="URI", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServicesConfig:
    """Services that record the curves in addition to TensorBoard.

    Attributes:
        wandb_project: Project of Weights & Biases to record the run in; needs `pip install
            'megatron-mimo[wandb]'`.
        wandb_exp_name: Name of the run in W&B; left out: W&B makes one up.
        wandb_entity: Team or user of the project; left out: as W&B is set up.
        wandb_save_dir: Folder in which W&B makes its folder `wandb`; left out: that of --save, or
            else of --tensorboard-dir.
        mlflow_experiment: Experiment of MLflow to record the run in; needs `pip install
            'megatron-mimo[mlflow]'`.
        mlflow_run_name: Name of the run in MLflow; left out: MLflow makes one up.
        mlflow_tracking_uri: Address of MLflow's server or database; left out: MLFLOW_TRACKING_URI,
            or else mlflow.db in the working folder.
    """

    wandb_project: Name = None
    wandb_exp_name: Annotated[Name, OnlyWith("--wandb-project")] = None
    wandb_entity: Annotated[Name, OnlyWith("--wandb-project")] = None
    wandb_save_dir: Annotated[Folder, OnlyWith("--wandb-project")] = None
    mlflow_experiment: Name = None
    mlflow_run_name: Annotated[Name, OnlyWith("--mlflow-experiment")] = None
    mlflow_tracking_uri: Annotated[_Address, OnlyWith("--mlflow-experiment")] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        uri = self.mlflow_tracking_uri
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError(
                "--mlflow-tracking-uri has a password in it, which records of the run would show: "
                "set MLFLOW_TRACKING_URI instead, or MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )

    @property
    def are_any(self) -> bool:
        """Whether a service records the run."""
        return self.wandb_project is not None or self.mlflow_experiment is not None

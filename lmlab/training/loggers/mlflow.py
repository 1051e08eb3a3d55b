"""The logger of MLflow: a run on a tracking server, or in a database on this machine."""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt
from lightning.pytorch.loggers import Logger

from lmlab.errors import UserError
from lmlab.runs.choices import flatten
from lmlab.training.loggers.rows import Outcome, Row, RowLogger, run_name

STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
LONGEST = 6000  # characters of a parameter
MOST_METRICS, MOST_PARAMETERS = 1000, 100  # that a request may have
SCHEMES = ("http", "https", "databricks", "uc", "file", "sqlite", "postgresql", "mysql", "mssql")  # of an address
ANSWER = 10  # seconds that a server has to answer a request


class MLflowRun:
    """A run of MLflow, which is found again by the id of the run in one of its tags."""

    whole_rows = False

    def __init__(self, tracking_uri: str, experiment: str, run_id: str, name: str, config: dict[str, Any]):
        """Keeps what the run is begun with.

        Args:
            tracking_uri: the address of the server or the database.
            experiment: the name of the experiment that has the run.
            run_id: the identity of the run.
            name: the name under which it is shown.
            config: becomes the parameters of the run.
        """
        self.tracking_uri, self.experiment, self.run_id, self.name = tracking_uri, experiment, run_id, name
        self.parameters = {key: str(value)[:LONGEST] for key, value in flatten(config).items()}
        self.label = f"MLflow ({tracking_uri})"

    def connect(self) -> dict[str, int]:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.make_database()
        self.client = MlflowClient(self.tracking_uri)
        experiment = self.experiment_id()
        runs = self.client.search_runs([experiment], f"tags.`lmlab.run_id` = '{self.run_id}'")
        run = runs[0] if runs else self.client.create_run(experiment, None, {"lmlab.run_id": self.run_id}, self.name)
        self.id = run.info.run_id
        if runs:
            self.client.update_run(self.id, "RUNNING")
        # A parameter stays what it was: one that was changed since is not sent.
        new = [Param(key, value) for key, value in self.parameters.items() if key not in run.data.params]
        for first in range(0, len(new), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=new[first : first + MOST_PARAMETERS])
        return {
            name: max(point.step for point in self.client.get_metric_history(self.id, name))
            for name in run.data.metrics
        }

    def make_database(self) -> None:
        """Makes the database if it is a file that is not there: beside it, as MLflow can't go on with half of one."""
        from mlflow import MlflowClient

        path = Path(self.tracking_uri.removeprefix("sqlite:///"))
        if self.tracking_uri.startswith("sqlite:///") and not path.exists():
            beside = path.with_name(f".{path.name}.{self.run_id}")
            beside.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{beside}")
            with suppress(FileExistsError):  # another run has been faster
                os.link(beside, path)
            beside.unlink()

    def experiment_id(self) -> str:
        """Returns the id of the experiment, which is made if there is none."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return self.client.create_experiment(self.experiment)
            except MlflowException:  # another run may have just made it
                found = self.client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return found.experiment_id

    def write(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(name, value, round(1000 * row.time), row.step) for row in rows for name, value in row.metrics.items()
        ]
        for first in range(0, len(points), MOST_METRICS):
            self.client.log_batch(self.id, points[first : first + MOST_METRICS])

    def finish(self, outcome: Outcome) -> None:
        self.client.set_terminated(self.id, STATUS[outcome])


def mlflow(
    run_dir: str,
    run_id: str,
    config: dict[str, Any],
    *,
    tracking_uri: str,
    experiment: str = "lmlab",
    name: str | None = None,
    patience: Annotated[float, Gt(0)] = 60.0,
) -> Logger:
    """Returns the logger of a run of MLflow.

    Args:
        tracking_uri: the address of a tracking server, or `sqlite:///FILE`.
        experiment: the experiment that has the run.
        name: the name under which the run is shown; null for the end of its path.
        patience: seconds that the server has at the end to take what it has not yet.
    """
    scheme = tracking_uri.partition(":")[0].partition("+")[0]
    if ":" in tracking_uri and scheme not in SCHEMES:
        raise UserError(
            f"logger.mlflow.tracking_uri={tracking_uri}: MLflow knows no such kind of address.\n"
            "It is that of a server, https://…, or of a database, sqlite:///FILE."
        )
    # Whatever fails is tried again here, and MLflow tells its makers of its use unless it is told not to.
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder, where the config names one
    }
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    import_module("mlflow.tracking")  # a second, which is not to fall upon the first steps
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return RowLogger(MLflowRun(tracking_uri, experiment, run_id, name or run_name(run_dir), config), run_dir, patience)

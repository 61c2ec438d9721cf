"""Rows of metrics to MLflow."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from RL2.config.flat import flat
from RL2.trainer.sinks.sink import TrackedRun

_ID = "rl2.run_id"  # MLflow chooses its own run ids; this tag holds RL2's
_PARAMS = 100  # at most, in one request
_LENGTH = 500  # characters of a parameter that every store takes


class MLflow:
    """The store of MLFLOW_TRACKING_URI, else files in the folder `mlruns` of the run.

    A project is an experiment of MLflow. Steps that a resumed run repeats appear twice, with equal
    numbers.
    """

    module, install = "mlflow", "mlflow-skinny"
    afterwards = ""

    def __init__(self, run: TrackedRun, tell: Callable[[str], None]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # sends no usage data
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # By default MLflow asks for a database, which needs its large package.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(run.folder, "mlruns").absolute().as_uri()
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        earlier = self._client.search_runs([experiment], f"tags.`{_ID}` = '{run.id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        created = self._client.create_run(experiment, tags={_ID: run.id}, run_name=run.name)
        self._id = created.info.run_id
        params = [Param(key, str(value)[:_LENGTH]) for key, value in flat(run.config)]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _PARAMS])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(name, x, now, step) for name, x in metrics.items()]
        )

    def close(self, good: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if good else "FAILED")

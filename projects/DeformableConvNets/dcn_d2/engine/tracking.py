# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writers of scalars and pictures for services that collect runs: Weights & Biases and MLflow.

A writer starts at its first values, so that a run that never trains leaves nothing behind. It keeps the id of its run
in OUTPUT_DIR/tracking.json; --resume goes on with that run. Iterations that run again after a kill keep the values that
the service has already: it cannot take them back.

A service that cannot be reached never ends a training: there is a warning, values are kept in memory, and the writer
tries again later.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..config import with_dcn_keys
from ..config.access import keys_of, value_of
from ..files import is_local, write_atomically
from .errors import one_line
from .stopping import ending

logger = logging.getLogger(__name__)

STATE = "tracking.json"
PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}  # module, and what pip calls it
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds from a failure to the next try, doubled each time
MOST_PENDING = 2000  # iterations whose values wait for the service; older ones are given up


def check_writers(cfg: CfgNode) -> None:
    """Refuses TRACKING.WRITERS whose package is not installed."""
    for writer in with_dcn_keys(cfg).TRACKING.WRITERS:
        module, package = PACKAGES[writer]
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"TRACKING.WRITERS names {writer}, which is not installed: pip install {package}")


def build_tracking_writers(cfg: CfgNode) -> list[EventWriter]:
    """Gives a writer for each service that TRACKING.WRITERS names, once."""
    kinds = {"wandb": WandbWriter, "mlflow": MLflowWriter}
    return [kinds[name](cfg) for name in dict.fromkeys(with_dcn_keys(cfg).TRACKING.WRITERS)]


class TrackingWriter(EventWriter):
    """What all services share: what is new, what is kept for later, and where the run's id is.

    Args:
        cfg: of the run; it is sent to the service.
        window: scalars that vary are the median of so many iterations, as in metrics.json.
    """

    name = ""

    def __init__(self, cfg: CfgNode, window: int = 20) -> None:
        self.cfg, self.window = with_dcn_keys(cfg), window
        self._started = self._opened = self._closed = False
        self._last = self._last_picture = -1  # the last iterations that were seen
        self._pending: dict[int, dict[str, float]] = {}
        self._wait, self._next_try = FIRST_PAUSE, 0.0

    def start(self, run: str | None) -> str:
        """Begins or, with the id of an earlier `run`, continues; gives the id of the run."""
        raise NotImplementedError

    def log(self, iteration: int, values: dict[str, float]) -> None:
        """Sends the values of one iteration."""
        raise NotImplementedError

    def log_picture(self, iteration: int, name: str, picture: np.ndarray) -> None:
        """Sends a picture, (height, width, 3) of uint8 in RGB."""
        raise NotImplementedError

    def finish(self, status: str) -> None:
        """Ends the run: "finished", "stopped early" (by TEST.PATIENCE), "stopped" (by a signal) or "failed"."""
        raise NotImplementedError

    def write(self) -> None:
        if not self._opened:  # not earlier: --overwrite removes the file when training starts
            self._opened = True
            self._last = int(self._state().get("iteration", -1))
        storage = get_event_storage()
        newest = self._last
        for key, (value, iteration) in storage.latest_with_smoothing_hint(self.window).items():
            if iteration > self._last:
                self._pending.setdefault(iteration, {})[key] = float(value)
                newest = max(newest, iteration)
        self._last = newest
        pictures = [entry for entry in storage._vis_data if entry[2] > self._last_picture]  # as TensorboardXWriter does
        self._last_picture = max([self._last_picture, *(entry[2] for entry in pictures)])
        for iteration in sorted(self._pending)[:-MOST_PENDING]:
            del self._pending[iteration]
        if (self._pending or pictures) and time.monotonic() >= self._next_try:
            self._try(lambda: self._send(pictures))

    def _send(self, pictures: list[tuple[str, Any, int]]) -> None:
        if not self._started:
            known = self._state().get("run")
            self._keep(run=self.start(known))
            self._started = True
        for iteration in sorted(self._pending):
            self.log(iteration, self._pending[iteration])
            del self._pending[iteration]
            self._keep(iteration=iteration)
        for key, picture, iteration in pictures:
            self.log_picture(iteration, key, _as_array(picture))

    def _try(self, action: Any) -> None:
        """Calls the service; what it raises becomes a warning, and nothing is sent for a while."""
        try:
            action()
            self._wait = FIRST_PAUSE
        except Exception as error:  # libraries of services raise whatever they like
            self._next_try = time.monotonic() + self._wait
            logger.warning(
                f"{self.name} (TRACKING.WRITERS) cannot be written: {one_line(error)[:500]}. Training goes on; the "
                f"next try is in {self._wait:.0f} s"
            )
            self._wait = min(2 * self._wait, LONGEST_PAUSE)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pending:
            self._try(lambda: self._send([]))
        if self._started:
            status = ending()
            self._try(lambda: self.finish(status))

    def _state(self) -> dict[str, Any]:
        return _read_state(self.cfg.OUTPUT_DIR).get(self.name, {})

    def _keep(self, **values: Any) -> None:
        """Notes values in OUTPUT_DIR/tracking.json."""
        if not is_local(self.cfg.OUTPUT_DIR):
            return
        state = _read_state(self.cfg.OUTPUT_DIR)
        state[self.name] = state.get(self.name, {}) | values
        text = json.dumps(state, indent=1)
        with write_atomically(Path(self.cfg.OUTPUT_DIR, STATE)) as file:
            file.write(text.encode())

    @property
    def run_name(self) -> str:
        """TRACKING.RUN_NAME, or the last part of OUTPUT_DIR."""
        return self.cfg.TRACKING.RUN_NAME or os.path.basename(os.path.abspath(self.cfg.OUTPUT_DIR))

    def parameters(self) -> dict[str, Any]:
        """The config as one value for each full name of a key."""
        return {key: value_of(self.cfg, key) for key in sorted(keys_of(self.cfg))}


def _read_state(folder: str) -> dict[str, Any]:
    try:
        state = json.loads(Path(folder, STATE).read_text()) if is_local(folder) else {}
        return {key: value for key, value in state.items() if isinstance(value, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _as_array(picture: Any) -> np.ndarray:
    """Gives (height, width, 3) of uint8. `EventStorage.put_image` takes (3, height, width), of uint8 or in [0, 1]."""
    array = picture.detach().cpu().numpy() if isinstance(picture, torch.Tensor) else np.asarray(picture)
    if array.dtype != np.uint8:
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


class WandbWriter(TrackingWriter):
    """Weights & Biases. WANDB_MODE, WANDB_ENTITY, WANDB_BASE_URL and the like mean what its manual says."""

    name = "wandb"

    def start(self, run: str | None) -> str:
        import wandb

        where = self.cfg.OUTPUT_DIR if is_local(self.cfg.OUTPUT_DIR) else None
        # Without these limits, a network that is gone would hold up the training and its end.
        limits = wandb.Settings(init_timeout=30, login_timeout=30, finish_timeout=120)
        self._run = wandb.init(
            project=self.cfg.TRACKING.PROJECT,
            name=self.run_name,
            id=run or uuid.uuid4().hex[:8],
            resume="allow",
            dir=where,
            config=self.parameters(),
            settings=limits,
            allow_val_change=True,
        )
        # W&B refuses steps that go back. So iterations are a value like others, which the plots take as their x-axis.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        return str(self._run.id)

    def log(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def log_picture(self, iteration: int, name: str, picture: np.ndarray) -> None:
        import wandb

        self._run.log({"iteration": iteration, name: wandb.Image(picture)})

    def finish(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status == "failed" else 0)


class MLflowWriter(TrackingWriter):
    """MLflow. MLFLOW_TRACKING_URI and the like mean what its manual says."""

    name = "mlflow"

    def start(self, run: str | None) -> str:
        # MLflow would repeat a call that fails for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        if run:
            try:
                self._client.update_run(run, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                logger.warning(f"mlflow: the run {run} is no longer there; a new one begins")
                run = None
        self._id = run or self._create()
        self._client.log_text(self._id, self.cfg.dump(), "config.yaml")
        return self._id

    def _create(self) -> str:
        from mlflow.entities import Param

        project = self.cfg.TRACKING.PROJECT
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        run = self._client.create_run(experiment, run_name=self.run_name).info.run_id
        # An empty value is refused by some stores. The limits are MLflow's: 100 parameters a call, 6000 characters.
        values = [Param(key, str(value)[:6000] or "''") for key, value in self.parameters().items()]
        for start in range(0, len(values), 100):
            self._client.log_batch(run, params=values[start : start + 100])
        return run

    def log(self, iteration: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(mlflow_name(key), value, now, iteration) for key, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def log_picture(self, iteration: int, name: str, picture: np.ndarray) -> None:
        self._client.log_image(self._id, picture, key=mlflow_name(name), step=iteration)

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, {"stopped": "KILLED", "failed": "FAILED"}.get(status, "FINISHED"))


def mlflow_name(name: str) -> str:
    """Gives a name that MLflow takes: it refuses most characters, which names of classes may have."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)[:250]

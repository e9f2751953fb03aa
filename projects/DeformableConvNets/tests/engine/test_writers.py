# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writers for TensorBoard, Weights & Biases and MLflow; their values are read back from what they have stored."""

import contextlib
import importlib.util
import json
import logging
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from dcn_d2.engine import DCNTrainer
from dcn_d2.engine.stopping import StoppedEarly
from dcn_d2.engine.tracking import TrackingWriter, mlflow_name
from dcn_d2.report.runs import read_runs

from .tiny import tiny_config


class Trainer(DCNTrainer):
    """Writes after each iteration, where others do after 20."""

    def build_hooks(self) -> list[HookBase]:
        found = super().build_hooks()
        for hook in found:
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = 1
        return found


def train(folder: Path, *others: Any, resume: bool = False, overwrite: bool = False) -> Trainer:
    seed_all_rng(1)  # DCNTrainer leaves it to `setup`
    trainer = Trainer(tiny_config(folder, *others))
    trainer.resume_or_load(resume=resume, overwrite=overwrite)
    trainer.train()
    return trainer


def train_twice(folder: Path, *others: Any) -> None:
    """Trains as far as iteration 5, loses all checkpoints but the one after iteration 3, and goes on from there."""
    train(folder, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 4, *others)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").unlink()
    train(folder, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 4, *others, resume=True)


def recorded(folder: Path, key: str = "total_loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line[key] for line in lines if key in line}


def read_tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()


def test_tensorboard_forgets_the_iterations_that_run_again(tmp_path: Path) -> None:
    train_twice(tmp_path)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    found = {event.step: event.value for event in read_tensorboard(tmp_path).Scalars("total_loss")}
    events = read_tensorboard(tmp_path).Scalars("total_loss")
    assert [event.step for event in events] == [0, 1, 2, 3, 4, 5]
    assert found == pytest.approx(recorded(tmp_path), rel=1e-6)
    assert [(run["start"], run["end"], run["status"]) for run in read_runs(tmp_path)] == [
        (0, 6, "finished"),
        (4, 6, "finished"),
    ]


def test_tensorboard_keeps_the_last_evaluation_of_a_training_that_goes_on_after_its_end(tmp_path: Path) -> None:
    train(tmp_path, "DATASETS.TEST", ("nuclei_val",))
    train(tmp_path, "SOLVER.MAX_ITER", 5, resume=True)
    assert [event.step for event in read_tensorboard(tmp_path).Scalars("bbox/AP50")] == [4]


def test_mlflow_has_config_values_and_pictures_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    keys = ["TRACKING.WRITERS", ("mlflow",), "TRACKING.PROJECT", "nuclei", "DATASETS.TEST", ("nuclei_val",)]
    folder = tmp_path / "my run"
    train_twice(folder, *keys, "TEST.PICTURES", 1, "TEST.EVAL_PERIOD", 2)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("nuclei").experiment_id])
    assert (run.info.run_name, run.info.status) == ("my run", "FINISHED")
    assert run.data.params["SOLVER.MAX_ITER"] == "6" and run.data.params["DATASETS.TEST"] == "('nuclei_val',)"
    assert "SOLVER:" in Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))).read_text()
    losses = client.get_metric_history(run.info.run_id, "total_loss")
    assert sorted(metric.step for metric in losses) == [0, 1, 2, 3, 4, 5], "each iteration once"
    values, expected = {metric.step: metric.value for metric in losses}, recorded(folder)
    assert {step: values[step] for step in range(4)} == pytest.approx({step: expected[step] for step in range(4)})
    # A service cannot take back the first value of an iteration that runs again.
    average = client.get_metric_history(run.info.run_id, "bbox/AP50")
    assert {metric.step for metric in average} == {1, 3, 6}
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert any("nuclei_val~detections" in name for name in pictures)
    assert any("nuclei_val~sampling" in name for name in pictures)
    assert "mlflow" in json.loads((folder / "tracking.json").read_text())
    train(folder, overwrite=True)
    assert not (folder / "tracking.json").exists(), "a new run is another one there, too"


def read_wandb(folder: Path) -> list[Any]:
    """Reads the records of all offline runs: blocks of 32 KiB with chunks of records, as LevelDB writes its logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # the record is whole
                records.append(Record.FromString(parts))
                parts = b""
    return records


def test_wandb_has_config_values_and_pictures_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    keys = ["TRACKING.WRITERS", ("wandb",), "DATASETS.TEST", ("nuclei_val",), "TEST.PICTURES", 1]
    train_twice(tmp_path, *keys)
    records = read_wandb(tmp_path)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {json.loads((tmp_path / "tracking.json").read_text())["wandb"]["run"]}
    assert runs[0].project == "dcn_d2" and runs[0].display_name == tmp_path.name
    sent = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert sent["SOLVER.MAX_ITER"] == 6
    lines = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    losses = [(line["iteration"], line["total_loss"]) for line in lines if "total_loss" in line]
    assert [iteration for iteration, _ in losses] == [0, 1, 2, 3, 4, 5], "each iteration once"
    expected = recorded(tmp_path)
    assert dict(losses[:4]) == pytest.approx({step: expected[step] for step in range(4)})
    assert [line["iteration"] for line in lines if "bbox/AP50" in line] == [6]
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    names = {
        item.nested_key[0]
        for line in history
        for item in line.item
        if item.nested_key and item.nested_key[-1] == "sha256"
    }
    assert {name.split("/")[1] for name in names} == {"detections", "sampling"}


@pytest.mark.parametrize(("writer", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_missing_package_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == writer else find(name, *rest))
    with pytest.raises(
        ValueError, match=f"TRACKING.WRITERS names {writer}, which is not installed: pip install {package}"
    ):
        Trainer(tiny_config(tmp_path, "TRACKING.WRITERS", (writer,)))
    with pytest.raises(ValueError, match="TRACKING.WRITERS"):
        Trainer(tiny_config(tmp_path, "TRACKING.WRITERS", ("excel",)))


class Service(TrackingWriter):
    """A service that can be switched off."""

    name = "service"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.on, self.values, self.status = False, [], ""  # type: ignore[var-annotated]

    def start(self, run: str | None) -> str:
        if not self.on:
            raise ConnectionError("no network")
        return run or "new"

    def log(self, iteration: int, values: dict[str, float]) -> None:
        self.values.append((iteration, values["loss"]))

    def log_picture(self, iteration: int, name: str, picture: np.ndarray) -> None:
        self.values.append((iteration, picture.shape))

    def finish(self, status: str) -> None:
        self.status = status


def test_service_that_is_away_gets_all_values_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Service(tiny_config(tmp_path))
    with EventStorage() as storage, caplog.at_level(logging.WARNING):
        for iteration in range(6):
            storage.iter = iteration
            storage.put_scalar("loss", iteration, smoothing_hint=False)
            if iteration == 4:
                writer.on, writer._next_try = True, 0.0  # the pause is over
            if iteration == 5:
                storage.put_image("picture", torch.zeros(3, 4, 5))
            writer.write()
        storage.clear_images()
        writer.write()  # nothing is new
        writer.close()
    assert writer.values == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (5, (4, 5, 3))]
    assert writer.status == "finished"
    assert caplog.text.count("service (TRACKING.WRITERS) cannot be written: ConnectionError: no network") == 1 or (
        caplog.text.count("no network") == 1
    )


def test_early_stop_is_no_failure_for_a_service(tmp_path: Path) -> None:
    writer = Service(tiny_config(tmp_path))
    writer.on = True
    with EventStorage() as storage, contextlib.suppress(StoppedEarly):
        try:
            storage.put_scalar("loss", 1.0)
            writer.write()
            raise StoppedEarly
        finally:
            writer.close()
    assert writer.status == "stopped early"


def test_service_that_stays_away_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with caplog.at_level(logging.WARNING):
        train(tmp_path, "TRACKING.WRITERS", ("mlflow",))
    assert "mlflow (TRACKING.WRITERS) cannot be written" in caplog.text
    assert (tmp_path / "model_final.pth").exists()


def test_names_of_classes_become_names_that_mlflow_takes() -> None:
    assert mlflow_name("bbox/AP-Bär & <b>: x") == "bbox/AP-B_r _ _b__ x"


@contextlib.contextmanager
def _spend_random_numbers() -> Iterator[None]:
    torch.rand(1), np.random.rand(1), random.random()
    yield


def test_pictures_change_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["DATASETS.TEST", ("nuclei_val",), "TEST.EVAL_PERIOD", 2]
    plain = train(tmp_path / "plain", *keys).model.state_dict()
    drawn = train(tmp_path / "drawn", *keys, "TEST.PICTURES", 2).model.state_dict()
    assert all(torch.equal(value, drawn[key]) for key, value in plain.items())
    without_restoring = "dcn_d2.engine.pictures.random_numbers_kept"
    monkeypatch.setattr(without_restoring, lambda: _spend_random_numbers())
    spent = train(tmp_path / "spent", *keys, "TEST.PICTURES", 2).model.state_dict()
    assert not all(torch.equal(value, spent[key]) for key, value in plain.items()), "random numbers do matter here"
    assert recorded(tmp_path / "plain", "bbox/AP50") == recorded(tmp_path / "drawn", "bbox/AP50")
    events = read_tensorboard(tmp_path / "drawn")
    names = events.Tags()["images"]
    assert sorted(name.split("/")[1] for name in names) == ["detections", "detections", "sampling", "sampling"]
    for name in names:
        assert {event.step for event in events.Images(name)} == {1, 4}, "the same images at each evaluation"
    assert not read_tensorboard(tmp_path / "plain").Tags()["images"]


def test_model_without_deformable_layers_shows_detections_alone(tmp_path: Path) -> None:
    keys = ["DATASETS.TEST", ("nuclei_val",), "TEST.PICTURES", 1, "SOLVER.MAX_ITER", 1]
    train(tmp_path, *keys, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4)
    assert [name.split("/")[1] for name in read_tensorboard(tmp_path).Tags()["images"]] == ["detections"]


def test_picture_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no paint")

    monkeypatch.setattr("dcn_d2.engine.pictures._draw_found", fail)
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, "DATASETS.TEST", ("nuclei_val",), "TEST.PICTURES", 1, "SOLVER.MAX_ITER", 1)
    assert "TEST.PICTURES: no pictures of data set nuclei_val" in caplog.text and "no paint" in caplog.text
    assert trainer.model.training

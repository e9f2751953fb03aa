# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The best model of a run, and the end of a run that no longer improves."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from dcn_d2.engine import DCNTrainer, TrainingStopped, folder
from dcn_d2.engine.best import standing
from dcn_d2.report.run import Run
from dcn_d2.report.runs import read_runs
from dcn_d2.report.sections import describe_end

from .test_stopping import At, send, signals_that_are_not_ignored  # noqa: F401  a fixture
from .test_trainer import loggers_as_before, train  # noqa: F401  a fixture
from .tiny import tiny_config

NAN, INF = math.nan, math.inf
KEYS = ["DATASETS.TEST", ("nuclei_val",), "TEST.EVAL_PERIOD", 1, "TEST.BEST_METRIC", "bbox/AP"]
KEYS += ["SOLVER.CHECKPOINT_PERIOD", 100, "SOLVER.MAX_ITER", 8]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the next evaluations give; the last of them again and again."""
    values: list[float] = []

    def test(cls: Any, cfg: Any, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        return {"bbox": {"AP": values.pop(0) if len(values) > 1 else values[0]}}

    monkeypatch.setattr(DCNTrainer, "test", classmethod(test))
    return values


def best_of(path: Path) -> tuple[int, float]:
    checkpoint = torch.load(path / "model_best.pth")
    assert checkpoint["iteration"] == checkpoint["best"]["iteration"]
    return checkpoint["iteration"], checkpoint["best"]["value"]


def log_of(path: Path) -> str:
    return (path / "log.txt").read_text()


@pytest.mark.parametrize(
    "values, mode, delta, expected",
    [
        ([], "max", 0.0, (None, -1, 0)),
        ([1.0, 3.0, 2.0], "max", 0.0, (3.0, 1, 1)),
        ([1.0, 3.0, 2.0], "min", 0.0, (1.0, 0, 2)),
        ([1.0, 1.0, 1.0], "max", 0.0, (1.0, 0, 2)),
        ([NAN, 1.0, NAN, INF, -INF], "max", 0.0, (1.0, 1, 3)),
        ([NAN, NAN], "min", 0.0, (None, -1, 2)),
        ([1.0, 1.4, 1.8, 2.2], "max", 0.5, (2.2, 3, 1)),  # 1.8 is the first that is better than 1 by more than 0.5
        ([1.0, 0.6, 0.2], "min", 0.5, (0.2, 2, 0)),
        ([1.0, 1.5], "max", 0.5, (1.5, 1, 1)),  # not more than
        ([-5.0, -4.0], "max", 0.0, (-4.0, 1, 0)),
    ],
)
def test_standing_after_evaluations(values: list[float], mode: str, delta: float, expected: Any) -> None:
    assert standing(list(enumerate(values)), mode, delta) == expected


def test_best_model_is_kept_beside_the_checkpoints(scores: list[float], tmp_path: Path) -> None:
    scores += [1, NAN, 3, 2, 2.5]
    trainer = train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 5)
    assert best_of(tmp_path) == (2, 3.0)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    saved = torch.load(tmp_path / "model_best.pth")
    assert saved["model"].keys() == trainer.checkpointer.model.state_dict().keys() and "trainer" not in saved
    assert "bbox/AP nan counts as no improvement: model_best.pth stays as it is, 1 at iteration 0" in log_of(tmp_path)
    trainer.cfg.MODEL.WEIGHTS = str(tmp_path / "model_best.pth")
    trainer.checkpointer.load_trained(trainer.cfg.MODEL.WEIGHTS)
    assert all(torch.equal(value, saved["model"][name]) for name, value in trainer.model.state_dict().items())


def stop_after(path: Path, iteration: int, *keys: Any) -> None:
    trainer = DCNTrainer(tiny_config(path, *KEYS, *keys))
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([At(iteration, send(signal.SIGTERM))])
    with pytest.raises(TrainingStopped):
        trainer.train()


def test_resumed_run_had_forgotten_what_was_best(scores: list[float], tmp_path: Path) -> None:
    scores += [1, 5, 2, 4]
    stop_after(tmp_path, 3)  # before the evaluation of iteration 3
    assert best_of(tmp_path) == (1, 5.0) and len(scores) == 1
    train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 6, resume=True)
    assert best_of(tmp_path) == (1, 5.0), "4 was the first value of the resumed run"
    assert "model_best.pth is of iteration 1, with bbox/AP 5" in log_of(tmp_path)
    record = json.loads((tmp_path / folder.BEST_RECORD).read_text())
    assert record["evaluations"] == [[0, 1.0], [1, 5.0], [2, 2.0], [4, 4.0], [5, 4.0]]


@pytest.mark.parametrize("damage", ["no record", "record cut", "best model cut", "record older"])
def test_best_model_or_its_record_alone_is_enough(damage: str, scores: list[float], tmp_path: Path) -> None:
    scores += [1, 5, 4]
    stop_after(tmp_path, 3)
    record, best = tmp_path / folder.BEST_RECORD, tmp_path / "model_best.pth"
    if damage == "no record":
        record.unlink()
    elif damage == "record cut":
        record.write_text('{"metric": "bbox')
    elif damage == "record older":  # killed after the best model was written, and before the record
        record.write_text('{"metric": "bbox/AP", "mode": "max", "evaluations": [[0, 1.0]]}')
    else:
        best.write_bytes(best.read_bytes()[:1000])
    train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 6, resume=True)
    assert best_of(tmp_path) == ((4, 4.0) if damage == "best model cut" else (1, 5.0))
    assert dict(json.loads(record.read_text())["evaluations"])[5] == 4.0


def test_best_model_was_taken_for_the_newest_checkpoint(scores: list[float], tmp_path: Path) -> None:
    scores += [1, 2, 3, 4]
    trainer = DCNTrainer(tiny_config(tmp_path, *KEYS, "SOLVER.CHECKPOINT_PERIOD", 2))
    trainer.resume_or_load(resume=False)

    def crash() -> None:
        raise ZeroDivisionError

    trainer.register_hooks([At(3, crash)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert best_of(tmp_path) == (2, 3.0) and trainer.checkpointer.get_checkpoint_file().endswith("model_0000001.pth")
    (tmp_path / "last_checkpoint").unlink()
    again = DCNTrainer(tiny_config(tmp_path, *KEYS))
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    scores[:] = [2.5, 3.5]
    again.train()  # its evaluations come again, and the best model that was seen before stays until one is better
    assert best_of(tmp_path) == (3, 3.5)


def test_overwriting_removes_the_best_model_and_keeps_it_if_it_is_needed(scores: list[float], tmp_path: Path) -> None:
    scores += [1]
    train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 1)
    best = tmp_path / "model_best.pth"
    with pytest.raises(FileExistsError, match="would remove .*model_best.pth"):
        train(tmp_path, "MODEL.WEIGHTS", str(best), overwrite=True)
    train(tmp_path, "SOLVER.MAX_ITER", 1, overwrite=True)
    assert not best.exists() and not (tmp_path / folder.BEST_RECORD).exists()
    shutil.copy(tmp_path / "model_final.pth", best)
    for name in ("model_final.pth", "metrics.json", "last_checkpoint"):
        (tmp_path / name).unlink()
    with pytest.raises(FileExistsError, match="holds an earlier run .model_best.pth"):
        train(tmp_path)


@pytest.mark.parametrize("metrics", [True, False])
def test_run_that_was_killed_before_its_first_checkpoint_keeps_its_best_model(
    metrics: bool, scores: list[float], tmp_path: Path
) -> None:
    scores += [2]
    train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 1)
    for name in ("model_final.pth", "last_checkpoint", *([] if metrics else ["metrics.json"])):
        (tmp_path / name).unlink()
    (tmp_path / "metrics.json").write_text("") if metrics else None
    scores[:] = [1]
    trainer = train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 2, resume=True)
    assert trainer.start_iter == 0 and best_of(tmp_path) == (0, 2.0)
    assert "holds model_best.pth of a run that ended before its first checkpoint" in log_of(tmp_path)


def test_another_metric_begins_anew(scores: list[float], tmp_path: Path) -> None:
    scores += [5]
    train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 1)
    train(tmp_path, *KEYS, "SOLVER.MAX_ITER", 2, "TEST.BEST_MODE", "min", resume=True)
    assert best_of(tmp_path) == (1, 5.0)
    assert "is about bbox/AP (max), TEST.BEST_METRIC is now bbox/AP (min)" in log_of(tmp_path)


def test_run_without_improvement_ends_as_a_whole_one(scores: list[float], tmp_path: Path) -> None:
    scores += [1, 3, 2, 2.5, 9]
    trainer = DCNTrainer(tiny_config(tmp_path, *KEYS, "TEST.PATIENCE", 2))
    trainer.resume_or_load(resume=False)
    assert trainer.train() == {"bbox": {"AP": 2.5}}
    assert scores == [9], "what has led to the stop is not evaluated again"
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 3 and best_of(tmp_path) == (1, 3.0)
    assert trainer.stopped_early and not trainer.failed
    log = log_of(tmp_path)
    assert log.count("training stops early at iteration 3") == 1 and "Traceback" not in log
    assert "the best was 3 at iteration 1" in log
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert max(entry["iteration"] for entry in metrics) == 3


def test_no_evaluation_is_missing_in_the_metrics(scores: list[float], tmp_path: Path) -> None:
    scores += [1, 3, 2, 5, 4, 6]
    train(tmp_path, *KEYS, "TEST.EVAL_PERIOD", 2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    # The evaluation after the last iteration is of the next one.
    assert {line["iteration"]: line["bbox/AP"] for line in lines if "bbox/AP" in line} == {1: 1, 3: 3, 5: 2, 8: 5}


def test_early_stop_is_no_failure_for_the_report(scores: list[float], tmp_path: Path) -> None:
    scores += [1, 3, 2, 2.5, 9]
    train(tmp_path, *KEYS, "TEST.PATIENCE", 2)
    train(tmp_path, *KEYS, "TEST.PATIENCE", 2, resume=True)
    assert [(run["status"], run["end"]) for run in read_runs(tmp_path)] == [("stopped early", 4)] * 2
    most = tiny_config(tmp_path, *KEYS).SOLVER.MAX_ITER
    assert f"Stopped early after 4 of {most} iterations" in describe_end(Run(tmp_path))


def test_resuming_a_run_that_stopped_early_says_so(scores: list[float], tmp_path: Path) -> None:
    scores += [3, 2, 2]
    train(tmp_path, *KEYS, "TEST.PATIENCE", 2)
    again = train(tmp_path, *KEYS, "TEST.PATIENCE", 2, resume=True)
    assert again.start_iter == again.max_iter == 3
    assert "stopped early at iteration 2: bbox/AP had not improved for 2 evaluation(s)" in log_of(tmp_path)
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 2
    train(tmp_path, *KEYS, "TEST.PATIENCE", 4, resume=True)  # 2 more are allowed
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 4
    train(tmp_path, *KEYS, "TEST.PATIENCE", 0, resume=True)
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 7


def test_evaluations_are_counted_across_resumes(scores: list[float], tmp_path: Path) -> None:
    scores += [3, 2, 2]
    stop_after(tmp_path, 2, "TEST.PATIENCE", 3)
    train(tmp_path, *KEYS, "TEST.PATIENCE", 3, resume=True)
    # Iteration 2 was not evaluated; 1, 3 and 4 were no better than 0.
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 4


def test_metric_that_the_evaluation_does_not_give_is_an_error_that_lists_those_it_gives(
    scores: list[float], tmp_path: Path
) -> None:
    scores += [1]
    keys = [*KEYS, "TEST.BEST_METRIC", "bbox/APx"]
    with pytest.raises(
        ValueError, match="TEST.BEST_METRIC is 'bbox/APx', which the evaluation did not give; .*bbox/AP"
    ):
        Own(tiny_config(tmp_path, *keys)).train()


class Own(DCNTrainer):
    """Its evaluation might give anything."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> Any:
        return None


TWO = ["DATASETS.TEST", ("nuclei_val", "nuclei_train")]


@pytest.mark.parametrize(
    "keys, message",
    [
        (["TEST.BEST_METRIC", "bbox/AP51"], r"BEST_METRIC is 'bbox/AP51', but the evaluation gives bbox/AP, bbox/AP50"),
        (["TEST.BEST_METRIC", "segm/AP"], "BEST_METRIC is 'segm/AP', but the evaluation gives bbox/AP"),
        ([*TWO, "TEST.BEST_METRIC", "bbox/AP"], "gives nuclei_val/bbox/AP, .*, nuclei_train/bbox/AP"),
        (["TEST.BEST_METRIC", "validation_loss"], "needs TEST.LOSS True"),
        (["DATASETS.TEST", (), "TEST.BEST_METRIC", "bbox/AP"], "DATASETS.TEST is empty: nothing would be evaluated"),
        (["DATASETS.TEST", (), "TEST.LOSS", True], "DATASETS.TEST is empty: there is nothing to compute a loss of"),
        (["TEST.PATIENCE", 2], 'TEST.PATIENCE is 2, but TEST.BEST_METRIC is ""'),
        (
            ["TEST.PATIENCE", 2, "TEST.BEST_METRIC", "bbox/AP", "TEST.EVAL_PERIOD", 0],
            "there is only the evaluation after the last iteration",
        ),
        (["SOLVER.EMA.ENABLED", True, "TEST.PRECISE_BN.ENABLED", True], "switch one of them off"),
        (["TEST.BEST_METRIC", "bbox//AP"], "must be .* the name of a metric"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_before_anything_is_built(
    keys: list, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        DCNTrainer.check(tiny_config(tmp_path, *KEYS[:2], *keys))


@pytest.mark.parametrize(
    "keys",
    [
        ["TEST.BEST_METRIC", "bbox/AP-nucleus"],  # classes are known later
        [*TWO, "TEST.BEST_METRIC", "nuclei_train/bbox/APs"],
        ["TEST.LOSS", True, "TEST.BEST_METRIC", "validation_loss/loss_cls"],
        [*TWO, "TEST.LOSS", True, "TEST.BEST_METRIC", "nuclei_val/validation_loss"],
    ],
)
def test_metrics_that_may_come_are_accepted(keys: list, tmp_path: Path) -> None:
    DCNTrainer.check(tiny_config(tmp_path, *KEYS[:2], *keys))


def test_test_set_without_annotations_has_no_loss(tmp_path: Path) -> None:
    DatasetCatalog.register("bare", lambda: [dict(e, annotations=[]) for e in DatasetCatalog.get("nuclei_val")])
    MetadataCatalog.get("bare").set(thing_classes=["nucleus"], evaluator_type="coco")
    try:
        cfg = tiny_config(tmp_path, "DATASETS.TEST", ("bare",), "TEST.LOSS", True)
        with pytest.raises(ValueError, match="TEST.LOSS is True, but data set bare .* has no annotations"):
            Own.check_data(cfg)
    finally:
        DatasetCatalog.remove("bare")
        MetadataCatalog.remove("bare")

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The best model of a run, TEST.BEST_METRIC, and the end of a run that no longer improves, TEST.PATIENCE."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import hooks
from detectron2.utils import comm

from ..checkpoint.reader import peek
from ..files import is_local, write_atomically
from .folder import BEST, BEST_RECORD
from .validation import NAME as LOSS

logger = logging.getLogger(__name__)

OF_BOXES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
OF_KEYPOINTS = ("AP", "AP50", "AP75", "APm", "APl")


def mode_of(cfg: CfgNode) -> str:
    """Gives "min" if a smaller value of TEST.BEST_METRIC is better, else "max"."""
    if cfg.TEST.BEST_MODE != "auto":
        return cfg.TEST.BEST_MODE
    return "min" if "loss" in cfg.TEST.BEST_METRIC else "max"


def check_best_metric(cfg: CfgNode, evaluates: bool) -> None:
    """Refuses keys of the best model that contradict others, and a metric that the evaluation is known not to give.

    Args:
        cfg: of the run.
        evaluates: whether it evaluates as `DCNTrainer` does. A class of one's own may give any metrics.
    """
    metric, test = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if not metric:
        if cfg.TEST.PATIENCE:
            raise ValueError(
                f'TEST.PATIENCE is {cfg.TEST.PATIENCE}, but TEST.BEST_METRIC is "": name the metric that has to '
                'improve, for example "bbox/AP"'
            )
        return
    if not test:
        raise ValueError(f"TEST.BEST_METRIC is {metric!r}, but DATASETS.TEST is empty: nothing would be evaluated")
    if cfg.TEST.PATIENCE and not 0 < cfg.TEST.EVAL_PERIOD < cfg.SOLVER.MAX_ITER:
        raise ValueError(
            f"TEST.PATIENCE is {cfg.TEST.PATIENCE}, but TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD} and SOLVER.MAX_ITER "
            f"{cfg.SOLVER.MAX_ITER}: there is only the evaluation after the last iteration, when it is too late to stop"
        )
    if LOSS in metric.split("/") and not cfg.TEST.LOSS:
        raise ValueError(f"TEST.BEST_METRIC is {metric!r}, which needs TEST.LOSS True")
    known = known_metrics(cfg) if evaluates else None
    # What classes there are, and so their APs, and what parts the loss has, is known only after an evaluation.
    shape = [part for part in metric.split("/") if part]
    late = any(part.startswith("AP-") for part in shape) or LOSS in shape[:-1]
    if known is not None and not late and metric not in known:
        raise ValueError(f"TEST.BEST_METRIC is {metric!r}, but the evaluation gives {', '.join(known)}")


def known_metrics(cfg: CfgNode) -> list[str] | None:
    """Gives the metrics of an evaluation as COCO's, without those of single classes; None for other evaluations."""
    if any(MetadataCatalog.get(name).get("evaluator_type", None) not in (None, "coco") for name in cfg.DATASETS.TEST):
        return None
    found = [f"bbox/{name}" for name in OF_BOXES]
    found += [f"segm/{name}" for name in OF_BOXES if cfg.MODEL.MASK_ON]
    found += [f"keypoints/{name}" for name in OF_KEYPOINTS if cfg.MODEL.KEYPOINT_ON]
    found += [LOSS] if cfg.TEST.LOSS else []
    if len(cfg.DATASETS.TEST) == 1:
        return found
    return [f"{name}/{metric}" for name in cfg.DATASETS.TEST for metric in found]


class Standing(NamedTuple):
    """How a run stands after its evaluations."""

    best: float | None  # the best value; None before the first that is a number
    best_iteration: int
    waiting: int  # evaluations in a row that did not improve by more than TEST.MIN_DELTA


def standing(evaluations: list[tuple[int, float]], mode: str, min_delta: float = 0.0) -> Standing:
    """Computes how a run stands.

    Args:
        evaluations: iteration and value of each. NaN and infinity never improve anything.
        mode: "max" or "min".
        min_delta: a value counts as an improvement, for `waiting`, if it is better by more than this.
    """
    sign = 1 if mode == "max" else -1
    best, best_iteration, waiting = None, -1, 0
    reference = -math.inf
    for iteration, value in evaluations:
        finite = math.isfinite(value)
        if finite and (best is None or sign * (value - best) > 0):
            best, best_iteration = value, iteration
        improved = finite and sign * value > reference + (min_delta if math.isfinite(reference) else 0)
        waiting = 0 if improved else waiting + 1
        reference = sign * value if improved else reference
    return Standing(best, best_iteration, waiting)


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, which also remembers across resumes, and ends a run that no longer improves.

    model_best.pth holds the model (with SOLVER.EMA the average, which was evaluated), its iteration, and the value of
    the metric. It is written in one step, before the evaluation is noted in best_metric.json: a kill between them
    leaves a model whose value is known from its own file. A resumed run reads both, and so does not replace the best
    model by a worse one.

    It must come after the hook that evaluates, in all processes of a job.
    """

    trainer: Any

    def __init__(self, cfg: CfgNode, checkpointer: Any) -> None:
        super().__init__(cfg.TEST.EVAL_PERIOD, checkpointer, cfg.TEST.BEST_METRIC, mode_of(cfg), BEST)
        self._mode, self._min_delta, self._patience = mode_of(cfg), cfg.TEST.MIN_DELTA, cfg.TEST.PATIENCE
        self._folder = cfg.OUTPUT_DIR
        self._evaluations: dict[int, float] = {}

    def resume(self, start_iter: int) -> bool:
        """Reads what an earlier run in the folder has left; all processes call it.

        Args:
            start_iter: the first iteration of this run. Evaluations after it will come again.

        Returns:
            Whether that run had stopped early, and this one has the same patience.
        """
        if comm.is_main_process() and is_local(self._folder):
            self._evaluations = {i: value for i, value in self._read_record() if i < start_iter}
            self._read_best(start_iter)
        elif comm.is_main_process():
            logger.warning(
                f"OUTPUT_DIR {self._folder} is not a folder of this machine: a run that is resumed there does not know "
                "which model was the best, and how many evaluations TEST.PATIENCE has counted"
            )
        stopped = start_iter > 0 and self._is_over()
        if stopped and comm.is_main_process():
            logger.warning(
                f"the run in OUTPUT_DIR {self._folder} stopped early at iteration {start_iter - 1}: {self._val_metric} "
                f"had not improved for {self._waiting()} evaluation(s). Nothing is left to train; a larger "
                "TEST.PATIENCE, or 0, goes on with it"
            )
        return stopped

    def after_train(self) -> None:
        if not (self.trainer.failed or self.trainer.stopped_early):  # as `EvalHook`
            super().after_train()

    def _waiting(self) -> int:
        return standing(sorted(self._evaluations.items()), self._mode, self._min_delta).waiting

    def _is_over(self) -> bool:
        """Whether to stop; the main process decides for all."""
        return comm.all_gather(bool(self._patience) and self._waiting() >= self._patience)[0]

    def _read_record(self) -> list[tuple[int, float]]:
        path = Path(self._folder, BEST_RECORD)
        if not path.is_file():
            return []
        try:
            record = json.loads(path.read_text())
            evaluations = [(int(iteration), float(value)) for iteration, value in record["evaluations"]]
            about = (record["metric"], record["mode"])
        except (ValueError, TypeError, KeyError) as error:
            logger.warning(f"{path} cannot be read ({error}): its evaluations are not counted for TEST.PATIENCE")
            return []
        if about != (self._val_metric, self._mode):
            logger.warning(
                f"{path} is about {record['metric']} ({record['mode']}), TEST.BEST_METRIC is now {self._val_metric} "
                f"({self._mode}): the best model is chosen anew, from the next evaluation on"
            )
            return []
        return evaluations

    def _read_best(self, start_iter: int) -> None:
        """Takes over the value of model_best.pth, which may have been written right before a kill."""
        path = Path(self._folder, f"{BEST}.pth")
        try:
            best = peek(path).get("best") if path.is_file() else None
        except ValueError as error:
            logger.warning(f"{error}: the next evaluation replaces it")
            return
        if not isinstance(best, dict) or (best.get("metric"), best.get("mode")) != (self._val_metric, self._mode):
            return
        self._update_best(best["value"], best["iteration"])
        if best["iteration"] < start_iter:
            self._evaluations.setdefault(best["iteration"], best["value"])
        logger.info(
            f"{path} is of iteration {best['iteration']}, with {self._val_metric} {best['value']:.5g}: it stays until "
            "an evaluation is better"
        )

    def _best_checking(self) -> None:
        """Looks at the evaluation that was just made."""
        last = self.trainer.iter >= self.trainer.max_iter
        if comm.is_main_process():
            self._judge(min(self.trainer.iter, self.trainer.max_iter - 1))
        if self._is_over() and not last:
            if comm.is_main_process():
                logger.warning(
                    f"training stops early at iteration {self.trainer.iter}: {self._val_metric} has not improved by "
                    f"more than {self._min_delta:g} for {self._waiting()} evaluation(s) (TEST.PATIENCE); the best was "
                    f"{self._best()}"
                )
            self.trainer.stop_early()

    def _best(self) -> str:
        return "never a number" if self.best_metric is None else f"{self.best_metric:.5g} at iteration {self.best_iter}"

    def _judge(self, iteration: int) -> None:
        latest = self.trainer.storage.latest()
        evaluated_at = max(self.trainer.iter, 0)
        value, noted_at = latest.get(self._val_metric, (math.nan, -1))
        if noted_at != evaluated_at:
            there = sorted(name for name, (_, number) in latest.items() if number == evaluated_at and "/" in name)
            there += [LOSS] if LOSS in latest else []
            raise ValueError(
                f"TEST.BEST_METRIC is {self._val_metric!r}, which the evaluation did not give; it gave "
                f"{', '.join(there) or 'nothing'}"
            )
        value = float(value)
        better = math.isfinite(value) and (self.best_metric is None or self._compare(value, self.best_metric))
        if better:
            best = {"metric": self._val_metric, "mode": self._mode, "value": value, "iteration": iteration}
            self._checkpointer.save_model(BEST, iteration=iteration, best=best)
            logger.info(f"{BEST}.pth is now of iteration {iteration}: {self._val_metric} {value:.5g}, {self._before()}")
            self._update_best(value, iteration)
        else:
            what = "is not better" if math.isfinite(value) else "counts as no improvement"
            logger.info(f"{self._val_metric} {value:.5g} {what}: {BEST}.pth stays as it is, {self._best()}")
        self._evaluations[iteration] = value
        self._write_record()

    def _before(self) -> str:
        return f"before it was {self._best()}" if self.best_metric is not None else "the first"

    def _write_record(self) -> None:
        if not is_local(self._folder):
            return
        record = {"metric": self._val_metric, "mode": self._mode, "evaluations": sorted(self._evaluations.items())}
        with write_atomically(Path(self._folder, BEST_RECORD)) as file:
            file.write(json.dumps(record).encode())

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The trainer, and what a process of a training job sets up first."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, default_setup, hooks
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import DCNCheckpointer
from ..config import add_dcn_keys, check_config, load_config, with_dcn_keys
from ..data.checks import advise_on_data, check_data
from ..data.mapper import DCNDatasetMapper
from . import checks, folder
from .logs import log_to
from .machine import fit_to_machine, scale_learning_rate
from .optimizer import apply_rates, fit_saved_state, hyperparameters, split_offset_branches
from .processes import check_single_start
from .stopping import StopRequest, TrainingStopped

logger = logging.getLogger(__name__)


def setup(args: Namespace) -> CfgNode:
    """Reads the config that the command line names, fits it to this machine, and sets up loggers and seeds.

    For training, the main process takes OUTPUT_DIR for this job. An evaluation leaves the config.yaml of the run in
    OUTPUT_DIR as it is.
    """
    cfg = load_config(args.config_file, args.opts)
    evaluates = getattr(args, "eval_only", False)
    if comm.is_main_process() and not evaluates:
        folder.lock_folder(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dcn_d2")
    fit_to_machine(cfg, processes=comm.get_local_size())
    scale_learning_rate(cfg)
    cfg.freeze()
    saved = Path(cfg.OUTPUT_DIR) / "config.yaml"
    kept = saved.read_bytes() if evaluates and comm.is_main_process() and saved.is_file() else None
    default_setup(cfg, args)
    if kept is not None:
        saved.write_bytes(kept)
    return cfg


class DCNTrainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer` with `DCNCheckpointer` and COCO evaluation; several processes work on CPU too.

    Config, data sets and OUTPUT_DIR are checked before anything is built. The config is fitted to this machine and to
    its batch size (`fit_to_machine`, `scale_learning_rate`), without a change of the caller's; `trainer.cfg` is what
    runs, and is saved as OUTPUT_DIR/config.yaml. While it trains, OUTPUT_DIR is locked for other runs; SIGTERM and
    Ctrl-C end training with a checkpoint and `TrainingStopped`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer's, whose create_ddp_model call names a GPU and whose checkpointer is fixed.
        TrainerBase.__init__(self)
        if comm.get_world_size() == 1:
            check_single_start()
        if comm.is_main_process():
            folder.check_writable(cfg.OUTPUT_DIR)
            folder.check_unlocked(cfg.OUTPUT_DIR)
        log_to(cfg.OUTPUT_DIR)
        cfg = self._fit_config(cfg)
        self.check(cfg)
        self.check_data(cfg)
        self.stop = StopRequest()
        self._resumed = self._overwrite = self._may_start = False
        self._failed = False
        self._phase = ""
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        device = next(model.parameters()).device
        logger.info(f"training on {device}, in {comm.get_world_size()} process(es)")
        on_cpu = device.type == "cpu"
        model = create_ddp_model(model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {}))
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DCNCheckpointer(model, cfg.OUTPUT_DIR, fine_tune=True, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def check(cls, cfg: CfgNode, train: bool = True) -> None:
        """Refuses keys and an OUTPUT_DIR that are sure to fail later, in the middle of a run or after it.

        Args:
            cfg: of the run.
            train: whether it trains, or only evaluates.

        Raises:
            ValueError, OSError: The message names the key or folder.
        """
        check_config(cfg)
        if train:
            checks.check_batch_size(cfg)
            if not cfg.DATASETS.TRAIN and cls._is_ours("build_train_loader"):
                raise ValueError("DATASETS.TRAIN is empty: nothing to train on (is --config-file missing?)")
            folder.check_writable(cfg.OUTPUT_DIR)
        elif not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: nothing to evaluate (is --config-file missing?)")
        checks.check_expected_results(cfg)
        if cls._is_ours("test"):
            checks.check_no_augmentation(cfg)

    @classmethod
    def check_data(cls, cfg: CfgNode, train: bool = True) -> None:
        """As `check`, for the data sets; of those that a subclass loads or measures in its own way it only warns."""
        evaluates = cls._is_ours("build_evaluator")
        if evaluates:
            checks.check_evaluators(cfg.DATASETS.TEST)
            checks.check_keypoint_sigmas(cfg)
        trains = train and cls._is_ours("build_train_loader")
        check_data(cfg, train=trains, test=cls._is_ours("build_test_loader"), coco_evaluation=evaluates)
        methods = ("build_train_loader", "build_test_loader", "build_evaluator")
        advise_on_data(cfg, train, [name for name in methods if not cls._is_ours(name)])

    @classmethod
    def _is_ours(cls, name: str) -> bool:
        """Whether a method is that of this class, and not of a subclass."""
        ours, theirs = (getattr(owner, name) for owner in (DCNTrainer, cls))
        return getattr(theirs, "__func__", theirs) is getattr(ours, "__func__", ours)

    @classmethod
    def _fit_config(cls, cfg: CfgNode) -> CfgNode:
        """A copy of `cfg` for this machine, number of processes and batch size; applied twice it changes nothing."""
        frozen, cfg = cfg.is_frozen(), cfg.clone()
        cfg.defrost()
        add_dcn_keys(cfg)
        fit_to_machine(cfg, processes=comm.get_local_size())
        scale_learning_rate(cfg)
        cfg = cls.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SOLVER.REFERENCE_IMS_PER_BATCH > 0:  # auto_scale_workers scales rate and batch together
            cfg.SOLVER.REFERENCE_IMS_PER_BATCH = cfg.SOLVER.IMS_PER_BATCH
        if frozen:
            cfg.freeze()
        return cfg

    def resume_or_load(self, resume: bool = True, *, overwrite: bool = False) -> None:
        """Loads the last checkpoint of OUTPUT_DIR if `resume` asks for it and there is one, else MODEL.WEIGHTS.

        Args:
            resume: go on with the run in OUTPUT_DIR.
            overwrite: start a new run in a folder that has one; its checkpoints and metrics are removed when training
                starts.

        Raises:
            FileExistsError: A new run was asked for where there is one already, or none of its checkpoints can be
                resumed.
        """
        if comm.is_main_process() and not resume and not overwrite:
            folder.check_free(self.cfg.OUTPUT_DIR)
        if comm.is_main_process() and not resume and overwrite:
            folder.check_keeps(self.cfg.OUTPUT_DIR, self.cfg.MODEL.WEIGHTS)
        self._resumed = False  # load_state_dict notes that there was something to resume
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.start_iter = self.iter + 1 if self._resumed else 0
        checks.check_same_iteration(self.start_iter)
        found = folder.describe_earlier_run(self.cfg.OUTPUT_DIR) if comm.is_main_process() else ""
        if resume and not self._resumed and "checkpoint" in found:
            raise FileExistsError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} holds {found}, but none that training could go on from, and "
                "starting afresh would overwrite them"
            )
        if resume and not found and not self._resumed:
            folder.check_config_is_ours(self.cfg.OUTPUT_DIR)
        self._overwrite = overwrite and not resume
        self._may_start = True

    def train(self) -> Any:
        """Trains; returns the results of the last evaluation in the main process, and None in others.

        Raises:
            TrainingStopped: A signal asked for it; a checkpoint was written.
        """
        main, where = comm.is_main_process(), self.cfg.OUTPUT_DIR
        if main:
            folder.lock_folder(where)
        # Only while training: a model with hooks cannot be pickled.
        marks = [
            self.model.register_forward_pre_hook(lambda *_: setattr(self, "_phase", "model")),
            self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "_phase", "optimizer")),
        ]
        try:
            if main:
                self._prepare_folder()
            with self.stop:
                super().train()
        except _Ended as ended:
            raise ended.error from None
        finally:
            for mark in marks:
                mark.remove()
            self._may_start = self._overwrite = False  # a second call would overwrite what this one has written
            if main:
                folder.unlock_folder(where)
        return getattr(self, "_last_eval_results", None) if main else None

    def _prepare_folder(self) -> None:
        """Makes OUTPUT_DIR ready for this run: nothing in it is of another one, or of iterations that come again."""
        where = self.cfg.OUTPUT_DIR
        if self._overwrite:
            folder.remove_earlier_run(where)
        elif not self._may_start:
            folder.check_free(where)
        folder.cut_metrics(where, self.start_iter)
        if where:
            with PathManager.open(os.path.join(where, "config.yaml"), "w") as file:
                file.write(self.cfg.dump())
        left = max(0, self.max_iter - self.start_iter)
        count = left // self.cfg.SOLVER.CHECKPOINT_PERIOD + bool(left)
        folder.warn_of_little_space(where, self.model, self.optimizer, count)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, with one that stops training on a signal: after checkpoints, before evaluation."""
        found = super().build_hooks()
        place = next(index for index, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
        evaluate = found[place]._func
        found[place : place + 1] = [_StopHook(), _EvalHook(self.cfg.TEST.EVAL_PERIOD, evaluate)]
        return found

    def run_step(self) -> None:
        """One iteration."""
        self._phase = "data"
        try:
            super().run_step()
        except (RuntimeError, *checks.MISTAKES) as error:
            # Where a signal has also ended a process that loads data, or another one of the job, this one could not
            # ask whether to stop. If nothing has changed the weights yet, they are those of the last iteration.
            if self.stop.signal and self._phase != "optimizer":
                self.iter -= 1
                self.save_and_stop()
            if self._phase == "data" and isinstance(error, checks.MISTAKES):
                raise _Ended(error) from error
            raise

    def after_step(self) -> None:
        """Calls the hooks; a disk that is full, say, needs no traceback in the log."""
        try:
            super().after_step()
        except OSError as error:
            raise _Ended(error) from error
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # how torch.save tells that there was no room
                raise _Ended(error.__context__) from error
            raise

    def after_train(self) -> None:
        """Calls the hooks; an error of theirs does not take the place of the one that ended training."""
        reason = sys.exc_info()[1]
        self._failed = reason is not None
        try:
            super().after_train()
        except OSError as error:
            if reason is None:
                raise _Ended(error) from error
            logger.error(f"after training: {error}")

    def save_and_stop(self) -> None:
        """Writes a checkpoint of the iteration that was finished last, unless there is one, and ends training."""
        if comm.is_main_process():
            saved = (self.iter + 1) % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or self.iter >= self.max_iter - 1
            if self.iter >= self.start_iter and not saved:
                try:
                    self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
                except OSError as error:
                    raise _Ended(error) from error
            logger.warning(f"stopped at iteration {self.iter}, go on with --resume" if self.iter >= 0 else "stopped")
        raise TrainingStopped(self.stop.signal)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of an earlier run, but learns at the rates of this run's config."""
        if state_dict["iteration"] >= self.max_iter:
            raise ValueError(
                f"the checkpoint is of iteration {state_dict['iteration']}, but SOLVER.MAX_ITER is {self.max_iter}: "
                "raise it, or leave out --resume and name the checkpoint in MODEL.WEIGHTS"
            )
        configured = hyperparameters(self.optimizer)
        inner = dict(state_dict["_trainer"])
        inner["optimizer"] = fit_saved_state(inner["optimizer"], self.optimizer, self._groups_of_detectron2)
        scheduler = {key: dict(value) for key, value in state_dict.get("hooks", {}).items()}
        if "base_lrs" in scheduler.get("LRScheduler", {}):
            scheduler["LRScheduler"]["base_lrs"] = [group["initial_lr"] for group in configured]
        super().load_state_dict({**state_dict, "hooks": scheduler, "_trainer": inner})
        apply_rates(self.optimizer, self.scheduler, configured, self.iter + 1)
        self._resumed = True

    def _groups_of_detectron2(self) -> list[list[nn.Parameter]]:
        model = self.checkpointer.model
        return [group["params"] for group in DefaultTrainer.build_optimizer(self.cfg, model).param_groups]

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds Detectron2's optimizer, with SOLVER.OFFSET_LR_FACTOR for convolutions that predict offsets."""
        optimizer = super().build_optimizer(cfg, model)
        split_offset_branches(optimizer, model, with_dcn_keys(cfg).SOLVER.OFFSET_LR_FACTOR)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Builds Detectron2's loader, resizing images with what INPUT.RESIZE_WITH names."""
        mapper = DCNDatasetMapper(cfg, is_train=True)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """As `build_train_loader`, for evaluation."""
        mapper = DCNDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates a model, as `DefaultTrainer.test` does."""
        checks.check_no_augmentation(cfg)
        if evaluators is None and cfg.DATASETS.TEST:
            cls.check_data(cfg, train=False)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Evaluates all that the model predicts as COCO does; the results go to inference/<data set>."""
        checks.check_evaluators([dataset_name])
        tasks = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
        return COCOEvaluator(
            dataset_name,
            tasks=[task for task, predicted in tasks.items() if predicted],
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            output_dir=str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name),
        )


class _Ended(BaseException):
    """Carries an error that needs no traceback past Detectron2's loop, which logs one for each `Exception`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _StopHook(HookBase):
    """Ends training after an iteration in which a signal asked for it, in all processes after the same one."""

    trainer: Any

    def after_step(self) -> None:
        if self.trainer.stop.agreed():
            try:
                self.trainer.save_and_stop()
            finally:
                comm.synchronize()  # no process leaves before the checkpoint is whole


class _EvalHook(hooks.EvalHook):
    """Detectron2's, which a signal ends at once: COCO's takes longer than the schedulers of clusters wait."""

    trainer: Any

    def _do_eval(self) -> None:
        stop = self.trainer.stop
        stop.raising = True
        try:
            if stop.signal:
                raise TrainingStopped(stop.signal)
            super()._do_eval()
            if stop.signal and comm.get_world_size() == 1:  # some code takes any exception for its own
                raise TrainingStopped(stop.signal)
        except (TrainingStopped, Exception):
            if not stop.signal:
                raise
            self._save_and_stop()  # also where another process of the job has left, and this one could not gather
        finally:
            stop.raising = False

    def _save_and_stop(self) -> None:
        self.trainer.stop.raising = False
        self.trainer.iter = min(self.trainer.iter, self.trainer.max_iter - 1)  # after training it is one more
        self.trainer.save_and_stop()

    def after_train(self) -> None:
        if self.trainer._failed:  # Detectron2 would evaluate if that happened in the last iteration
            self._eval_after_train = False
        super().after_train()

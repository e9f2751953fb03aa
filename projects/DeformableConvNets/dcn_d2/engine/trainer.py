# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The trainer."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import DCNCheckpointer
from ..config import add_dcn_keys, check_config, with_dcn_keys
from ..data.checks import advise_on_data, check_data, check_data_sets
from ..data.mapper import DCNDatasetMapper
from ..data.own import register_own_data
from ..evaluation import (
    Results,
    add_augmented,
    build_augmented_model,
    build_evaluator,
    check_augmentation,
    check_evaluators,
    check_expected_results,
    is_augmented,
)
from . import checks, folder
from .averaging import WeightAverage
from .class_names import class_names_of
from .logs import log_to
from .long_runs import add_hooks, check_long_run, fit_average, has_stopped_early
from .loop import StoppableTrainer
from .machine import effective_batch_size, fit_to_machine, scale_learning_rate
from .optimizer import apply_rates, fit_saved_state, hyperparameters, split_offset_branches
from .pictures import put_pictures
from .recorder import RunRecorder
from .steps import build_steps
from .stopping import StopRequest
from .torchrun import check_joined
from .tracking import check_writers
from .validation import check_annotations
from .writers import build_writers

logger = logging.getLogger(__name__)


class DCNTrainer(StoppableTrainer):
    """Detectron2's `DefaultTrainer` with `DCNCheckpointer` and COCO evaluation; several processes work on CPU too.

    Config, data sets and OUTPUT_DIR are checked before anything is built. `trainer.cfg` is a copy of the config that is
    fitted to this machine and to its batch size (`fit_to_machine`, `scale_learning_rate`). This copy runs, and is saved
    as OUTPUT_DIR/config.yaml. While it trains, OUTPUT_DIR is locked for other runs; SIGTERM and Ctrl-C end training
    with a checkpoint and `TrainingStopped`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's __init__ is not called: it works on a GPU only, and has its own checkpointer.
        TrainerBase.__init__(self)
        check_joined()
        folder.check_writable(cfg.OUTPUT_DIR)
        if comm.is_main_process():
            folder.check_unlocked(cfg.OUTPUT_DIR)
        log_to(cfg.OUTPUT_DIR)
        cfg = self._fit_config(cfg)
        self.check(cfg)
        self.check_data(cfg)
        self.stop = StopRequest()
        self._resumed = self._overwrite = self._may_start = False
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        device = next(model.parameters()).device
        logger.info(f"training on {device}, in {comm.get_world_size()} process(es)")
        self.average = WeightAverage(cfg, model) if cfg.SOLVER.EMA.ENABLED else None
        on_cpu = device.type == "cpu"
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None if on_cpu else [device.index])
        self._trainer = build_steps(cfg, model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DCNCheckpointer(
            model, cfg.OUTPUT_DIR, fine_tune=True, class_names=class_names_of(cfg), trainer=weakref.proxy(self)
        )
        self.checkpointer.averaged = self.average and self.average.model
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def check(cls, cfg: CfgNode, train: bool = True) -> None:
        """Refuses a config that is sure to fail later, in the middle of a run or after it. Opens no data.

        Args:
            cfg: of the run.
            train: whether it trains, or only evaluates.

        Raises:
            ValueError, FileNotFoundError: The message names the key or the data set.
        """
        register_own_data(cfg)
        trains = train and cls._is_ours("build_train_loader")
        check_config(cfg, training=trains)
        if train:
            checks.check_batch_size(cfg)
            check_long_run(cfg, evaluates=cls._is_ours("test") and cls._is_ours("build_evaluator"))
            check_writers(cfg)
        elif not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: nothing to evaluate (is --config-file missing?)")
        check_expected_results(cfg)
        if cls._is_ours("test"):
            check_augmentation(cfg)
        tests = cls._is_ours("build_test_loader")
        check_data_sets([*(cfg.DATASETS.TRAIN if trains else ()), *(cfg.DATASETS.TEST if tests else ())])
        cls._check_evaluators(cfg)

    @classmethod
    def check_data(cls, cfg: CfgNode, train: bool = True) -> None:
        """Reads the data sets, and refuses what does not fit the config.

        If a subclass loads or evaluates them in its own way, it only warns.

        Args:
            cfg: of the run.
            train: whether it trains, or only evaluates.

        Raises:
            ValueError, FileNotFoundError: The message names the data set, the image and the field.
        """
        check_data(
            cfg,
            train=train and cls._is_ours("build_train_loader"),
            test=cls._is_ours("build_test_loader"),
            evaluation=cls._is_ours("build_evaluator"),
        )
        if train:
            check_annotations(cfg)
        methods = ("build_train_loader", "build_test_loader", "build_evaluator")
        advise_on_data(cfg, train, [name for name in methods if not cls._is_ours(name)])

    @classmethod
    def _check_evaluators(cls, cfg: CfgNode) -> None:
        if cls._is_ours("build_evaluator"):
            check_evaluators(cfg, cfg.DATASETS.TEST)

    @classmethod
    def _is_ours(cls, name: str) -> bool:
        """Whether a method is the one of `DCNTrainer`, not one of a subclass."""
        ours, theirs = (getattr(owner, name) for owner in (DCNTrainer, cls))
        return getattr(theirs, "__func__", theirs) is getattr(ours, "__func__", ours)

    @classmethod
    def _fit_config(cls, cfg: CfgNode) -> CfgNode:
        """Gives a copy of `cfg` that fits this machine, the number of processes and the batch size.

        The copy of a copy is equal to it.
        """
        frozen, cfg = cfg.is_frozen(), cfg.clone()
        cfg.defrost()
        add_dcn_keys(cfg)
        fit_to_machine(cfg, processes=comm.get_local_size())
        scale_learning_rate(cfg)
        cfg = cls.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SOLVER.REFERENCE_IMS_PER_BATCH > 0:  # auto_scale_workers scales rate and batch together
            cfg.SOLVER.REFERENCE_IMS_PER_BATCH = effective_batch_size(cfg)
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
        main, where = comm.is_main_process(), self.cfg.OUTPUT_DIR
        if main:
            folder.check_start(self.cfg, resume, overwrite)
        self._resumed = False  # load_state_dict sets it
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.start_iter = self.iter + 1 if self._resumed else 0
        checks.check_same_iteration(self.start_iter)
        if main and resume and not self._resumed and (found := folder.describe_earlier_run(where)):
            if folder.find_checkpoints(where):
                raise FileExistsError(
                    f"OUTPUT_DIR {where} holds {found}, but none that training could go on from, and starting afresh "
                    "would overwrite them"
                )
            logger.warning(
                f"OUTPUT_DIR {where} holds {found} of a run that ended before its first checkpoint: "
                "training starts from iteration 0"
            )
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
        try:
            if main:
                self._prepare_folder()
            if has_stopped_early(self):
                self.max_iter = self.start_iter
            super().train()
        finally:
            self._may_start = self._overwrite = False  # a second call would overwrite what this one has written
            if main:
                folder.unlock_folder(where)
        return getattr(self, "_last_eval_results", None) if main else None

    def _prepare_folder(self) -> None:
        """Removes from OUTPUT_DIR what is of another run, or of iterations that are run again, and saves the config."""
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
        folder.warn_of_little_space(where, self.model, self.optimizer, count, averaged=self.average is not None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the state of an earlier run, except for its learning rates: those are this run's."""
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
        fit_average(self, scheduler)
        super().load_state_dict({**state_dict, "hooks": scheduler, "_trainer": inner})
        apply_rates(self.optimizer, self.scheduler, configured, self.iter + 1)
        self._resumed = True

    def _groups_of_detectron2(self) -> list[list[nn.Parameter]]:
        model = self.checkpointer.model
        return [group["params"] for group in DefaultTrainer.build_optimizer(self.cfg, model).param_groups]

    def build_writers(self) -> list[EventWriter]:
        """Gives Detectron2's writers, with a TensorBoard that can resume, and those of TRACKING.WRITERS."""
        trainer = weakref.proxy(self)
        return build_writers(self.cfg, self.max_iter, lambda: trainer.start_iter)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds Detectron2's optimizer, with SOLVER.OFFSET_LR_FACTOR for convolutions that predict offsets."""
        optimizer = super().build_optimizer(cfg, model)
        split_offset_branches(optimizer, model, with_dcn_keys(cfg).SOLVER.OFFSET_LR_FACTOR)
        return optimizer

    def build_hooks(self) -> list[HookBase]:
        """Gives the hooks of `StoppableTrainer`, those of the config, and one that notes how the run goes."""
        recorder = [RunRecorder()] if comm.is_main_process() else []
        return [*add_hooks(self, super().build_hooks()), *recorder]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Builds Detectron2's loader, resizing images with what INPUT.RESIZE_WITH names."""
        mapper = DCNDatasetMapper(cfg, is_train=True)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """Builds the loader for evaluation, which resizes images in the same way."""
        mapper = DCNDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates a model, as `DefaultTrainer.test` does, and with TEST.AUG.ENABLED again with augmentation.

        Args:
            cfg: with DATASETS.TEST.
            model: with its weights.
            evaluators: one for each data set; None builds them.

        Returns:
            {task: {metric: value}} of a single data set, {data set: {task: {metric: value}}} of several. The outer keys
            of results with augmentation end with "_TTA".
        """
        augment = cfg.TEST.AUG.ENABLED and len(cfg.DATASETS.TEST) > 0 and not is_augmented(model)
        if augment:
            check_augmentation(cfg)
        register_own_data(cfg)
        if evaluators is None and cfg.DATASETS.TEST:
            cls._check_evaluators(cfg)
            cls.check_data(cfg, train=False)
        results = Results(super().test(cfg, model, evaluators))
        if cls._is_ours("build_test_loader"):
            put_pictures(cfg, model)
        return add_augmented(results, cls._test_augmented(cfg, model, evaluators)) if augment else results

    @classmethod
    def _test_augmented(cls, cfg: CfgNode, model: nn.Module, evaluators: Any) -> dict[str, Any]:
        """Evaluates with test-time augmentation; it writes into OUTPUT_DIR/inference_TTA/<data set>."""
        logger.info("evaluating with test-time augmentation (TEST.AUG)")
        if evaluators is None:
            folder, ours = Path(cfg.OUTPUT_DIR) / "inference_TTA", cls._is_ours("build_evaluator")
            evaluators = [
                build_evaluator(cfg, name, folder / name) if ours else cls.build_evaluator(cfg, name)
                for name in cfg.DATASETS.TEST
            ]
        return super().test(cfg, build_augmented_model(cfg, model), evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Gives the evaluator of the data set's type, which writes into OUTPUT_DIR/inference/<data set>.

        `dcn_d2.evaluation.build_evaluator` says which types there are.
        """
        return build_evaluator(cfg, dataset_name, Path(cfg.OUTPUT_DIR) / "inference" / dataset_name)

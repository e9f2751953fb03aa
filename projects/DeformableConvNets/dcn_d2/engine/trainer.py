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
from detectron2.engine import DefaultTrainer, create_ddp_model
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import DCNCheckpointer
from ..config import add_dcn_keys, check_config, with_dcn_keys
from ..data.checks import advise_on_data, check_data, check_data_sets
from ..data.mapper import DCNDatasetMapper
from . import checks, folder
from .logs import log_to
from .loop import StoppableTrainer
from .machine import fit_to_machine, scale_learning_rate
from .optimizer import apply_rates, fit_saved_state, hyperparameters, split_offset_branches
from .stopping import StopRequest
from .torchrun import check_joined

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
        on_cpu = device.type == "cpu"
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None if on_cpu else [device.index])
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DCNCheckpointer(model, cfg.OUTPUT_DIR, fine_tune=True, trainer=weakref.proxy(self))
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
        trains = train and cls._is_ours("build_train_loader")
        check_config(cfg, training=trains)
        if train:
            checks.check_batch_size(cfg)
        elif not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: nothing to evaluate (is --config-file missing?)")
        checks.check_expected_results(cfg)
        if cls._is_ours("test"):
            checks.check_no_augmentation(cfg)
        cls._check_evaluators(cfg)
        tests = cls._is_ours("build_test_loader")
        check_data_sets([*(cfg.DATASETS.TRAIN if trains else ()), *(cfg.DATASETS.TEST if tests else ())])

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
            coco_evaluation=cls._is_ours("build_evaluator"),
        )
        methods = ("build_train_loader", "build_test_loader", "build_evaluator")
        advise_on_data(cfg, train, [name for name in methods if not cls._is_ours(name)])

    @classmethod
    def _check_evaluators(cls, cfg: CfgNode) -> None:
        if cls._is_ours("build_evaluator"):
            checks.check_evaluators(cfg.DATASETS.TEST)
            checks.check_keypoint_sigmas(cfg)

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
        folder.warn_of_little_space(where, self.model, self.optimizer, count)

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
        """Builds the loader for evaluation, which resizes images in the same way."""
        mapper = DCNDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates a model, as `DefaultTrainer.test` does."""
        checks.check_no_augmentation(cfg)
        if evaluators is None and cfg.DATASETS.TEST:
            cls._check_evaluators(cfg)
            cls.check_data(cfg, train=False)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Gives COCO's evaluation of all that the model predicts; it writes into OUTPUT_DIR/inference/<data set>."""
        checks.check_evaluators([dataset_name])
        tasks = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
        return COCOEvaluator(
            dataset_name,
            tasks=[task for task, predicted in tasks.items() if predicted],
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
            output_dir=str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name),
        )

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The trainer."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.file_io import PathManager
from torch import nn

from ..checkpoint import DCNCheckpointer
from ..config import add_dcn_keys, with_dcn_keys
from . import checks, folder
from .averaging import WeightAverage
from .class_names import class_names_of
from .evaluating import EvaluatingTrainer
from .logs import log_to
from .long_runs import add_hooks, fit_average, has_stopped_early
from .machine import effective_batch_size, fit_to_machine, scale_learning_rate
from .optimizer import apply_rates, fit_saved_state, hyperparameters, split_offset_branches
from .recorder import RunRecorder
from .steps import build_steps
from .stopping import StopRequest
from .torchrun import check_joined
from .writers import build_writers

logger = logging.getLogger(__name__)


class DCNTrainer(EvaluatingTrainer):
    """Detectron2's `DefaultTrainer` with `DCNCheckpointer`; several processes work on CPU too.

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

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The trainer, and what a process of a training job sets up first."""

from __future__ import annotations

import weakref
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, create_ddp_model, default_setup
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import DCNCheckpointer
from ..config import load_config
from ..data.mapper import DCNDatasetMapper
from .machine import fit_to_machine, scale_learning_rate


def setup(args: Namespace) -> CfgNode:
    """Reads the config that the command line names, fits it to this machine, and sets up loggers and seeds."""
    cfg = load_config(args.config_file, args.opts)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dcn_d2")
    fit_to_machine(cfg, processes=comm.get_local_size())
    scale_learning_rate(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


class DCNTrainer(DefaultTrainer):
    """Detectron2's `DefaultTrainer` with `DCNCheckpointer` and COCO evaluation; several processes work on CPU too."""

    def __init__(self, cfg: CfgNode) -> None:
        # Not DefaultTrainer's, whose create_ddp_model call names a GPU and whose checkpointer is fixed.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        on_cpu = next(model.parameters()).device.type == "cpu"
        model = create_ddp_model(model, broadcast_buffers=False, **({"device_ids": None} if on_cpu else {}))
        self._trainer = (AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer)(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DCNCheckpointer(model, cfg.OUTPUT_DIR, fine_tune=True, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Builds Detectron2's optimizer, with SOLVER.OFFSET_LR_FACTOR for convolutions that predict offsets."""
        optimizer = super().build_optimizer(cfg, model)
        # conv2_offset in Detectron2's blocks, conv_offset in the layers that have their own.
        offsets = {p for name, p in model.named_parameters() if name.endswith(("_offset.weight", "_offset.bias"))}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if parameter in offsets]
            if moved and cfg.SOLVER.OFFSET_LR_FACTOR != 1:
                group["params"] = [parameter for parameter in group["params"] if parameter not in offsets]
                lr = group["lr"] * cfg.SOLVER.OFFSET_LR_FACTOR
                optimizer.add_param_group({**group, "params": moved, "lr": lr})
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
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Evaluates all that the model predicts as COCO does; the results go to inference/<data set>."""
        tasks = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
        return COCOEvaluator(
            dataset_name,
            tasks=[task for task, predicted in tasks.items() if predicted],
            output_dir=str(Path(cfg.OUTPUT_DIR) / "inference" / dataset_name),
        )

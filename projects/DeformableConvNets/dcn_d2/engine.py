# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What train_net.py is made of: a config that suits the machine, and a trainer that runs on CPU too."""

from __future__ import annotations

import logging
import os
import weakref
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultPredictor, DefaultTrainer, create_ddp_model, default_setup
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer, TrainerBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch import nn

from .checkpoint import DCNCheckpointer
from .config import add_dcn_config
from .data.transforms import build_augmentation

logger = logging.getLogger(__name__)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config with dcn_d2's keys.

    Args:
        config_file: path of a YAML; "" gives the defaults.
        opts: KEY VALUE pairs that override it.
    """
    cfg = get_cfg()
    add_dcn_config(cfg)
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts))
    return cfg


def check_data_sets(names: Iterable[str]) -> None:
    """Checks that the annotations and images of data sets are where Detectron2 looks for them.

    Raises:
        FileNotFoundError: One is missing; the message says where it is expected and how to say where it is.
        ValueError: No data set of that name is registered.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(f"there is no data set {name!r}; registered are {', '.join(sorted(DatasetCatalog))}")
        metadata = MetadataCatalog.get(name)
        for key, what in (("json_file", "annotations"), ("image_root", "images")):
            path = metadata.get(key, None)
            if path and not PathManager.exists(path):
                root = os.environ.get("DETECTRON2_DATASETS")
                raise FileNotFoundError(
                    f"data set {name}: its {what} are expected at {os.path.abspath(path)}, which does not exist. "
                    "Detectron2 looks for data sets below the folder that the environment variable "
                    f"DETECTRON2_DATASETS names (now {root if root else 'not set, so ./datasets'}); "
                    "COCO, for example, as coco/annotations, coco/train2017 and coco/val2017 in that folder"
                )


def setup(args: Namespace) -> CfgNode:
    """Reads the config that the command line names, fits it to this machine, and sets up loggers and seeds."""
    cfg = load_config(args.config_file, args.opts)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dcn_d2")
    fit_to_machine(cfg, processes=comm.get_local_size())
    scale_learning_rate(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def fit_to_machine(cfg: CfgNode, processes: int = 1) -> None:
    """Changes in `cfg` what this machine cannot do, and says so in the log.

    Without a GPU the device becomes the CPU. On CPU, mixed precision is switched off, data loading takes no more
    workers than there are cores, and each of several processes takes its share of the cores.

    Args:
        cfg: changed in place.
        processes: how many processes of this job run on this machine.
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU: running on the CPU")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE != "cpu":
        return
    if cfg.SOLVER.AMP.ENABLED:
        logger.warning("SOLVER.AMP.ENABLED is switched off: mixed precision needs a GPU")
        cfg.SOLVER.AMP.ENABLED = False
    if processes > 1 and torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is cpu with {processes} processes, but Detectron2 connects processes through the GPUs "
            "where there are any; hide them with CUDA_VISIBLE_DEVICES="
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Several processes load their own data: starting workers there took tens of seconds on 2 cores.
    workers = cores if processes == 1 else 0
    if cfg.DATALOADER.NUM_WORKERS > workers:
        logger.info(
            f"DATALOADER.NUM_WORKERS goes from {cfg.DATALOADER.NUM_WORKERS} to {workers}: there are {cores} cores "
            f"for {processes} process(es)"
        )
        cfg.DATALOADER.NUM_WORKERS = workers
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores // processes))


def scale_learning_rate(cfg: CfgNode) -> None:
    """Scales BASE_LR to the batch size if SOLVER.REFERENCE_IMS_PER_BATCH says which one it is meant for."""
    reference, batch_size = cfg.SOLVER.REFERENCE_IMS_PER_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if reference <= 0 or reference == batch_size:
        return
    scaled = cfg.SOLVER.BASE_LR * batch_size / reference
    logger.info(
        f"SOLVER.BASE_LR goes from {cfg.SOLVER.BASE_LR:g} to {scaled:g}: it is meant for a batch of {reference}, and "
        f"SOLVER.IMS_PER_BATCH is {batch_size} (SOLVER.REFERENCE_IMS_PER_BATCH 0 leaves it alone; MAX_ITER and "
        "STEPS are never scaled)"
    )
    cfg.SOLVER.BASE_LR = scaled
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = batch_size  # so that the saved config gives the same when it is used again


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
        mapper = DatasetMapper(cfg, is_train=True, augmentations=build_augmentation(cfg, is_train=True))
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """As `build_train_loader`, for evaluation."""
        mapper = DatasetMapper(cfg, is_train=False, augmentations=build_augmentation(cfg, is_train=False))
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


class DCNPredictor(DefaultPredictor):
    """Detectron2's `DefaultPredictor`, which resizes images with what INPUT.RESIZE_WITH names.

    `DefaultPredictor` itself always resizes with PIL: on enlarged images that changes grey levels by 1 at most.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        (self.aug,) = build_augmentation(cfg, is_train=False)

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Builds the evaluators of a data set, as Detectron2's tools/train_net.py does."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)

from .any_numpy import (
    CityscapesInstanceEvaluatorForAnyNumPy,
    CityscapesSemSegEvaluatorForAnyNumPy,
    LVISEvaluatorForAnyNumPy,
    SemSegEvaluatorForAnyNumPy,
)
from .checks import check_evaluators
from .coco import build_coco_evaluator
from .kinds import measures_panoptic_quality, type_of
from .outputs import BOXES, KEYPOINTS, MASKS, PROPOSALS, outputs_of


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | os.PathLike[str]) -> DatasetEvaluator:
    """Builds what measures the results on a data set; `evaluator_type` in its metadata says how.

    coco (also for data sets that name no type): boxes, masks and keypoints as COCO. coco_panoptic_seg: these, the
    semantic segmentation, and, with TEST.PANOPTIC_QUALITY, PQ. sem_seg: IoU of classes. lvis: boxes and masks as LVIS.
    pascal_voc: boxes as PASCAL VOC. cityscapes_instance and cityscapes_sem_seg: as Cityscapes.

    Args:
        cfg: of the model.
        dataset_name: of the data set.
        output_folder: where predictions are written, if the evaluator writes any.

    Raises:
        ValueError: It cannot be evaluated; see `check_evaluators`.
    """
    check_evaluators(cfg, [dataset_name])
    kind, folder = type_of(dataset_name), os.fspath(output_folder)
    if kind == "lvis":
        return LVISEvaluatorForAnyNumPy(dataset_name, tasks=_tasks(cfg, keypoints=False), output_dir=folder)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name)
    if kind == "cityscapes_instance":
        return CityscapesInstanceEvaluatorForAnyNumPy(dataset_name)
    if kind == "cityscapes_sem_seg":
        return CityscapesSemSegEvaluatorForAnyNumPy(dataset_name)
    evaluators: list[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(SemSegEvaluatorForAnyNumPy(dataset_name, folder))
    if kind in ("coco", "coco_panoptic_seg"):
        evaluators.append(build_coco_evaluator(cfg, dataset_name, _tasks(cfg), folder))
    if measures_panoptic_quality(cfg, dataset_name):
        evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def _tasks(cfg: CfgNode, keypoints: bool = True) -> list[str]:
    """What COCO's and LVIS's evaluations measure of the model's predictions."""
    outputs = outputs_of(cfg)
    if outputs is None or PROPOSALS in outputs:
        masks, points = cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON
        outputs = {BOXES} | ({MASKS} if masks else set()) | ({KEYPOINTS} if points else set())
    tasks = {"bbox": BOXES, "segm": MASKS} | ({"keypoints": KEYPOINTS} if keypoints else {})
    return [task for task, output in tasks.items() if output in outputs]

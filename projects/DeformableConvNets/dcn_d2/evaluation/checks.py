# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is checked before a model is trained or evaluated, so that the evaluation does not fail at its end."""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from .coco import uses_faster_coco_eval
from .kinds import CITYSCAPES, PANOPTIC_API, Kind, kind_of, type_of
from .outputs import KEYPOINTS, PANOPTIC, outputs_of

TRUTH = {"cityscapes_instance": "*_gtFine_instanceIds.png", "cityscapes_sem_seg": "*_gtFine_labelIds.png"}


def check_evaluators(cfg: CfgNode, names: Iterable[str]) -> None:
    """Refuses data sets that cannot be evaluated with this model, on these machines, with these packages.

    Args:
        cfg: of the model.
        names: the data sets that are evaluated.

    Raises:
        ValueError, FileNotFoundError: The message names the data set, what is missing, and the way out.
    """
    for name in names:
        kind = kind_of(cfg, name)
        _check_package(name, kind)
        _check_outputs(cfg, name, kind)
        _check_files(name, kind)
        if kind.package == CITYSCAPES:
            _check_cityscapes(name)
        if type_of(name) in ("coco", "coco_panoptic_seg"):
            uses_faster_coco_eval(cfg)
            _check_keypoint_sigmas(cfg)


def _check_package(name: str, kind: Kind) -> None:
    if kind.package is None or importlib.util.find_spec(kind.package[0]) is not None:
        return
    package, command = kind.package
    way = ", or leave out panoptic quality by TEST.PANOPTIC_QUALITY False" if kind.package == PANOPTIC_API else ""
    raise ValueError(
        f"data set {name} is evaluated by the package {package} (its evaluator type is {type_of(name)}), which is not "
        f"installed: {command}{way}"
    )


def _check_outputs(cfg: CfgNode, name: str, kind: Kind) -> None:
    outputs = outputs_of(cfg)
    if outputs is None:
        return
    model = f"the model gives {', '.join(sorted(outputs))} (MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}"
    model += f", MODEL.MASK_ON {cfg.MODEL.MASK_ON})"
    for alternatives in kind.needs:
        if not alternatives & outputs:
            way = ""
            if PANOPTIC in alternatives:
                way = ": set MODEL.PANOPTIC_FPN.COMBINE.ENABLED True, or TEST.PANOPTIC_QUALITY False"
            raise ValueError(
                f"data set {name}: its evaluation (type {type_of(name)}) needs {' or '.join(sorted(alternatives))}, "
                f"but {model}{way}"
            )
    for output in sorted(outputs - kind.measures):
        message = f"data set {name}: its evaluation (type {type_of(name)}) does not measure the model's {output}"
        log_first_n(logging.WARNING, message, name=__name__, key="message")


def _check_files(name: str, kind: Kind) -> None:
    metadata = MetadataCatalog.get(name)
    for key in kind.files:
        path = metadata.get(key, None)
        if not path:
            raise ValueError(
                f"data set {name}: its metadata have no {key}, which its evaluation (type {type_of(name)}) reads: "
                f"MetadataCatalog.get({name!r}).{key} = ..."
            )
        if not PathManager.exists(path):
            raise FileNotFoundError(
                f"data set {name}: its evaluation reads {key}, {os.path.abspath(path)}, which does not exist"
            )


def _check_cityscapes(name: str) -> None:
    """Cityscapes' scripts read files of one machine, and know only their own classes."""
    if comm.get_local_size() != comm.get_world_size():
        raise ValueError(
            f"data set {name}: Cityscapes' evaluation works on one machine only, but this job runs on "
            f"{comm.get_world_size() // comm.get_local_size()}: train with DATASETS.TEST (), and evaluate on one"
        )
    from cityscapesscripts.helpers.labels import name2label

    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes", None) or []
    unknown = [text for text in names if text not in name2label]
    if unknown and type_of(name) == "cityscapes_instance":
        raise ValueError(f"data set {name}: Cityscapes' evaluation does not know its categories {', '.join(unknown)}")
    pattern = os.path.join(glob.escape(PathManager.get_local_path(metadata.gt_dir)), "*", TRUTH[type_of(name)])
    if not glob.glob(pattern):
        raise FileNotFoundError(f"data set {name}: Cityscapes' evaluation reads {pattern}, and there is no such file")


def _check_keypoint_sigmas(cfg: CfgNode) -> None:
    """Refuses keypoints without a tolerance for each; by itself, COCO's evaluation has those of COCO's 17 keypoints."""
    if not cfg.MODEL.KEYPOINT_ON or KEYPOINTS not in (outputs_of(cfg) or {KEYPOINTS}):
        return
    keypoints, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if sigmas != keypoints and (sigmas or keypoints != 17):
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoints}: "
            "COCO's evaluation needs a tolerance for each keypoint (empty: those of COCO's 17)"
        )

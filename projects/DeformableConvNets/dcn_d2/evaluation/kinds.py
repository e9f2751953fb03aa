# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The evaluator types that a data set's metadata may name, and what each needs."""

from __future__ import annotations

from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..config import with_dcn_keys
from .outputs import BOXES, KEYPOINTS, MASKS, PANOPTIC, PROPOSALS, SEMANTIC

Package = tuple[str, str]  # the name of a module, and the command that installs it

# lvis asks for opencv-python, which overwrites the files of opencv-python-headless; what else it needs is there.
LVIS = ("lvis", "pip install --no-deps lvis")
CITYSCAPES = ("cityscapesscripts", "pip install cityscapesscripts")
PANOPTIC_API = ("panopticapi", "pip install git+https://github.com/cocodataset/panopticapi.git")


class Kind(NamedTuple):
    """What a type of evaluator needs.

    Attributes:
        needs: outputs of the model without which it fails; of several in one set, one is enough.
        measures: outputs that it has a number for.
        package: the package that measures them.
        files: keys of the metadata that name files or folders which it reads.
    """

    needs: tuple[frozenset[str], ...]
    measures: frozenset[str]
    package: Package | None = None
    files: tuple[str, ...] = ()


_BOXES, _MASKS, _SEMANTIC, _PANOPTIC = (frozenset([output]) for output in (BOXES, MASKS, SEMANTIC, PANOPTIC))
_OBJECTS = frozenset([BOXES, PROPOSALS])
_COCO = _OBJECTS | {MASKS, KEYPOINTS}

KINDS = {
    "coco": Kind((_OBJECTS,), _COCO),
    # Without panoptic quality.
    "coco_panoptic_seg": Kind((_BOXES, _SEMANTIC), _COCO | _SEMANTIC | _PANOPTIC),
    "sem_seg": Kind((_SEMANTIC,), _SEMANTIC),
    "lvis": Kind((_OBJECTS,), _OBJECTS | _MASKS, LVIS, ("json_file",)),
    "pascal_voc": Kind((_BOXES,), _BOXES, None, ("dirname",)),
    "cityscapes_instance": Kind((_MASKS,), _MASKS | _BOXES, CITYSCAPES, ("gt_dir",)),
    "cityscapes_sem_seg": Kind((_SEMANTIC,), _SEMANTIC, CITYSCAPES, ("gt_dir",)),
}


def type_of(dataset_name: str) -> str:
    """The evaluator type of a data set; COCO's if it names none."""
    return MetadataCatalog.get(dataset_name).get("evaluator_type", None) or "coco"


def measures_panoptic_quality(cfg: CfgNode, dataset_name: str) -> bool:
    """Whether the data set's evaluation includes panoptic quality (PQ)."""
    return type_of(dataset_name) == "coco_panoptic_seg" and with_dcn_keys(cfg).TEST.PANOPTIC_QUALITY


def kind_of(cfg: CfgNode, dataset_name: str) -> Kind:
    """What the evaluation of a data set needs.

    Raises:
        ValueError: Its evaluator type is none of `KINDS`.
    """
    name = type_of(dataset_name)
    if name not in KINDS:
        raise ValueError(
            f"data set {dataset_name} has the evaluator type {name!r}, which is none of {', '.join(KINDS)}: name "
            "one of them where the data set is registered (its metadata cannot be changed later), or override "
            "DCNTrainer.build_evaluator"
        )
    kind = KINDS[name]
    if measures_panoptic_quality(cfg, dataset_name):
        files = ("panoptic_json", "panoptic_root")
        return kind._replace(needs=(*kind.needs, _PANOPTIC), package=PANOPTIC_API, files=files)
    return kind

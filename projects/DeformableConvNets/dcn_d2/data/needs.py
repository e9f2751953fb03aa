# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the model and the loader of a config read of a data set, and whether its classes are those of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from detectron2.config import CfgNode

from .findings import Findings, show

# Where the models of Detectron2 have the number of their classes, and which of a data set's lists it must fit. Other
# models are asked for MODEL.<NAME OF THE MODEL>.NUM_CLASSES, which is where FCOS and its like have it.
CLASSES = {
    "GeneralizedRCNN": {"ROI_HEADS": "thing_classes"},
    "PanopticFPN": {"ROI_HEADS": "thing_classes", "SEM_SEG_HEAD": "stuff_classes"},
    "SemanticSegmentor": {"SEM_SEG_HEAD": "stuff_classes"},
    "ProposalNetwork": {},
}


class Reads(NamedTuple):
    """What an evaluator reads of a data set once it is loaded."""

    names: tuple[str, ...]  # keys of its metadata
    fields: tuple[str, ...]  # keys of each image
    annotations: tuple[str, ...] = ()  # of "masks" and "keypoints": what it reads of annotations besides boxes


_COCO = ("image_id", "width", "height")
_IDS = ("stuff_dataset_id_to_contiguous_id", "thing_dataset_id_to_contiguous_id")

# What the evaluators read, by the `evaluator_type` in a data set's metadata.
EVALUATORS = {
    "coco": Reads(("thing_classes",), _COCO, ("masks", "keypoints")),
    "coco_panoptic_seg": Reads(
        ("thing_classes", "stuff_classes", "ignore_label", *_IDS),
        (*_COCO, "sem_seg_file_name"),
        ("masks", "keypoints"),
    ),
    "sem_seg": Reads(("stuff_classes", "ignore_label"), ("sem_seg_file_name",)),
    "lvis": Reads(("thing_classes",), ("image_id",), ("masks",)),
    "pascal_voc": Reads(("thing_classes", "split", "year"), ("image_id",)),
    "cityscapes_instance": Reads(("thing_classes",), ()),
    "cityscapes_sem_seg": Reads(("stuff_classes",), ()),
}
COCO_EVALUATORS = ("coco", "coco_panoptic_seg")  # those that read COCO's annotations of objects in `json_file`


class Needs(NamedTuple):
    """What a config asks of one data set. The same needs of the same data give the same findings."""

    train: bool  # it is for training and not for tests
    evaluator: str  # one of `EVALUATORS`; "" if it is for training, or measured in another way
    classes: tuple[tuple[str, int, str], ...]  # (config key, its value, key of the metadata)
    annotations: bool  # objects with boxes
    masks: bool
    mask_format: str
    keypoints: int  # of an object; 0: the model knows no keypoints
    drops_empty: bool  # images without objects are left out of the training
    min_keypoints: int  # images with fewer are left out of the training

    @property
    def coco_evaluation(self) -> bool:
        """Whether it is for tests whose results COCO's evaluation measures."""
        return self.evaluator in COCO_EVALUATORS

    @property
    def reads(self) -> Reads:
        """What the evaluator reads."""
        return EVALUATORS.get(self.evaluator, Reads((), ()))

    @property
    def labels(self) -> tuple[str, int] | None:
        """The key of the number of classes of pixels and its value, if files with the label of each pixel are read."""
        if not self.train and "sem_seg_file_name" not in self.reads.fields:
            return None
        return next(((key, number) for key, number, field in self.classes if field == "stuff_classes"), None)

    @property
    def things(self) -> tuple[str, int] | None:
        """The key of the number of object classes and its value."""
        return next(((key, number) for key, number, field in self.classes if field == "thing_classes"), None)


def read_needs(cfg: CfgNode, train: bool, evaluator: str = "coco") -> Needs:
    """What `cfg` asks of its data sets for training, or for tests that one of `EVALUATORS` measures.

    Any other `evaluator` reads nothing that is known.
    """
    model = cfg.MODEL.META_ARCHITECTURE
    heads = CLASSES.get(model, {model.upper(): "thing_classes"})
    classes = tuple(
        (f"MODEL.{head}.NUM_CLASSES", cfg.MODEL[head].NUM_CLASSES, field)
        for head, field in heads.items()
        if "NUM_CLASSES" in cfg.MODEL.get(head, {})
    )
    with_heads = "ROI_HEADS" in heads
    evaluator = "" if train or evaluator not in EVALUATORS else evaluator
    read = EVALUATORS[evaluator].annotations if evaluator else ("masks", "keypoints")
    with_keypoints = with_heads and cfg.MODEL.KEYPOINT_ON and "keypoints" in read
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if with_keypoints else 0
    return Needs(
        train=train,
        evaluator=evaluator,
        classes=classes,
        annotations=model != "SemanticSegmentor",
        masks=with_heads and cfg.MODEL.MASK_ON and "masks" in read,
        mask_format=cfg.INPUT.MASK_FORMAT,
        keypoints=keypoints,
        drops_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if keypoints else 0,
    )


def check_number_of_classes(needs: Needs, key_values: dict[str, Sequence[str] | None], findings: Findings) -> None:
    """Compares NUM_CLASSES with a data set's lists of names."""
    for key, number, field in needs.classes:
        names = key_values.get(field)
        if not names or len(names) == number:
            continue
        both = f"{key} is {number}, but the data set has {len(names)} categories ({list_names(names)})"
        if len(names) > number:
            lost = "train as background" if needs.train else "can never be found"
            findings.errors.append(f"{both}: the last ones {lost}. Set {key} to {len(names)}")
        else:
            surplus = f"{both}: the classes from {len(names)} to {number - 1} have no examples"
            if field == "thing_classes" and (needs.train or needs.coco_evaluation):
                stops = "and COCO's evaluation stops at the first prediction of one, after the training"
                findings.errors.append(f"{surplus}, {stops}. Set {key} to {len(names)}")
            else:
                findings.warnings.append(f"{surplus}. Set {key} to {len(names)} if that is not meant")


def compare_names(
    reference: str, expected: Sequence[str], names: Sequence[str], train: bool, findings: Findings
) -> None:
    """Compares the categories of a data set with those of the first training set, `reference`.

    A name that stands at another place makes every number wrong; other names may be a matter of spelling, but where
    both are for training Detectron2 refuses those as well.
    """
    if list(names) == list(expected):
        return
    moved = [name for name in names if name in expected and list(names).index(name) != list(expected).index(name)]
    both = f"its categories are {list_names(names)}, those of {reference} are {list_names(expected)}"
    if moved:
        first = moved[0]
        findings.errors.append(
            f"{both}. {first!r} is class {list(names).index(first)} here, class {list(expected).index(first)} there, "
            "and a model knows classes by their numbers. Give both the same list of categories (one that has no "
            "objects may stay in it)"
            + ("" if train else "; to evaluate a model that was trained on others: DATASETS.TRAIN ()")
        )
    elif train:
        findings.errors.append(f"{both}. Data sets for one training must have the same list of categories")
    else:
        findings.warnings.append(f"{both}. Classes count by their place in the list, whatever they are called")


def list_names(names: Sequence[str], shown: int = 8) -> str:
    """The first names of a list."""
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(show(name, 40) for name in names[:shown]) + more

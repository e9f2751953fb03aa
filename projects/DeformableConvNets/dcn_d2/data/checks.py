# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks of data sets before anything runs.

`check_data` is the one that trainers call. It knows which data sets a config names and what its model reads of them;
`coco_json`, `records`, `annotations`, `image_files` and `needs` look at one data set each in their own respect.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from ..config.messages import nearest
from .coco_json import check_coco_json, read_before, read_json
from .findings import Findings, show
from .image_files import check_image_files
from .label_files import check_label_files
from .needs import COCO_EVALUATORS, Needs, check_number_of_classes, compare_names, read_needs
from .proposals import check_proposals
from .records import check_records

logger = logging.getLogger(__name__)
# Files and folders that a data set's metadata may name, and what they hold.
FILES = {
    "json_file": "annotations",
    "image_root": "images",
    "sem_seg_root": "semantic segmentations",
    "dirname": "images and annotations",  # PASCAL VOC
    "image_dir": "images",  # Cityscapes
    "gt_dir": "annotations",
}
_checked: dict[tuple[str, Needs], tuple[Any, ...]] = {}  # and found to be good: see `_fingerprint`


def check_data_sets(names: Iterable[str]) -> None:
    """Checks that the annotations and images of data sets are where Detectron2 looks for them. Opens nothing.

    Raises:
        FileNotFoundError: One is missing; the message says where it is expected and how to say where it is.
        ValueError: No data set of that name is registered.
    """
    for name in names:
        if name not in DatasetCatalog:
            known = sorted(DatasetCatalog)
            raise ValueError(
                f"there is no data set {name!r}{nearest(name, known)}; registered are {', '.join(known)}. For your own "
                "data: train_net.py --train-json FILE --train-images FOLDER"
            )
        metadata = MetadataCatalog.get(name)
        for key, what in FILES.items():
            path = metadata.get(key, None)
            if path and not PathManager.exists(path):
                raise FileNotFoundError(
                    f"data set {name}: its {what} are expected at {os.path.abspath(path)}, which does not exist. "
                    f"{_where_data_are_looked_for(path, bool(metadata.get('own', False)))}"
                )


def _where_data_are_looked_for(path: str, own: bool) -> str:
    """Says where the path of a data set comes from; `own` is whether from DATASETS.OWN."""
    if own:
        return (
            "The config names it in DATASETS.OWN. If the data were moved, name them again: train_net.py --train-json "
            "FILE --train-images FOLDER for training, --test-json and --test-images for tests"
        )
    root = os.environ.get("DETECTRON2_DATASETS")
    if not os.path.abspath(path).startswith(os.path.abspath(root or "datasets") + os.sep):
        return "It was registered with this path"
    return (
        "Detectron2 looks for data sets below the folder that the environment variable DETECTRON2_DATASETS names (now "
        f"{root if root else 'not set, so ./datasets'}); COCO, for example, as coco/annotations, coco/train2017 and "
        "coco/val2017 in that folder"
    )


def check_data(cfg: CfgNode, train: bool, test: bool = True, evaluation: bool = True) -> None:
    """Checks the data sets of a config against its model, before anything runs.

    It checks annotation files, images (their headers: of all images of a small data set, of a sample of a large one),
    boxes, masks, keypoints and categories. Warnings are logged, a line each. The data sets that are needed next, those
    for training if `train`, are loaded only once: the next `DatasetCatalog.get` gives what was loaded here. A data set
    without faults is not checked again while its file stays the same.

    In a distributed job the main process checks and speaks; the others wait, and stop as it does. All must call it.

    Args:
        cfg: with DATASETS.TRAIN and DATASETS.TEST.
        train: check those of DATASETS.TRAIN.
        test: check those of DATASETS.TEST.
        evaluation: they must have what the evaluation of their `evaluator_type` reads.

    Raises:
        FileNotFoundError: annotations or images are not there.
        ValueError: the data cannot be used with this model; the message names file, image, field and the way out.
    """
    problem: Exception | None = None
    if comm.is_main_process():
        try:
            _check(cfg, train, test, evaluation)
        except Exception as error:  # of any kind: the other processes wait to hear of it
            problem = error
    # The text, as an error of any kind may not arrive whole.
    told = comm.all_gather(f"{type(problem).__name__}: {problem}" if problem else "")[0]
    if problem:
        raise problem
    if told:
        raise ValueError(f"the main process found this in the data: {told}")


def advise_on_data(cfg: CfgNode, train: bool, own: Collection[str]) -> None:
    """Warns of what `check_data` would refuse, in data sets that a trainer loads or measures in its own way.

    There it may be meant: a mapper of one's own may drop annotations or number the classes anew.

    Args:
        cfg: with DATASETS.TRAIN and DATASETS.TEST.
        train: whether it trains.
        own: which of build_train_loader, build_test_loader and build_evaluator are its own.
    """
    if not comm.is_main_process():
        return
    asked = []
    if train and "build_train_loader" in own:
        asked += [(name, read_needs(cfg, train=True)) for name in cfg.DATASETS.TRAIN]
    if "build_test_loader" in own or "build_evaluator" in own:
        measured = [name for name in cfg.DATASETS.TEST if MetadataCatalog.get(name).get("evaluator_type", "") == "coco"]
        asked += [(name, read_needs(cfg, train=False)) for name in measured]
    for name, needs in asked:
        if name not in DatasetCatalog:
            continue
        said = not needs.train and "build_test_loader" not in own  # by `check_data`
        try:
            check_data_sets([name])
            _check_one(name, needs, "", hand_on=needs.train, quiet=said)
        except Exception as error:  # the data set's loader may be anyone's
            why = f"This is only a warning because the trainer has its own {', '.join(sorted(own))}"
            log_first_n(logging.WARNING, f"{error}\n{why}", name=__name__, key="message")  # not at each evaluation


def _check(cfg: CfgNode, train: bool, test: bool, evaluation: bool) -> None:
    train_sets, test_sets = tuple(cfg.DATASETS.TRAIN), tuple(cfg.DATASETS.TEST) if test else ()
    if train and not train_sets:
        raise ValueError("DATASETS.TRAIN names no data set")
    check_data_sets([*(train_sets if train else ()), *test_sets])
    for split, needed in (("TRAIN", train), ("TEST", bool(test_sets))):
        if needed:
            check_proposals(cfg, split)
    reference = ""
    if train:
        needs = read_needs(cfg, train=True)
        for name in train_sets:
            _check_one(name, needs, reference, hand_on=True)
            reference = reference or name
    elif train_sets and train_sets[0] in DatasetCatalog:
        reference = train_sets[0]  # the weights are taken to be from there
    for name in test_sets:
        evaluator = evaluator_of(name) if evaluation else ""
        _check_one(name, read_needs(cfg, train=False, evaluator=evaluator), reference, hand_on=not train)
        if not reference:
            _compare_with_class_names(name, cfg.DATASETS.get("CLASS_NAMES", ()))


def _compare_with_class_names(name: str, expected: Sequence[str]) -> None:
    """Compares the categories of a data set with the classes that the config names, if it names any."""
    names = MetadataCatalog.get(name).get("thing_classes", None)
    if names and expected:
        findings = Findings(f"data set {name}")
        compare_names("DATASETS.CLASS_NAMES", expected, names, False, findings)
        findings.refuse()


def evaluator_of(name: str) -> str:
    """How the results on a data set are measured; as COCO does where it does not say."""
    return MetadataCatalog.get(name).get("evaluator_type", None) or "coco"


def _check_one(name: str, needs: Needs, reference: str, hand_on: bool, quiet: bool = False) -> None:
    """Checks one data set, and its names of categories against those of the data set `reference`, unless that is "".

    With `quiet`, only errors are told.
    """
    metadata = MetadataCatalog.get(name)
    path, image_root = metadata.get("json_file", None), str(metadata.get("image_root", None) or "")
    findings = Findings(f"data set {name}{f' ({path})' if path else ''}")
    fingerprint = _fingerprint(name, path, reference)
    if _checked.get((name, needs)) == fingerprint:
        return
    begin = time.perf_counter()
    with without_garbage_collection():
        if path and evaluator_of(name) in COCO_EVALUATORS:
            file = PathManager.get_local_path(path)
            content = read_json(file)
            check_coco_json(content, image_root, needs, findings)
            findings.refuse()
            with read_before(file, content):
                records = load_data_set(name, findings)
            del content
        else:
            records = load_data_set(name, findings)
        check_names(metadata, needs, reference, findings)
        summary = "of a size that is not known"
        if isinstance(records, Sequence):  # else it is a torch Dataset, which may hold anything
            check_records(records, needs, metadata.get("thing_classes", None), findings)
            findings.refuse()
            looked = check_image_files(records, findings)
            if needs.labels:
                ignored = metadata.get("ignore_label", None)
                check_label_files(records, needs.labels, 255 if ignored is None else ignored, findings, needs.train)
            annotations = sum(len(record.get("annotations") or ()) for record in records)
            summary = f"{len(records)} images, {annotations} annotations, {looked} image files looked at"
    if not quiet:
        findings.warn(logger)
    findings.refuse()
    logger.info(f"{findings.subject}: checked in {time.perf_counter() - begin:.1f} s: {summary}")
    _checked[name, needs] = fingerprint
    if hand_on and isinstance(records, list):
        DatasetCatalog[name] = _HandOn(name, _get_function(name), records)


def load_data_set(name: str, findings: Findings) -> Any:
    """Loads a data set. An error of its loader is raised again with the data set's name."""
    function = DatasetCatalog[name]
    if isinstance(function, _HandOn):  # it is for training and for tests: what was loaded stays for the training
        return function.records
    try:
        return function()
    except Exception as error:  # the loader may be anyone's
        text = show(f"{type(error).__name__}: {error}".strip().rstrip(":"), 1000)
        raise ValueError(f"{findings.subject} cannot be loaded: {text}") from error


def check_names(metadata: Any, needs: Needs, reference: str, findings: Findings) -> None:
    """Checks the lists of names that a data set has in its metadata once it is loaded."""
    names, stuff = metadata.get("thing_classes", None), metadata.get("stuff_classes", None)
    for key in needs.reads.names:
        if metadata.get(key, None) is None:
            what = "names of categories" if key == "thing_classes" else f"{key} in its metadata"
            way = f"MetadataCatalog.get({metadata.name!r}).{key} = {'[...]' if key.endswith('classes') else '...'}"
            findings.note(f"it has no {what}, which evaluation needs: {way}", kind="no-names")
    if needs.train and needs.keypoints:
        _check_keypoint_names(metadata, needs, findings)
    check_number_of_classes(needs, {"thing_classes": names, "stuff_classes": stuff}, findings)
    expected = _get_names(reference) if reference and names else None
    if names and expected:
        compare_names(reference, expected, names, needs.train, findings)


def _get_names(name: str) -> Sequence[str] | None:
    """The categories of a data set that may not have been loaded; None if that is not known without loading it."""
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes", None)
    path = metadata.get("json_file", None)
    if names or not path or not PathManager.exists(path):
        return names
    try:
        categories = read_json(PathManager.get_local_path(path))["categories"]
        return [category["name"] for category in sorted(categories, key=lambda category: category["id"])]
    except (OSError, ValueError, LookupError, TypeError) as error:  # no reason to refuse an evaluation
        logger.warning(f"the categories cannot be compared with those of {name}: {type(error).__name__}: {error}")
        return None


def _check_keypoint_names(metadata: Any, needs: Needs, findings: Findings) -> None:
    for key in ("keypoint_names", "keypoint_flip_map"):
        if metadata.get(key, None) is None:
            way = f"MetadataCatalog.get({metadata.name!r}).{key} = [...]"
            findings.note(f"its metadata have no {key}, which MODEL.KEYPOINT_ON needs: {way}", kind="keypoint-names")
    names = metadata.get("keypoint_names", None)
    if names is not None and len(names) != needs.keypoints:
        both = f"{len(names)} names of keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {needs.keypoints}"
        findings.note(f"it has {both}", kind="keypoint-names")


def _get_function(name: str) -> Callable[[], Any]:
    """What a data set was registered with."""
    function = DatasetCatalog[name]
    return function.function if isinstance(function, _HandOn) else function


def _fingerprint(name: str, path: str | None, reference: str) -> tuple[Any, ...]:
    """A value that changes when the data set does."""
    stamp = None
    if path:
        status = os.stat(PathManager.get_local_path(path))
        stamp = status.st_mtime_ns, status.st_size
    return _get_function(name), stamp, reference


class _HandOn:
    """Stands in for the function that loads a data set: gives once what was loaded, and then puts the function back."""

    def __init__(self, name: str, function: Callable[[], Any], records: list[Any]) -> None:
        self.name, self.function, self.records = name, function, records

    def __call__(self) -> list[Any]:
        if DatasetCatalog.data.get(self.name) is self:
            DatasetCatalog[self.name] = self.function
        return self.records


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pauses it while millions of small objects are made: none is garbage, and checking them doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Puts data of the user's own, which the command line names, into a config."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..checkpoint.class_names import check_class_names, peek_class_names
from ..checkpoint.files import CorruptCheckpointError
from ..config.access import value_of
from ..config.published import use_published_weights
from ..data.findings import show
from ..data.needs import list_names, read_needs
from ..data.own import data_set_name, register_own_data
from ..data.own.categories import OwnFile, check_same_classes, match_classes, read_own_file
from ..data.own.keypoints import check_sigmas, read_keypoints
from ..data.own.schedule import count_training_images, describe_epochs, set_epochs
from ..data.own.split import split_file
from ..files import write_atomically
from . import folder
from .class_names import class_names_of

logger = logging.getLogger(__name__)


def use_own_data(args: Namespace, cfg: CfgNode) -> list[str]:
    """Puts what the arguments of `dcn_d2.command_line.own_data` say into a config, and registers the data sets.

    DATASETS.OWN, TRAIN, TEST and CLASS_NAMES are set, the number of classes, with keypoints their names, and the
    schedule. Without such arguments it changes nothing.

    Args:
        args: the command line.
        cfg: the config; it is changed.

    Returns:
        Lines for the log.

    Raises:
        ValueError: The data do not fit each other or what the user has set.
    """
    notes = start_from_published(args, cfg) if args.from_published else []
    if not (args.train_json or args.test_json):
        return notes
    given = args.opts[::2]
    train = _read_files(args, "train", cfg)
    if args.split is not None:
        train, test, lines = _split(train[0], args, cfg)
        notes += lines
    else:
        test = _read_files(args, "test", cfg)
    notes += _note_shared_images(train, test)
    names = check_same_classes(train) if train else _names_without_training_data(args, cfg, test)
    if args.resume:
        _refuse_other_run(cfg.OUTPUT_DIR, names)
    for file in test:
        notes += match_classes(file, names)
    notes += _describe_classes(train, names)
    notes += _set_classes(cfg, names, given)
    if cfg.MODEL.KEYPOINT_ON:
        notes += _set_keypoints(cfg, train or test, bool(test), given)
    _set_data_sets(cfg, train, test, names, args.eval_only)
    if train and not args.eval_only:
        images = count_training_images(train, cfg)
        if not images:
            raise ValueError(f"--train-json {show(train[0].json_file)}: no image has an object to learn from")
        if args.epochs is not None:
            notes.append(set_epochs(cfg, args.epochs, images, given))
        elif "SOLVER.MAX_ITER" not in given:
            notes.append(describe_epochs(cfg, images))
        if not test:
            notes.append("no --test-json: nothing is evaluated (--split 0.8 holds a part of the images out)")
    register_own_data(cfg)
    return notes


def start_from_published(args: Namespace, cfg: CfgNode) -> list[str]:
    """Makes MODEL.WEIGHTS of `cfg` the published weights of its row, and fetches them if they will be needed."""
    use_published_weights(cfg, "--from-published", args.config_file)
    if not (args.resume and folder.describe_earlier_run(cfg.OUTPUT_DIR)):
        PathManager.get_local_path(cfg.MODEL.WEIGHTS)  # so that the processes find it in the cache
    return [f"--from-published: training starts from {cfg.MODEL.WEIGHTS}"]


def _read_files(args: Namespace, part: str, cfg: CfgNode) -> list[OwnFile]:
    files, folders = getattr(args, f"{part}_json"), getattr(args, f"{part}_images")
    folders = folders * len(files) if len(folders) == 1 else folders
    needs = read_needs(cfg, train=part == "train")
    read = [read_own_file(f"--{part}-json", file, root, needs) for file, root in zip(files, folders)]
    for file in read:
        if part == "train" and not file.annotations:
            raise ValueError(f"--train-json {show(file.json_file)} has no annotations")
    if len(getattr(args, f"{part}_images")) == 1:
        names = Counter(name for file in read for name in {image["file_name"] for image in file.content["images"]})
        if twice := [name for name, number in names.items() if number > 1]:
            raise ValueError(
                f"--{part}-images: with one folder for all files of --{part}-json, {len(twice)} images such as "
                f"{show(twice[0])} would be in more than one of them. Give a folder for each file, or merge the files"
            )
    return read


def _split(file: OwnFile, args: Namespace, cfg: CfgNode) -> tuple[list[OwnFile], list[OwnFile], list[str]]:
    """Writes the two parts of a file below OUTPUT_DIR."""
    split = split_file(file, args.split)
    folder.check_writable(cfg.OUTPUT_DIR)
    where = Path(cfg.OUTPUT_DIR).absolute() / "data"
    where.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, content in (("train", split.train), ("test", split.test)):
        path, data = where / f"{name}.json", json.dumps(content).encode()
        if not path.is_file() or path.read_bytes() != data:
            if path.is_file() and (args.resume or args.eval_only):
                raise ValueError(
                    f"--split: {path} is of another file or another part than --train-json {show(file.json_file)} and "
                    f"--split {args.split:g}, so that images of the training would be in the test. Take the ones of "
                    f"the training, or leave the arguments out: --config-file {Path(cfg.OUTPUT_DIR) / 'config.yaml'}"
                )
            with write_atomically(str(path)) as stream:
                stream.write(data)
        parts.append(OwnFile("--split", str(path), file.image_root, content))
    sizes = [len(part.content["images"]) for part in parts]
    notes = [f"--split {args.split:g}: {sizes[0]} images for training, {sizes[1]} for tests, listed in {where}"]
    for found, part in ((split.only_in_train, "training"), (split.only_in_test, "tests")):
        if found:
            notes.append(f"--split: all images with objects of {list_names(found)} are for {part}")
    return [parts[0]], [parts[1]], notes


def _note_shared_images(train: Sequence[OwnFile], test: Sequence[OwnFile]) -> list[str]:
    def paths(files: Sequence[OwnFile]) -> set[str]:
        return {os.path.join(file.image_root, image["file_name"]) for file in files for image in file.content["images"]}

    if shared := paths(train) & paths(test):
        first = show(min(shared))
        return [f"{len(shared)} images are both for training and for tests, such as {first}: AP will be too high"]
    return []


def _refuse_other_run(output_dir: str, names: Sequence[str]) -> None:
    """Refuses to go on with a run of other classes, before anything of it is overwritten."""
    for checkpoint in folder.find_checkpoints(output_dir)[-1:]:
        path = os.path.join(output_dir, checkpoint)
        with contextlib.suppress(OSError, CorruptCheckpointError):  # resuming will say so, or take an earlier one
            check_class_names(names, peek_class_names(path), path, resume=True)


def _names_without_training_data(args: Namespace, cfg: CfgNode, test: Sequence[OwnFile]) -> list[str]:
    """The names of the model's classes where only --test-json is given."""
    if names := list(cfg.DATASETS.CLASS_NAMES):
        return names
    if not args.eval_only:
        raise ValueError(
            "--test-json alone is for --eval-only, or with the config.yaml of a run on your own data: training needs "
            "--train-json and --train-images"
        )
    weights = "" if getattr(args, "model", None) else cfg.MODEL.WEIGHTS  # the config of an exported model says them
    if names := list(peek_class_names(weights) or class_names_of(cfg)):
        return names
    things = read_needs(cfg, train=False).things
    names = check_same_classes(test)
    if things and len(names) == things[1]:
        logger.warning(
            f"neither the config nor the weights say how their classes are called: those of {test[0].json_file} are "
            "taken in the order of their ids"
        )
        return names
    raise ValueError(
        "neither the config nor the weights say how their classes are called, and --test-json has "
        f"{len(names)} categories while the model has {things[1] if things else 'no'} classes: set DATASETS.CLASS_NAMES"
    )


def _describe_classes(train: Sequence[OwnFile], names: Sequence[str]) -> list[str]:
    if not train:
        return []
    objects: Counter[str] = sum((file.count_objects() for file in train), Counter())
    images = sum(len(file.content["images"]) for file in train)
    notes = [f"--train-json: {images} images, {objects.total()} objects of {len(names)} classes: {list_names(names)}"]
    if lacking := [name for name in names if not objects[name]]:
        notes.append(f"no object for training is of {list_names(lacking)}: they count as classes all the same")
    return notes


def _set_classes(cfg: CfgNode, names: Sequence[str], given: Sequence[str]) -> list[str]:
    """Sets the number of classes of the model, and of Detectron2's other heads for objects."""
    things = read_needs(cfg, train=False).things
    notes = []
    for key in dict.fromkeys(
        [*([things[0]] if things else []), "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"]
    ):
        number = value_of(cfg, key)
        if key in given and number != len(names):
            raise ValueError(
                f"{key} is {number} on the command line, but the data have {len(names)} classes "
                f"({list_names(names)}): leave it out, it follows from the data"
            )
        if things and key == things[0] and number != len(names):
            notes.append(f"{key} goes from {number} to {len(names)}")
        cfg.merge_from_list([key, len(names)])
    cfg.DATASETS.CLASS_NAMES = list(names)
    return notes


def _set_keypoints(cfg: CfgNode, files: Sequence[OwnFile], evaluates: bool, given: Sequence[str]) -> list[str]:
    keypoints = read_keypoints(files)
    key, number = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", len(keypoints.names)
    if key in given and value_of(cfg, key) != number:
        raise ValueError(f"{key} is {value_of(cfg, key)} on the command line, but the data have {number} keypoints")
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = number
    cfg.DATASETS.KEYPOINT_NAMES = list(keypoints.names)
    cfg.DATASETS.KEYPOINT_FLIP_MAP = [list(pair) for pair in keypoints.flip_map]
    if keypoints.sigmas and "TEST.KEYPOINT_OKS_SIGMAS" not in given:
        cfg.TEST.KEYPOINT_OKS_SIGMAS = list(keypoints.sigmas)
    if evaluates:
        check_sigmas(keypoints, cfg.TEST.KEYPOINT_OKS_SIGMAS)
    pairs = ", ".join(f"{show(left)} and {show(right)}" for left, right in keypoints.flip_map)
    return [f"{number} keypoints: {list_names(keypoints.names)}; in a mirror change places: {pairs or 'none'}"]


def _set_data_sets(
    cfg: CfgNode, train: Sequence[OwnFile], test: Sequence[OwnFile], names: Sequence[str], eval_only: bool
) -> None:
    def entry(file: OwnFile) -> list[str]:
        return [data_set_name(file.json_file, file.image_root, names), file.json_file, file.image_root]

    own: dict[str, list[Any]] = {entry[0]: list(entry) for entry in cfg.DATASETS.OWN}
    for part, files in (("TRAIN", train), ("TEST", test)):
        if files or train:
            entries = [entry(file) for file in files]
            own |= {name: [name, *paths] for name, *paths in entries}
            cfg.DATASETS[part] = tuple(dict.fromkeys(name for name, *_ in entries))
    if eval_only and not train and not set(cfg.DATASETS.TRAIN) <= own.keys():
        cfg.DATASETS.TRAIN = ()  # it says how classes are called, and those of the data are the model's
    used = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    cfg.DATASETS.OWN = [own[name] for name in own if name in used]

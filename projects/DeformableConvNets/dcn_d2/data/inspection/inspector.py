# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Inspects data sets: all of what a training would refuse, and what it takes without a word."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..checks import check_data_sets, check_names, evaluator_of, without_garbage_collection
from ..coco_json import read_json
from ..findings import Findings
from ..needs import Needs, read_needs
from ..own.registration import OwnDataSet, register_data_set
from ..proposals import check_proposals
from . import statistics
from .categories import compare_categories, count_objects, inspect_categories
from .columns import Columns
from .fit import inspect_fit
from .loading import load
from .objects import inspect_objects, inspect_polygons
from .picture import draw_samples
from .pixels import WHOLE, HowToRead, compare_images, inspect_images, look_at_all
from .report import Report

logger = logging.getLogger(__name__)
_numbers = itertools.count()
Pair = tuple[str | os.PathLike[str], str | os.PathLike[str]]  # a file in COCO's format, and the folder of its images


class _Trained(NamedTuple):
    """What is remembered of the data for training, to compare tests with: no pixels and no annotations."""

    names: list[str]  # of data sets that could be loaded
    images: dict[bytes, str]
    objects: dict[str, int]


def check(
    json: str | os.PathLike[str],
    images: str | os.PathLike[str] = "",
    test_json: str | os.PathLike[str] | None = None,
    test_images: str | os.PathLike[str] = "",
    *,
    cfg: CfgNode | None = None,
    quick: bool = False,
    workers: int | None = None,
    processes: bool = False,
    progress: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> Report:
    """Reads data in COCO's format and says what is wrong with it. Nothing is trained and no data are changed.

    Args:
        json: the file with annotations for training.
        images: the folder that its file names are in.
        test_json: the same for tests; None if there are none.
        test_images: the folder of its images.
        cfg: a config of the model that is to be trained: whether it reads masks or keypoints, its number of classes,
            its anchors and how it resizes images. Its DATASETS are not looked at. Without it, what depends on a model
            is left out.
        quick: read only the headers of images. Damaged and identical images are not found then.
        workers: how many images are read at a time; the number of cores if None.
        processes: read them by processes, not by threads; a script that asks for it needs an
            ``if __name__ == "__main__"``.
        progress: show how far it is.
        output: a folder for report.txt, report.json and a picture of samples; None writes nothing.

    Returns:
        `report.ok` is False if there are errors: what a training would stop at, or do wrong.

    Example:
        >>> report = check("train.json", "images")  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    tests = [] if test_json is None else [(test_json, test_images)]
    how = HowToRead.of(quick, workers, processes, progress)
    return check_files([(json, images)], tests, cfg, how, output)


def check_files(
    train: Sequence[Pair],
    test: Sequence[Pair] = (),
    cfg: CfgNode | None = None,
    how: HowToRead = WHOLE,
    output: str | os.PathLike[str] | None = None,
    classes_from_data: bool = False,
) -> Report:
    """Inspects any number of files in COCO's format, each with the folder of its images.

    Args:
        train: those for training.
        test: those for tests.
        cfg: see `check`.
        how: how images are read.
        output: see `check`.
        classes_from_data: the number of classes of `cfg` will be set from the data, so it is not compared.
    """
    with _registered([*train, *test]) as names:
        sets = [(name, _needs(cfg, train=index < len(train))) for index, name in enumerate(names)]
        if classes_from_data:
            sets = [(name, needs._replace(classes=())) for name, needs in sets]
        return _inspect(sets, cfg, how, output)


def check_config_data(cfg: CfgNode, how: HowToRead = WHOLE, output: str | os.PathLike[str] | None = None) -> Report:
    """Inspects the data sets that DATASETS.TRAIN and DATASETS.TEST of a config name.

    Args:
        cfg: see `check`; its data sets must be registered.
        how: how images are read.
        output: see `check`.
    """
    sets = [(name, _needs(cfg, train=True)) for name in cfg.DATASETS.TRAIN]
    for name in cfg.DATASETS.TEST:
        sets.append((name, _needs(cfg, train=False, evaluator=evaluator_of(name))))
    report = Report()
    for split in ("TRAIN", "TEST"):
        findings = Findings(f"DATASETS.{split}")
        try:
            check_proposals(cfg, split)
        except (OSError, ValueError) as error:
            findings.note(str(error), kind="proposals")
        report.take(findings, f"DATASETS.{split}")
    return _inspect(sets, cfg, how, output, report)


def _needs(cfg: CfgNode | None, train: bool, evaluator: str = "coco") -> Needs:
    if cfg is not None:
        return read_needs(cfg, train, evaluator)
    return Needs(
        train=train,
        evaluator="" if train else evaluator,
        classes=(),
        annotations=True,
        masks=False,
        mask_format="polygon",
        keypoints=0,
        drops_empty=True,
        min_keypoints=0,
    )


@contextmanager
def _registered(pairs: Sequence[Pair]) -> Iterator[list[str]]:
    """Registers files for as long as they are looked at; a file's name is the data set's, as far as it is free.

    A file whose categories are among those of the first file is matched with it by name, as in a training.
    """
    names = []
    classes: list[str] = []
    try:
        for json, images in pairs:
            name = os.fspath(json)
            while name in DatasetCatalog or name in MetadataCatalog.list():
                name = f"{os.fspath(json)} ({next(_numbers)})"
            own = _category_names(os.fspath(json))
            classes = classes or own
            if own and set(own) <= set(classes):
                data_set = OwnDataSet(name, os.fspath(json), os.fspath(images), tuple(classes), (), ())
                register_data_set(data_set)
            else:
                register_coco_instances(name, {}, os.fspath(json), os.fspath(images))
            names.append(name)
        yield names
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _category_names(json: str) -> list[str]:
    """Gives the names of a file's categories by their ids, or [] if they do not name classes; inspection says why."""
    try:
        categories = sorted(read_json(json)["categories"], key=lambda category: category["id"])
        names = [category["name"] for category in categories]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return names if len(set(map(str, names))) == len(names) and all(isinstance(name, str) for name in names) else []


def _inspect(
    sets: Sequence[tuple[str, Needs]],
    cfg: CfgNode | None,
    how: HowToRead,
    output: str | os.PathLike[str] | None,
    report: Report | None = None,
) -> Report:
    report = report or Report()
    trained = _Trained([], {}, {})
    folder = Path(output) if output is not None else None
    for name, needs in sets:
        findings = Findings(f"data set {name}")
        try:
            check_data_sets([name])
        except (OSError, ValueError) as error:
            findings.note(str(error), kind="not-there")
        else:
            with without_garbage_collection():
                _inspect_one(name, needs, cfg, how, folder, trained, findings, report)
        report.take(findings, name)
    if folder:
        report.write(folder)
    return report


def _inspect_one(
    name: str,
    needs: Needs,
    cfg: CfgNode | None,
    how: HowToRead,
    folder: Path | None,
    trained: _Trained,
    findings: Findings,
    report: Report,
) -> None:
    """Inspects one data set, and adds to `trained` if it is for training."""
    loaded = load(name, needs, findings)
    if loaded is None:
        return
    metadata = MetadataCatalog.get(name)
    check_names(metadata, needs, trained.names[0] if trained.names else "", findings)
    records, content = loaded
    logger.info(f"{findings.subject}: {len(records)} images are read")
    looks = look_at_all(records, how)
    inspect_images(records, looks, how.quick, findings)
    columns = Columns(records, needs, findings)
    names = metadata.get("thing_classes", None) or ()
    counts = count_objects(columns, names)
    inspect_categories(counts, names, content["categories"] if content else None, needs.train, findings)
    inspect_objects(columns)
    if content and content.get("annotations"):
        inspect_polygons(content["annotations"], needs, findings)
    if cfg is not None:
        inspect_fit(columns, cfg, needs.train, findings)
    if needs.train:
        trained.names.append(name)
        trained.images.update(
            {look.digest: str(r["file_name"]) for r, look in zip(records, looks) if look and look.digest}
        )
        for category, count in counts.items():
            trained.objects[category] = trained.objects.get(category, 0) + count
    elif trained.names:
        compare_images(trained.images, records, looks, findings)
        compare_categories(trained.objects, counts, findings)
    report.statistics[name] = statistics.describe(columns, looks, counts, how.quick)
    if folder:
        picture = folder / f"samples-{re.sub(r'[^0-9A-Za-z_.-]+', '_', name)[-100:]}.png"
        if draw_samples(columns, looks, metadata, picture):
            report.pictures.append(str(picture))

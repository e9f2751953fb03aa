# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Each finding of an inspection has data here that have exactly this fault, and is counted right."""

from __future__ import annotations

import copy
import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from dcn_d2.config import load_config
from dcn_d2.data import check, check_data, checks
from dcn_d2.data.inspection import Report, check_config_data, command, pixels
from dcn_d2.data.inspection.columns import Columns
from dcn_d2.data.inspection.fit import read_anchors, resize_factors
from dcn_d2.data.inspection.picture import choose_samples

NAMES = ["ant", "bee", "cat", "dog"]
NAN = float("nan")
SIZE = 80, 60


class World:
    """A set for training (images 1 to 4) and one for tests (5 to 8) in a folder: an object in each image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for number in range(1, 10):
            self.save(number, Image.fromarray(self.noise(number)))
        self.train, self.test = self.coco(1), self.coco(5)

    def noise(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)

    def save(self, number: int, image: Image.Image, suffix: str = "png", **options: Any) -> None:
        image.save(self.path(number, suffix), **options)

    def path(self, number: int, suffix: str = "png") -> Path:
        return self.folder / f"{number}.{suffix}"

    def coco(self, first: int) -> dict[str, Any]:
        numbers = range(first, first + 4)
        return {
            "images": [self.image(number) for number in numbers],
            "annotations": [self.annotation(n, n - first + 1) for n in numbers],
            "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, 1)],
        }

    def image(self, number: int, **change: Any) -> dict[str, Any]:
        return {"id": number, "file_name": f"{number}.png", "width": SIZE[0], "height": SIZE[1]} | change

    def annotation(self, number: int, category: int = 1, **change: Any) -> dict[str, Any]:
        polygon = [10, 10, 30, 10, 30, 40, 10, 40]
        fact = {"bbox": [10, 10, 20, 30], "area": 600, "iscrowd": 0, "segmentation": [polygon]}
        return fact | {"id": number + 10, "image_id": number, "category_id": category} | change

    def add(self, number: int = 1, **change: Any) -> None:
        """Another annotation for training, of an image that has one."""
        self.train["annotations"].append(self.annotation(number, **({"id": 99, "bbox": [40, 10, 20, 30]} | change)))

    def write(self) -> list[Path]:
        paths = [self.folder / "train.json", self.folder / "test.json"]
        for path, content in zip(paths, (self.train, self.test)):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return paths

    def check(self, cfg: CfgNode | None = None, **options: Any) -> Report:
        train, test = self.write()
        return check(train, self.folder, test, self.folder, cfg=cfg, workers=2, **options)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def config(*opts: Any) -> CfgNode:
    cfg = load_config("")
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", len(NAMES), *opts])
    return cfg


MASKS = ("MODEL.MASK_ON", True)


def summary(report: Report) -> set[tuple[str, str, str, int]]:
    """Kind, severity, data set and count of all findings."""
    return {(f.kind, f.severity, Path(f.data_set).stem, f.count) for f in report.findings}


# Faults. Each function breaks the data in one way.


def truncated(world: World) -> None:
    content = world.path(2).read_bytes()
    world.path(2).write_bytes(content[: len(content) // 2])


def two_pages(world: World) -> None:
    image = Image.fromarray(world.noise(2))
    world.save(2, image, "tif", save_all=True, append_images=[image])
    world.train["images"][1]["file_name"] = "2.tif"


def floats(world: World) -> None:
    world.save(2, Image.fromarray(world.noise(2)[..., 0].astype(np.float32)), "tif")
    world.train["images"][1]["file_name"] = "2.tif"


def rotated(world: World, **size: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    world.save(2, Image.fromarray(world.noise(2)), "jpg", exif=exif)
    world.train["images"][1] |= {"file_name": "2.jpg", **size}


def in_mode(mode: str, suffix: str = "png") -> Callable[[World], None]:
    def convert(world: World) -> None:
        world.save(2, Image.fromarray(world.noise(2)).convert(mode), suffix)
        world.train["images"][1]["file_name"] = f"2.{suffix}"

    return convert


def sixteen_bits(world: World) -> None:
    cv2.imwrite(str(world.path(2)), world.noise(2).astype(np.uint16) * 256)


def copied(source: int, to: int) -> Callable[[World], None]:
    return lambda world: shutil.copy(world.path(source), world.path(to)) and None


def with_gap(world: World) -> None:
    for content in (world.train, world.test):
        content["categories"][3]["id"] = content["annotations"][3]["category_id"] = 7


def with_categories(*sets: str, objects: bool = False) -> Callable[[World], None]:
    def add(world: World) -> None:
        for name in sets:
            getattr(world, name)["categories"].append({"id": 5, "name": "eel"})
        if objects:
            world.test["annotations"].append(world.annotation(5, 5, id=99))

    return add


def same_names(world: World) -> None:
    for content in (world.train, world.test):
        content["categories"][3]["name"] = "ant"


def change(key: str, value: Any, what: str = "annotations", of: str = "train") -> Callable[[World], None]:
    return lambda world: getattr(world, of)[what][1].update({key: value})


def add(**fields: Any) -> Callable[[World], None]:
    return lambda world: world.add(**fields)


def with_keypoints(odd: list[int]) -> Callable[[World], None]:
    def change(world: World) -> None:
        for annotation in world.train["annotations"]:
            annotation["keypoints"] = [12, 13, 2, 20, 30, 1]
        world.train["annotations"][1]["keypoints"] = odd

    return change


ERROR, WARNING, INFORMATION = "error", "warning", "information"
RUNS = {"size": [5, 5], "counts": "02c0"}

# name of the test, how the data are broken, and the findings: kind, severity, data set, count.
FAULTS: list[tuple[str, Callable[[World], Any], set[tuple[str, str, str, int]]]] = [
    ("missing", lambda w: w.path(2).unlink(), {("image-missing", ERROR, "train", 1)}),
    ("no image", lambda w: w.path(2).write_text("text"), {("image-unreadable", ERROR, "train", 1)}),
    ("pages", two_pages, {("image-refused", ERROR, "train", 1)}),
    ("floats", floats, {("image-refused", ERROR, "train", 1)}),
    ("size", change("width", 90, "images"), {("image-size", ERROR, "train", 1)}),
    ("before rotation", rotated, {("image-size-before-rotation", ERROR, "train", 1)}),
    ("rotated", lambda w: rotated(w, width=60, height=80), {("image-rotated", INFORMATION, "train", 1)}),
    ("16 bits", sixteen_bits, {("image-16-bit", WARNING, "train", 1)}),
    ("CMYK", in_mode("CMYK", "jpg"), {("image-cmyk", INFORMATION, "train", 1)}),
    ("palette", in_mode("P"), {("image-palette", INFORMATION, "train", 1)}),
    ("alpha", in_mode("RGBA"), {("image-alpha", INFORMATION, "train", 1)}),
    ("grey", in_mode("L"), {("image-grey", INFORMATION, "train", 1)}),
    ("named twice", change("file_name", "1.png", "images"), {("image-duplicate-file", WARNING, "train", 1)}),
    ("the same", copied(1, 2), {("image-identical", WARNING, "train", 1)}),
    ("leak", copied(1, 5), {("image-in-train-and-test", WARNING, "test", 1)}),
    ("empty", lambda w: w.train["images"].append(w.image(9)), {("image-without-annotations", INFORMATION, "train", 1)}),
    (
        "image ids",
        lambda w: w.train["images"].append(w.image(9, id=1)),
        {("image-duplicate-id", ERROR, "train", 2)},
    ),
    ("annotation ids", add(id=11), {("annotation-duplicate-id", ERROR, "train", 2)}),
    ("unknown image", add(image_id=77), {("annotation-of-unknown-image", WARNING, "train", 1)}),
    ("unknown category", add(category_id=77), {("annotation-of-unknown-category", ERROR, "train", 1)}),
    ("no category", add(category_id=None), {("annotation-without-category", ERROR, "train", 1)}),
    ("no dict", lambda w: w.train["annotations"].append(7), {("entry-not-dict", ERROR, "train", 1)}),
    ("ignore", add(ignore=1), {("annotation-ignore", ERROR, "train", 1)}),
    ("gap", with_gap, {("category-gap", INFORMATION, "train", 1), ("category-gap", INFORMATION, "test", 1)}),
    (
        "names",
        same_names,
        {("category-duplicate-name", WARNING, "train", 2), ("category-duplicate-name", WARNING, "test", 2)},
    ),
    ("negative", add(bbox=[50, 50, -5, 5]), {("box-negative", WARNING, "train", 1)}),
    ("flat", add(bbox=[50, 50, 0, 5]), {("box-flat", WARNING, "train", 1)}),
    ("outside", add(bbox=[90, 10, 5, 5], segmentation=None), {("box-outside", WARNING, "train", 1)}),
    ("over", add(bbox=[70, 10, 20, 30], segmentation=None), {("box-over-edge", WARNING, "train", 1)}),
    ("no box", lambda w: w.train["annotations"][1].pop("bbox"), {("box-missing", ERROR, "train", 1)}),
    ("null box", add(bbox=None), {("box-empty", ERROR, "train", 1)}),
    ("empty box", add(bbox=[]), {("box-empty", ERROR, "train", 1)}),
    ("NaN", add(bbox=[1, 2, NAN, 4]), {("box-not-finite", ERROR, "train", 1)}),
    ("twice", add(bbox=[10, 10, 20, 30]), {("box-twice", WARNING, "train", 1)}),
    ("crowd", add(iscrowd=1), {("crowd", INFORMATION, "train", 1)}),
    ("two points", add(segmentation=[[40, 10, 60, 40]]), {("mask-few-points", WARNING, "train", 1)}),
    ("odd polygon", add(segmentation=[[40, 10, 60, 40, 40, 40, 5]]), {("mask-few-points", WARNING, "train", 1)}),
    ("mask elsewhere", change("bbox", [40, 10, 20, 30]), {("mask-outside-box", WARNING, "train", 1)}),
    ("run lengths", change("segmentation", RUNS), {("mask-size", WARNING, "train", 1)}),
    ("no mask", change("segmentation", []), {("mask-missing", INFORMATION, "train", 1)}),
    ("number of keypoints", with_keypoints([1, 2, 2]), {("keypoints-number", WARNING, "train", 1)}),
    ("visibility", with_keypoints([1, 2, 2, 3, 4, 5]), {("keypoints-visibility", WARNING, "train", 1)}),
    ("no area", lambda w: w.test["annotations"][1].pop("area"), {("annotation-without-area", ERROR, "test", 1)}),
    ("id 0", change("id", 0, of="test"), {("annotation-id-0", WARNING, "test", 1)}),
    ("no images", lambda w: w.train["images"].clear(), {("no-images", ERROR, "train", 1)}),
    ("no JSON", lambda w: setattr(w, "train", "{"), {("not-loaded", ERROR, "train", 1)}),
]
# Those of masks in an annotation that was added without one of its own are told as well.
MASK_KINDS = {"mask-outside-box", "mask-missing"}


@pytest.mark.parametrize(("broken", "expected"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_found_and_counted(world: World, broken: Callable, expected: set) -> None:
    broken(world)
    found = summary(world.check())
    wanted = {kind for kind, *_ in expected}
    assert {entry for entry in found if entry[0] in wanted or entry[0] not in MASK_KINDS} == expected
    assert all(kind in wanted or kind in MASK_KINDS for kind, *_ in found)


@pytest.mark.parametrize("broken", [fault[1] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
@pytest.mark.parametrize("opts", [(), (*MASKS, "INPUT.MASK_FORMAT", "bitmask")], ids=["boxes", "masks"])
def test_an_error_is_what_a_training_refuses(
    world: World, registered: list[str], broken: Callable, opts: tuple
) -> None:
    broken(world)
    cfg = config("DATASETS.TRAIN", (registered[0],), "DATASETS.TEST", (registered[1],), *opts)
    world.write()
    refused = ""
    try:
        check_data(cfg, train=True)
    except (ValueError, OSError) as error:
        refused = str(error)
    report = check_config_data(cfg)
    assert report.ok == (not refused), f"{refused}\n{report}"


@pytest.fixture
def registered(world: World) -> Iterator[list[str]]:
    names = ["inspected_train", "inspected_test"]
    for name, path in zip(names, world.write()):
        register_coco_instances(name, {}, str(path), str(world.folder))
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    checks._checked.clear()


# Good data


def test_good_data_give_no_finding(world: World) -> None:
    for cfg in (None, config(), config(*MASKS)):
        report = world.check(cfg)
        assert report.findings == [] and report.ok
    assert "nothing found" in str(report)


def test_the_nuclei_give_no_finding(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    cfg = load_config(str(project / "examples" / "nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"))
    report = check_config_data(cfg)
    assert report.findings == []
    numbers = report.statistics["nuclei_train"]
    assert numbers["images"] == 28 and numbers["annotations"] == 251
    assert numbers["objects of categories"] == {"nucleus": 251} and numbers["image modes"] == {"L": 28}
    sizes = numbers["box sizes (COCO)"]
    assert sum(sizes.values()) == 251 and sizes["large"] == 0


def test_data_are_left_as_they_are(world: World) -> None:
    before = sorted(DatasetCatalog), sorted(MetadataCatalog)
    world.check()
    files = {path: path.read_bytes() for path in world.folder.iterdir()}
    world.check(config())
    assert {path: path.read_bytes() for path in world.folder.iterdir()} == files
    assert (sorted(DatasetCatalog), sorted(MetadataCatalog)) == before


# What is found only by reading pixels, and what depends on the config


def test_a_truncated_image_is_found_by_reading_it_and_not_by_its_header(world: World) -> None:
    truncated(world)
    report = world.check()
    assert summary(report) == {("image-unreadable", ERROR, "train", 1)}
    (finding,) = report.findings
    assert "2.png: cannot be read" in finding.examples[0] and "truncated" in finding.examples[0]
    assert world.check(quick=True).findings == []


def test_identical_images_are_not_looked_for_in_the_quick_mode(world: World) -> None:
    copied(1, 5)(world)
    report = world.check(quick=True)
    assert report.findings == []
    assert all(numbers["images read"] == "headers only" for numbers in report.statistics.values())


def test_grey_of_16_bits(world: World) -> None:
    world.save(2, Image.fromarray(world.noise(2)[..., 0].astype(np.uint16) * 256))
    found = summary(world.check())
    assert found == {("image-16-bit", WARNING, "train", 1), ("image-grey", INFORMATION, "train", 1)}


def test_processes_see_what_threads_see(world: World) -> None:
    copied(1, 2)(world)
    records = [{"file_name": str(world.path(n)), "width": 80, "height": 60} for n in (1, 2, 3, 99)]
    threads = pixels.look_at_all(records, pixels.HowToRead(workers=2))
    assert pixels.look_at_all(records, pixels.HowToRead(workers=2, processes=True)) == threads
    assert threads[0].digest == threads[1].digest != threads[2].digest
    assert threads[3].fault.kind == "image-missing"


def test_images_of_other_machines_are_told_and_not_asked_for(world: World) -> None:
    world.train["images"][1]["file_name"] = "https://example.com/2.png"
    world.write()
    report = check(world.folder / "train.json")
    told = {f.kind: f.count for f in report.findings if f.severity != ERROR}
    assert told["image-address"] == 1


@pytest.mark.parametrize(
    ("opts", "broken", "expected"),
    [
        (("INPUT.MIN_SIZE_TRAIN", (60,)), add(bbox=[50, 10, 20, 3]), ("box-tiny", WARNING, "train", 1)),
        ((), add(bbox=[2, 50, 76, 2]), ("box-without-anchor", WARNING, "train", 1)),
        (("TEST.DETECTIONS_PER_IMAGE", 1), add(bbox=[40, 10, 20, 30]), ("many-objects", WARNING, "train", 1)),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 3), add(), ("classes", ERROR, "train", 1)),
        (MASKS, change("segmentation", []), ("mask-missing", ERROR, "train", 1)),
        (MASKS, change("segmentation", RUNS), ("mask-size", ERROR, "train", 1)),
        (MASKS, change("segmentation", [[1, 2, 3, 4]], of="test"), ("mask-few-points", ERROR, "test", 1)),
        (("MODEL.KEYPOINT_ON", True), add(), ("keypoints-missing", ERROR, "train", 5)),
    ],
)
def test_what_depends_on_the_model(world: World, opts: tuple, broken: Callable, expected: tuple) -> None:
    broken(world)
    assert expected in summary(world.check(config(*opts)))
    kind = expected[0]
    without = {entry for entry in summary(world.check()) if entry[0] == kind}
    assert expected not in without  # without a config it is not told, or is no error


def test_categories_without_objects_and_those_that_only_the_test_has(world: World) -> None:
    with_categories("train", "test")(world)
    found = summary(world.check())
    assert found == {
        ("category-without-objects", WARNING, "train", 1),
        ("category-without-objects", INFORMATION, "test", 1),
    }
    world.test["annotations"].append(world.annotation(5, 5, id=99, bbox=[40, 10, 20, 30], segmentation=[]))
    found = summary(world.check())
    assert ("category-only-in-test", WARNING, "test", 1) in found


def test_categories_in_another_order_are_matched_by_name_as_in_training(world: World) -> None:
    before = world.check()
    renumber = {n: len(NAMES) + 1 - n for n in range(1, len(NAMES) + 1)}
    world.test["categories"] = [{"id": renumber[n], "name": name} for n, name in enumerate(NAMES, 1)]
    for annotation in world.test["annotations"]:
        annotation["category_id"] = renumber[annotation["category_id"]]
    after = world.check()
    assert summary(after) == summary(before)
    assert after.statistics.keys() == before.statistics.keys()
    assert list(map(str, after.statistics.values())) == list(map(str, before.statistics.values()))


def test_one_fault_does_not_hide_another(world: World) -> None:
    world.path(2).unlink()
    world.add(category_id=77)
    world.add(id=98, bbox=[50, 50, 0, 5], segmentation=[])
    world.train["images"].append(world.image(9, id=None))
    kinds = {(finding.kind, finding.count) for finding in world.check().select(ERROR) + world.check().select(WARNING)}
    wanted = {("annotation-of-unknown-category", 1), ("image-missing", 1), ("box-flat", 1), ("image-without-id", 1)}
    assert wanted <= kinds


def test_numbers_that_can_be_checked_by_hand(world: World) -> None:
    world.add(bbox=[0, 0, 10, 40], segmentation=[])
    world.add(id=98, iscrowd=1)
    numbers = world.check().statistics[str(world.folder / "train.json")]
    assert (numbers["images"], numbers["annotations"], numbers["crowds"], numbers["categories"]) == (4, 6, 1, 4)
    assert numbers["objects of categories"] == {"ant": 2, "bee": 1, "cat": 1, "dog": 1}
    assert numbers["box sizes (COCO)"] == {"small": 5, "medium": 0, "large": 0}
    assert numbers["boxes per image"]["max"] == 2 and numbers["boxes per image"]["min"] == 1
    assert numbers["box width"]["min"] == 10 and numbers["box height / width"]["max"] == 4
    assert numbers["image width"] == dict.fromkeys(numbers["image width"], 80)


def test_resizing_and_anchors_are_those_of_the_config() -> None:
    cfg = config("INPUT.MIN_SIZE_TRAIN", (60, 120), "INPUT.MAX_SIZE_TRAIN", 100, "INPUT.MIN_SIZE_TEST", 0)
    sizes = np.array([[80.0, 60.0], [60.0, 30.0]])
    np.testing.assert_allclose(resize_factors(cfg, sizes, True), [[1, 100 / 60], [1.25, 100 / 60]])
    np.testing.assert_allclose(resize_factors(cfg, sizes, False), [[1, 1]])
    anchors, threshold = read_anchors(config("MODEL.ANCHOR_GENERATOR.SIZES", [[8, 32]]))
    assert threshold == 0.3 and len(anchors) == 6
    np.testing.assert_allclose(sorted(np.sqrt(anchors.prod(1))), [8, 8, 8, 32, 32, 32], rtol=1e-5)
    assert read_anchors(config("MODEL.META_ARCHITECTURE", "RetinaNet"))[1] == 0.4
    assert read_anchors(config("MODEL.META_ARCHITECTURE", "FCOS")) is None


# Other data than COCO's format


def test_data_of_a_function_of_ones_own_are_inspected_too(world: World, registered: list[str]) -> None:
    fact = {"bbox": [10, 10, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    records = [
        {"file_name": str(world.path(n)), "image_id": n, "width": 80, "height": 60, "annotations": [dict(fact)]}
        for n in (1, 2, 3)
    ]
    records[0]["annotations"].append(fact | {"bbox": [10, 10, 5, 40]})
    records[1]["image_id"] = 3
    world.path(3).unlink()
    DatasetCatalog.register("own_function", lambda: copy.deepcopy(records))
    MetadataCatalog.get("own_function").set(thing_classes=["ant"])
    try:
        cfg = config("DATASETS.TEST", ("own_function",), "MODEL.ROI_HEADS.NUM_CLASSES", 1)
        cfg.DATASETS.TRAIN = ()
        report = check_config_data(cfg)
        kinds = {(f.kind, f.count) for f in report.findings}
        assert ("box-negative", 1) in kinds and not report.ok or report.select(WARNING)
        cfg = config("DATASETS.TRAIN", ("own_function",), "MODEL.ROI_HEADS.NUM_CLASSES", 1)
        found = {(f.kind, f.severity, f.count) for f in check_config_data(cfg).findings}
        assert found == {("box-negative", WARNING, 1), ("image-missing", ERROR, 1)}
    finally:
        DatasetCatalog.remove("own_function")
        MetadataCatalog.remove("own_function")


def test_a_loader_that_fails_is_an_error(registered: list[str]) -> None:
    def fail() -> list:
        raise RuntimeError("no disk")

    DatasetCatalog["inspected_train"] = fail
    report = check_config_data(config("DATASETS.TRAIN", (registered[0],)))
    assert [finding.kind for finding in report.findings] == ["not-loaded"]
    assert "RuntimeError: no disk" in str(report)


# What is written


def test_the_report_and_the_picture_are_written(world: World, tmp_path: Path) -> None:
    world.path(2).unlink()
    output = tmp_path / "report"
    report = world.check(config(), output=output)
    assert (output / "report.txt").read_text() == f"{report}\n"
    content = json.loads((output / "report.json").read_text())
    assert content["ok"] is False and content["findings"][0]["kind"] == "image-missing"
    assert len(report.pictures) == 2
    for path in report.pictures:
        picture = np.asarray(Image.open(path))
        assert picture.shape[2] == 3 and picture.std() > 20


def test_names_of_categories_with_dollar_signs_were_drawn_as_formulas(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (world.train, world.test):
        for category in data["categories"]:
            category["name"] = rf"$\{category['name']}$"
    with caplog.at_level("INFO", logger="dcn_d2"):
        report = world.check(output=tmp_path / "report")
    assert len(report.pictures) == 2
    assert "is not in the picture" not in caplog.text


def test_the_text_names_kind_count_places_and_the_way_out(world: World) -> None:
    world.path(2).unlink()
    world.add(bbox=[50, 50, 0, 5])
    text = str(world.check())
    assert "error       " in text and f"1 of 4 images do not exist: {world.path(2)}" in text
    assert "1 of 5 annotations have a 'bbox' of no width or height" in text
    assert text.index("error  ") < text.index("warning  ")


def test_samples_show_variety(world: World) -> None:
    for index in range(3):
        world.add(4, id=200 + index, bbox=[index * 5, 0, 10, 10])
    world.add(3, id=300, bbox=[0, 0, 70, 50])
    world.train["images"].append(world.image(9))
    records = [
        {"file_name": str(world.path(i["id"])), "width": 80, "height": 60}
        | {
            "annotations": [
                a | {"bbox_mode": BoxMode.XYWH_ABS, "category_id": a["category_id"] - 1}
                for a in world.train["annotations"]
                if a["image_id"] == i["id"]
            ]
        }
        for i in world.train["images"]
    ]
    looks = pixels.look_at_all(records, pixels.HowToRead())
    columns = Columns(records, None, None)  # type: ignore[arg-type]
    chosen = choose_samples(columns, looks, NAMES)
    assert chosen[3] == "most boxes: 4" and chosen[2] == "largest box" and chosen[4] == "no objects"
    assert {chosen[0], chosen[1]} == {"ant", "bee"} or chosen[1] == "bee"
    assert len(choose_samples(columns, looks, NAMES, number=2)) == 2


def command_line(*opts: Any) -> tuple[Namespace, CfgNode]:
    args = Namespace(quick=False, check_workers=1, check_processes=False, config_file="some.yaml", opts=[])
    return args, config(*opts)


def test_the_command_says_by_its_exit_code_whether_there_are_errors(
    world: World, registered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    opts = ("DATASETS.TRAIN", (registered[0],), "DATASETS.TEST", (registered[1],), "OUTPUT_DIR", str(output))
    assert command.run_check_data(*command_line(*opts)) == 0
    assert sorted(path.name for path in output.iterdir()) == ["data-check"]  # a run's files are left alone
    world.path(2).unlink()
    assert command.run_check_data(*command_line(*opts)) == 1
    assert "image-missing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="name no data set"):
        command.run_check_data(*command_line("DATASETS.TRAIN", (), "DATASETS.TEST", ()))


def test_files_of_the_command_line_come_before_the_config(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train, test = world.write()
    args, cfg = command_line("MODEL.ROI_HEADS.NUM_CLASSES", 80, "OUTPUT_DIR", str(tmp_path / "out"))
    args.train_json, args.train_images = [str(train), str(test)], [str(world.folder)]
    args.test_json = args.test_images = []
    assert command.run_check_data(args, cfg) == 0  # the number of classes will come from the files
    said = capsys.readouterr().out
    assert f"data set {train}" in said and f"data set {test}" in said and "nothing found" in said
    args.test_json, args.test_images = [str(test)], [str(world.folder)]
    assert command.run_check_data(args, cfg) == 0
    assert "4 of 4 images of this test set are also in the data for training" in capsys.readouterr().out


def test_data_sets_that_are_not_there_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = check_config_data(config("DATASETS.TRAIN", ("coco_2017_train", "no_such_set")))
    assert [(f.kind, f.data_set) for f in report.findings] == [
        ("not-there", "coco_2017_train"),
        ("not-there", "no_such_set"),
    ]

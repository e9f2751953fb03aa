# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The embedded data set: its splits, its annotations, its cache, and Detectron2's COCO evaluation on it."""

from __future__ import annotations

import concurrent.futures
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.file_io import PathManager

from dcn_d2.data import nuclei, register_nuclei

SPLITS = ("train", "val")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps the tests out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    return tmp_path


def source(name: str) -> np.ndarray:
    return cv2.imread(str(nuclei.SOURCE_DIR / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def corner(sample: dict) -> tuple[int, int]:
    """The (top, left) of a tile in the source image."""
    top, left = Path(sample["file_name"]).stem.split("_")
    return int(top[1:]), int(left[1:])


def window(sample: dict) -> tuple[slice, slice]:
    top, left = corner(sample)
    return np.s_[top : top + sample["height"] // nuclei.SCALE, left : left + sample["width"] // nuclei.SCALE]


def instances(sample: dict) -> Instances:
    """The ground truth of a tile in the form of a model's output."""
    annotations = sample["annotations"]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    size = sample["height"], sample["width"]
    masks = BitMasks.from_polygon_masks(PolygonMasks([a["segmentation"] for a in annotations]), *size)
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes)),
        pred_masks=masks.tensor,
        scores=torch.ones(len(boxes)),
        pred_classes=torch.tensor([a["category_id"] for a in annotations]),
    )


def test_source_is_the_published_pair() -> None:
    image, labels = source("image"), source("labels")
    assert image.shape == labels.shape == (512, 512)
    assert image.dtype == labels.dtype == np.uint8
    assert len(np.unique(labels)) == 125 + 1


@pytest.mark.parametrize(("split", "tiles", "objects"), [("train", 28, 251), ("val", 4, 42)])
def test_counts(split: str, tiles: int, objects: int) -> None:
    samples = DatasetCatalog.get(f"nuclei_{split}")
    assert len(samples) == tiles
    assert sum(len(sample["annotations"]) for sample in samples) == objects
    assert MetadataCatalog.get(f"nuclei_{split}").thing_classes == ["nucleus"]


def test_splits_share_no_column_and_cover_theirs() -> None:
    seen = {split: np.zeros((512, 512), int) for split in SPLITS}
    for split in SPLITS:
        for sample in DatasetCatalog.get(f"nuclei_{split}"):
            seen[split][window(sample)] += 1
    assert (seen["train"][:, :320] >= 1).all()
    assert (seen["train"][:, 320:] == 0).all()
    assert (seen["val"][:, :320] == 0).all()
    assert (seen["val"][:, 320:] == 1).all()


@pytest.mark.parametrize("split", SPLITS)
def test_tiles_are_the_enlarged_source(split: str) -> None:
    for sample in DatasetCatalog.get(f"nuclei_{split}"):
        tile = cv2.imread(sample["file_name"], cv2.IMREAD_GRAYSCALE)
        assert tile.shape == (sample["height"], sample["width"])
        original = source("image")[window(sample)]
        small = cv2.resize(tile, original.shape[::-1], interpolation=cv2.INTER_AREA)
        difference = [np.abs(np.roll(small, shift, 1).astype(int) - original).mean() for shift in (0, -1, 1)]
        assert difference[0] < 1.5, "not the same pixels"
        assert 2 * difference[0] < min(difference[1:]), "moved by a pixel"


@pytest.mark.parametrize("split", SPLITS)
def test_annotations_match_the_labels(split: str) -> None:
    labels = source("labels")
    areas = np.bincount(labels.ravel())
    for sample in DatasetCatalog.get(f"nuclei_{split}"):
        tile = labels[window(sample)]
        values, visible = np.unique(tile[tile > 0], return_counts=True)
        kept = [v for v, count in zip(values, visible, strict=True) if count >= nuclei.MIN_VISIBLE * areas[v]]
        assert len(sample["annotations"]) == len(kept)
        truth = instances(sample)
        for value, annotation, box, mask in zip(
            kept, sample["annotations"], truth.pred_boxes.tensor.tolist(), truth.pred_masks.numpy(), strict=True
        ):
            enlarged = np.kron(tile == value, np.ones((nuclei.SCALE, nuclei.SCALE), bool))
            rows, columns = np.flatnonzero(enlarged.any(1)), np.flatnonzero(enlarged.any(0))
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert 0 <= box[0] < box[2] <= sample["width"]
            assert 0 <= box[1] < box[3] <= sample["height"]
            assert annotation["iscrowd"] == 0
            # The polygon cuts the corners of the enlarged pixels, which weighs more the smaller the nucleus.
            union = (enlarged | mask).sum()
            assert (enlarged ^ mask).sum() <= 0.5 * (rows.size + columns.size) * nuclei.SCALE
            assert (enlarged & mask).sum() / union > 0.8


def test_mask_of_a_square_is_its_pixels_without_corners() -> None:
    visible = np.zeros((6, 8), bool)
    visible[1:4, 2:6] = True
    shape = nuclei._shape(visible)
    assert shape["bbox"] == [4, 2, 8, 6]
    assert shape["area"] == 12 * nuclei.SCALE**2
    (polygon,) = shape["segmentation"]
    points = np.array(polygon).reshape(-1, 2)
    assert points.min(0).tolist() == [4, 2]
    assert points.max(0).tolist() == [12, 8]
    # Each corner loses a triangle with legs of half a pixel, enlarged.
    loss = 4 * 0.5 * (0.5 * nuclei.SCALE) ** 2
    assert cv2.contourArea(points.astype(np.float32)) == pytest.approx(shape["area"] - loss)


def test_evaluator_works_before_loading_and_gives_100_for_the_truth(tmp_path: Path) -> None:
    evaluator = COCOEvaluator("nuclei_val", ("bbox", "segm"), distributed=False, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for sample in DatasetCatalog.get("nuclei_val"):
        evaluator.process([sample], [{"instances": instances(sample)}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_registering_writes_nothing_and_twice_changes_nothing(cache: Path) -> None:
    before = {name for name in DatasetCatalog.list() if name.startswith("nuclei_")}
    register_nuclei()
    register_nuclei()
    assert {name for name in DatasetCatalog.list() if name.startswith("nuclei_")} == before
    assert before == {"nuclei_train", "nuclei_val"}
    assert not list(cache.iterdir())
    assert len(DatasetCatalog.get("nuclei_val")) == 4


@pytest.mark.parametrize("damage", ["delete annotations", "delete tile", "damage tile", "damage manifest"])
def test_a_damaged_cache_is_made_again(damage: str) -> None:
    folder = nuclei.ensure_nuclei()
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if damage.startswith("delete"):
        (folder / ("val.json" if "annotations" in damage else "train/y000_x000.png")).unlink()
    else:
        path = folder / ("manifest.json" if "manifest" in damage else "train/y000_x000.png")
        path.write_bytes(path.read_bytes()[:-9])
    assert nuclei.ensure_nuclei() == folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "left-over files"


def test_a_good_cache_is_left_alone() -> None:
    folder = nuclei.ensure_nuclei()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    nuclei.ensure_nuclei()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_processes_may_make_the_cache_at_the_same_time() -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: nuclei.ensure_nuclei(), range(8)))
    assert len(set(folders)) == 1
    assert nuclei._is_complete(folders[0])
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name], "left-over files"


def test_detectron2_datasets_decides_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = tmp_path / "datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    assert nuclei.ensure_nuclei().parent == tmp_path / "dcn_d2", "a folder that is not there is not made"
    datasets.mkdir()
    assert nuclei.ensure_nuclei().parent == datasets


@pytest.mark.parametrize("name", ["../../victim.json", "train/../../victim.json", "{folder}/victim.json"])
def test_addresses_do_not_lead_out_of_the_cache(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim.json").write_text("{}")
    address = "nuclei://" + name.format(folder=tmp_path)
    for ask in (PathManager.get_local_path, PathManager.open, PathManager.exists, PathManager.isfile):
        with pytest.raises(ValueError, match="is not a file of the data set"):
            ask(address)


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=f"{tmp_path}/file/dcn_d2/nuclei-.* which cannot be done .*XDG_CACHE_HOME"):
        nuclei.ensure_nuclei()


def test_what_a_killed_process_left_is_removed_later(cache: Path) -> None:
    folders = [cache / "dcn_d2" / f".nuclei-0123-{name}" for name in ("old", "new")]
    for folder in folders:
        (folder / "new").mkdir(parents=True)
    os.utime(folders[0], (0, 0))
    nuclei.ensure_nuclei()
    assert [folder.exists() for folder in folders] == [False, True]


def test_unreadable_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("image.png", "labels.png"):
        (broken / name).write_bytes(b"no image")
    monkeypatch.setattr(nuclei, "SOURCE_DIR", broken)
    with pytest.raises(RuntimeError, match=r"image\.png and labels\.png in .*broken"):
        nuclei.ensure_nuclei()
    assert not list((tmp_path / "dcn_d2").iterdir())


def test_path_handler() -> None:
    with PathManager.open("nuclei://val.json") as file:
        assert len(json.load(file)["images"]) == 4
    assert PathManager.exists("nuclei://val.json")
    assert PathManager.isfile("nuclei://train/y000_x000.png")
    assert not PathManager.exists("nuclei://test.json")
    assert os.path.isfile(PathManager.get_local_path("nuclei://train.json"))
    with pytest.raises(ValueError, match="read-only"):
        PathManager.open("nuclei://val.json", "w")

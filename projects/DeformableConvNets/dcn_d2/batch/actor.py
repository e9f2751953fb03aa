# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A detector that takes batches of rows, for Ray Data's `map_batches` and Spark's pandas UDFs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances
from PIL import Image

from .. import model_zoo
from ..engine import DCNPredictor, load_config
from ..export.formats import is_exported
from ..export.predictor import ExportedPredictor
from .columns import COLUMNS, make_columns
from .frames import column_names, find_images, is_series, put_together


class DetectorActor:
    """Finds objects in the images of a batch of rows, and gives the batch with columns of detections.

    It is called with what an engine for large data calls a function with, and answers in the same form:

    - Ray Data, `map_batches`: a dictionary of arrays, a `pandas.DataFrame` or a `pyarrow.Table`;
    - Spark, `mapInPandas`: an iterator of `pandas.DataFrame`;
    - Spark, pandas UDF: a `pandas.Series` of images, or an iterator of them; the answer is a `pandas.DataFrame`.

    The new columns hold lists, with an entry for each detection: "boxes" ([x0, y0, x1, y1] in pixels of the image as it
    was given), "scores", "classes" (numbers from 0), "masks" (COCO's run-length encoding: "size" and "counts"),
    "keypoints". And "height", "width" of the image, and "error": why the image of a row could not be read, else None.

    An image is a path, the bytes of a file, or an array. Paths and bytes are read as in training, arrays are taken as
    they are. A copy in another process reads the weights again, from the same place.

    Args:
        model: a row of the zoo, the path of a config file, a config, or the path of an exported model, which has its
            weights.
        weights: of the model, as MODEL.WEIGHTS. By default the config's; for a row of the zoo, the published ones.
        opts: KEY VALUE pairs that change the config.
        columns: the new columns, in this order. By default all that the model gives.
        image_column: the column with images; by default the first of "image", "bytes" and "path" that the batch has.
        array_order: "RGB" or "BGR", the order of channels in arrays. `ray.data.read_images` gives RGB, OpenCV BGR.
        keep: columns of the batch that stay. By default all, but for images as arrays or bytes.
        score_threshold: leaves out detections with a lower score.
        batch_size: how many images go through the model together; see `DCNPredictor`.
        workers: how many batches run at once on a CPU; see `DCNPredictor`.
        device: as MODEL.DEVICE; by default the config's, which is the GPU if there is one.
        raise_errors: ends the job at an image that cannot be read. By default its row has no detections, and "error"
            says why.
        untrained: as in `DCNPredictor`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | CfgNode,
        weights: str | None = None,
        *,
        opts: Sequence[Any] = (),
        columns: Sequence[str] | None = None,
        image_column: str | None = None,
        array_order: str | None = None,
        keep: Sequence[str] | None = None,
        score_threshold: float = 0.0,
        batch_size: int | None = None,
        workers: int | None = None,
        device: str | None = None,
        raise_errors: bool = False,
        untrained: bool = False,
    ) -> None:
        if array_order not in (None, "RGB", "BGR"):
            raise ValueError(f'array_order is {array_order!r}; it must be "RGB" or "BGR"')
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold is {score_threshold!r}; it must be from 0 to 1")
        self._source: Any
        self._arguments: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
        self._kind: type[DCNPredictor] = DCNPredictor
        self._predictor: DCNPredictor | None = None
        if not isinstance(model, CfgNode) and is_exported(model):
            if weights is not None or untrained or device not in (None, "cpu"):
                raise ValueError(f"{model} is an exported model, on the CPU: leave out weights, device and untrained")
            self._kind, self._source = ExportedPredictor, os.path.abspath(model)
            self._arguments["opts"] = list(opts)
            cfg = self.predictor.cfg
        else:
            cfg = self._source = _config(model, weights, opts, device)
            self._arguments["untrained"] = untrained
        self.columns = _check_columns(columns, cfg)
        if not raise_errors and "error" not in self.columns:
            raise ValueError('columns lacks "error", which says why an image could not be read; or set raise_errors')
        self.image_column, self.array_order, self.keep = image_column, array_order, keep
        self.score_threshold, self.raise_errors = score_threshold, raise_errors
        self.predictor  # noqa: B018  built here, so that what cannot work ends the job before it begins

    @property
    def predictor(self) -> DCNPredictor:
        """What finds the objects. In another process it is built for the device there, when it is first needed."""
        if self._predictor is None:
            self._predictor = self._kind(self._source, **self._arguments)
        return self._predictor

    @property
    def spark_schema(self) -> str:
        """The new columns in Spark's language; for `mapInPandas` put those that stay before it: "path string, "."""
        return ", ".join(f"{name} {COLUMNS[name].ddl}" for name in self.columns)

    def __getstate__(self) -> dict[str, Any]:
        """Without the predictor: the device of another process may be another one."""
        return self.__dict__ | {"_predictor": None}

    def __call__(self, batch: Any) -> Any:
        """Gives a batch with its columns of detections; an iterator of batches for an iterator of batches.

        Raises:
            ImageError, OSError: An image cannot be read, and `raise_errors` asks for it.
            KeyError: The batch has no column with images, or lacks one that should stay, or has one of the new ones.
            TypeError: It is no batch.
            ValueError: Images are arrays, and `array_order` does not say how to read them.
        """
        if isinstance(batch, Iterator):
            return map(self._one_batch, batch)
        return self._one_batch(batch)

    def _one_batch(self, batch: Any) -> Any:
        if is_series(batch):
            return put_together(batch, (), make_columns(self.columns, self._detect(batch)))
        name, images = find_images(batch, self.image_column)
        kept = self.keep if self.keep is not None else _worth_keeping(column_names(batch), name, images)
        for column in kept:
            if column not in column_names(batch):
                raise KeyError(f"keep names a column {column!r}, which the batch does not have")
            if column in self.columns:
                raise KeyError(f"the batch has a column {column!r} already: rename it, or leave it out of keep")
        return put_together(batch, kept, make_columns(self.columns, self._detect(images)))

    def _detect(self, images: Iterable[Any]) -> list[Instances | Exception]:
        found: list[Instances | Exception] = []
        for result in self.predictor.stream(map(self._in_bgr, images), return_errors=not self.raise_errors):
            if isinstance(result, Exception):
                found.append(result)
                continue
            instances = result["instances"].to("cpu")
            found.append(instances[instances.scores >= self.score_threshold])
        return found

    def _in_bgr(self, image: Any) -> Any:
        if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3:
            return image
        if self.array_order is None:
            raise ValueError(
                "images are arrays: say the order of their channels, array_order='RGB' for those of "
                "ray.data.read_images and Pillow, 'BGR' for those of OpenCV"
            )
        return image[:, :, ::-1] if self.array_order == "RGB" else image


def _config(
    model: str | os.PathLike[str] | CfgNode, weights: str | None, opts: Sequence[Any], device: str | None
) -> CfgNode:
    """The config that the arguments of the same names describe."""
    if isinstance(model, CfgNode):
        cfg = model.clone()
        cfg.defrost()
    elif os.fspath(model).removesuffix(".yaml") in model_zoo.list_models():
        cfg = model_zoo.get_config(os.fspath(model), trained=weights is None)
    elif os.path.isfile(model):
        cfg = load_config(os.fspath(model))
    else:
        raise ValueError(f"{os.fspath(model)!r} is neither a file nor a row of the zoo: {model_zoo.list_models()}")
    cfg.merge_from_list(list(opts))
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if device is not None:
        cfg.MODEL.DEVICE = device
    if cfg.MODEL.WEIGHTS and "://" not in cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = os.path.abspath(cfg.MODEL.WEIGHTS)  # workers run in other folders
    return cfg


def _check_columns(columns: Sequence[str] | None, cfg: CfgNode) -> tuple[str, ...]:
    """The new columns; by default all that the model of a config gives."""
    lacking = {"masks": not cfg.MODEL.MASK_ON, "keypoints": not cfg.MODEL.KEYPOINT_ON}
    if columns is None:
        return tuple(name for name in COLUMNS if not lacking.get(name))
    for name in columns:
        if name not in COLUMNS:
            raise ValueError(f"columns names {name!r}; it may name {', '.join(COLUMNS)}")
        if lacking.get(name):
            raise ValueError(f"columns names {name!r}, which the model does not give (MODEL.{name[:-1].upper()}_ON)")
    return tuple(dict.fromkeys(columns))


def _worth_keeping(names: Iterable[str], images_in: str, images: Sequence[Any]) -> list[str]:
    """All columns but the one with images, unless that has paths. Rows without an image do not count."""
    pixels = (bytes, bytearray, memoryview, np.ndarray, Image.Image)
    known = [image for image in images if isinstance(image, (str, os.PathLike, *pixels))]
    has_pixels = any(isinstance(image, pixels) for image in known) if known else images_in == "bytes"
    return [name for name in names if name != images_in or not has_pixels]

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction for one image or many."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import nullcontext
from typing import Any, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeTransform
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from ..checkpoint import DCNCheckpointer
from ..config import check_config
from ..data.images import ImageError, check_input_format, pixels_of
from ..data.own import register_own_data
from ..data.transforms import build_augmentation
from .batching import Inputs, Outputs, Plan, plan_batches, run_in_batches
from .class_names import metadata_of
from .machine import fit_device
from .pickling import WithoutRandomWeights, digest, fingerprint

AnyImage = np.ndarray | Image.Image | str | os.PathLike[str] | bytes


class DCNPredictor(DefaultPredictor):
    """Detectron2's `DefaultPredictor`, which reads and resizes images as dcn_d2's training and evaluation do.

    - Images are resized with the library that INPUT.RESIZE_WITH names; `DefaultPredictor` always takes PIL.
    - INPUT.FORMAT may be any that training knows, also "L" (grey).
    - An input that is not an image is refused.
    - `DCNCheckpointer` reads MODEL.WEIGHTS: as data only. It converts files of MMDetection, and refuses weights that do
      not fit the model, with a list.
    - `class_names` are those that the config (DATASETS.CLASS_NAMES) or the weights say, [] if they say none. `metadata`
      has them too, also where the data are not.
    - Without a GPU it runs on the CPU, as the trainer does.
    - It takes lists of images and runs them in batches.
    - Pickling it keeps the config and the place of the weights, and the copy reads them when it needs the model. A
      model whose weights were changed after loading, or that `untrained` left at initial values, is pickled as a whole.
      Other changes of the model (attributes, hooks) and of `cfg` are not in the copy.

    Args:
        cfg: of the model, as for `DefaultPredictor`.
        batch_size: how many images of one size go through the model together, by default 2.
        workers: how many batches run at once, each with its share of torch's threads. By default on a CPU as many as
            torch has threads, or as few as the memory allows; elsewhere one, in the caller's thread.
        untrained: allows weights that leave heads at their initial values, or no weights. Such a model does not find
            anything useful.
    """

    def __init__(
        self, cfg: CfgNode, *, untrained: bool = False, batch_size: int | None = None, workers: int | None = None
    ) -> None:
        # DefaultPredictor's __init__ is not called: it takes only RGB and BGR, and its checkpointer runs pickled code.
        for name, number in (("batch_size", batch_size), ("workers", workers)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{name} is {number!r}; it must be a whole number from 1 on, or None")
        check_config(cfg)
        register_own_data(cfg)
        check_input_format(cfg)
        self.cfg = cfg.clone()  # the next lines and building the model may change it
        self.cfg.defrost()
        fit_device(self.cfg)
        self._model_cfg = self.cfg.clone()  # a copy builds the same model, whatever happens to `cfg`
        (self.aug,) = build_augmentation(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT
        self.batch_size, self.workers = batch_size, workers
        self._untrained, self._weights = untrained, cfg.MODEL.WEIGHTS
        self._digest = ""
        self.class_names = list(cfg.DATASETS.get("CLASS_NAMES", ()))
        self._model: nn.Module | None = self._build()
        self.metadata = metadata_of(cfg, self.class_names)

    @property
    def model(self) -> Any:
        """The model in evaluation mode. A predictor that was pickled builds it when it is first asked for."""
        if self._model is None:
            self._model = self._build()
        return self._model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model = model

    def _build(self) -> nn.Module:
        with nullcontext() if self._untrained else WithoutRandomWeights():
            model = build_model(self._model_cfg).eval()
        checkpointer = DCNCheckpointer(model, class_names=self._model_cfg.DATASETS.get("CLASS_NAMES", ()))
        (checkpointer.load if self._untrained else checkpointer.load_trained)(self._weights)
        if self._digest and digest(model) != self._digest:
            raise ValueError(f"{self._weights} holds other weights than when the predictor was pickled")
        self.class_names = self.class_names or list(checkpointer.trained_names)
        # Weights with initial values cannot be read again.
        self._loaded = None if checkpointer.initial else fingerprint(model)
        return model

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, as long as its weights are those that were loaded; else with the model as it is."""
        state = self.__dict__.copy()
        if self._model is not None and self._is_as_loaded():
            self._digest = state["_digest"] = self._digest or self._identify()
            state |= {"_model": None, "_weights": absolute(self._weights)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The machine of the copy may have no GPU."""
        self.__dict__.update(state)
        for cfg in (self.cfg, self._model_cfg):
            fit_device(cfg)

    def _is_as_loaded(self) -> bool:
        return isinstance(self._model, nn.Module) and fingerprint(self._model) == self._loaded

    def _identify(self) -> str:
        """Tells the model that was loaded from others."""
        return digest(self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> DCNPredictor:
        """A copy with a model of its own, which is not read again."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if twin._model is not None and self._is_as_loaded():
            twin._loaded = fingerprint(twin._model)
        return twin

    @overload
    def __call__(self, images: AnyImage) -> Outputs: ...  # type: ignore[overload-overlap]  # a str is an iterable too

    @overload
    def __call__(self, images: Iterable[AnyImage]) -> list[Outputs]: ...

    def __call__(self, images: Any) -> Any:
        """Gives the model's output for one image, or a list of outputs for several, in their order.

        Args:
            images: an image, or a list or another iterable of images. An image is (height, width, 3) of uint8 in BGR,
                as OpenCV reads it. `dcn_d2.data.images.pixels_of` says what else it may be, and how that is converted.
                `stream` is for more images than the memory has place for.

        Raises:
            ImageError: Something is not an image, or is so narrow that resizing leaves no pixel. Of several images, the
                message names the position of the first such one.
        """
        if is_one_image(images):
            return self._run([self._prepare(images)])[0]
        return list(self.stream(images))

    def stream(self, images: Iterable[AnyImage], *, return_errors: bool = False) -> Iterator[Outputs]:
        """Yields the model's output for each image, in their order, as soon as it is there.

        It holds a few batches of images at any time, so that `images` may be endless. They are read and resized in
        background threads, ahead of the model. Images of one size (once resized) run in batches, and on a CPU several
        batches run at once: the results are those of one image after the other, up to rounding.

        Args:
            images: a list, a generator or another iterable, of images as for a call.
            return_errors: yields the `ImageError` or `OSError` in place of the result of an image that cannot be used,
                instead of raising it.

        Raises:
            ImageError: As for a call.
        """
        if is_one_image(images):
            raise TypeError(f"stream takes an iterable of images, got one {type(images).__name__}")
        self.model  # noqa: B018  built here, and not by several workers at once
        device = torch.device(self.cfg.MODEL.DEVICE).type
        precision = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def run(inputs: list[Inputs]) -> list[Outputs]:
            with torch.autocast(*precision):  # the caller's, which other threads do not know
                return self._run(inputs)

        for result in run_in_batches(images, self._prepare_one_of_many, run, self.plan()):
            if isinstance(result, BaseException) and not (return_errors and isinstance(result, (ImageError, OSError))):
                raise result
            yield result  # type: ignore[misc]

    def plan(self) -> Plan:
        """Says how many images run at once: what the arguments say, or what the processor and the memory allow."""
        pixels = (self.cfg.INPUT.MIN_SIZE_TEST or 800) * self.cfg.INPUT.MAX_SIZE_TEST
        return plan_batches(self.batch_size, self.workers, pixels, self.cfg.MODEL.DEVICE == "cpu")

    def _prepare_one_of_many(self, position: int, image: AnyImage) -> Inputs:
        try:
            return self._prepare(image)
        except ImageError as error:
            raise ImageError(f"image {position} of those given (from 0): {error}") from error

    def _prepare(self, image: AnyImage) -> Inputs:
        """Gives the model's input, still in the numbers of the image: as floats it would take four times the memory."""
        pixels = pixels_of(image, self.input_format)
        height, width = pixels.shape[:2]
        transform = self.aug.get_transform(pixels)
        if isinstance(transform, ResizeTransform) and not (transform.new_h and transform.new_w):
            size = f"{transform.new_h} x {transform.new_w}"
            raise ImageError(f"an image of {height} x {width} pixels would be resized to {size}: it is too narrow")
        resized = np.array(transform.apply_image(pixels).transpose(2, 0, 1), order="C")
        return {"image": torch.as_tensor(resized), "height": height, "width": width}

    @torch.no_grad()
    def _run(self, inputs: list[Inputs]) -> list[Outputs]:
        return self.model([{**each, "image": each["image"].float()} for each in inputs])


def is_one_image(images: object) -> bool:
    """Whether something is one image, or nothing at all that a predictor takes, rather than several images."""
    single = (str, bytes, bytearray, os.PathLike, Image.Image, np.ndarray, torch.Tensor, Mapping, Set)
    return isinstance(images, single) or not isinstance(images, Iterable)


def absolute(weights: str) -> str:
    """A value of MODEL.WEIGHTS that a process in another folder understands; addresses stay as they are."""
    return weights if not weights or "://" in weights else os.path.abspath(weights)

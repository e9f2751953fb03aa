# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Prediction with an exported file, for one image or many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from ..engine import DCNPredictor
from ..engine.batching import Plan
from .description import Description
from .formats import is_of_torch
from .model import ExportedModel, open_model
from .settings import config_of


class ExportedPredictor(DCNPredictor):
    """A `DCNPredictor` whose model is an exported file. It needs neither a config file nor weights.

    - Called with an image, a uint8 array in BGR as OpenCV reads it, it gives {"instances": Instances} as Detectron2's
      `DefaultPredictor` does. It also takes what `DCNPredictor` takes: lists, files, streams.
    - If the file has a fixed size, images are made to fit: the scale is the smaller one of the config's and of the one
      at which the image fits into that size. At another scale than the config's, detections differ from the model's.
    - Everything is on the CPU.
    - Pickling it keeps the place of the file. The copy opens it when it needs it, and refuses it if it was exported
      again in another way.

    Args:
        model: the file, or one that is open.
        opts: KEY VALUE pairs that change the config in the file, for example INPUT.MIN_SIZE_TEST.
        batch_size: how many images of one size run together; by default the file's batch, or 2 if it is free.
        workers: how many batches run at once. By default one for ONNX Runtime and OpenVINO, which divide each batch
            among their own threads, and else as in `DCNPredictor`.
        threads: of the runtime; 0 takes as many as torch. TorchScript and .pt2 run with torch's threads.

    Raises:
        ValueError: the file is not an exported detector, or an argument cannot work.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ExportedModel,
        *,
        opts: Sequence[Any] = (),
        batch_size: int | None = None,
        workers: int | None = None,
        threads: int = 0,
    ) -> None:
        self._threads = threads
        opened = model if isinstance(model, ExportedModel) else open_model(model, threads)
        self._opened: ExportedModel | None = opened
        self.description: Description = opened.description
        super().__init__(config_of(self.description, opened.path, opts), batch_size=batch_size, workers=workers)

    def _build(self) -> ExportedModel:
        model, self._opened = self._opened or open_model(self._weights, self._threads), None
        if model.description != self.description:
            raise ValueError(f"{self._weights} holds another model than when the predictor was pickled")
        self.class_names = self.class_names or list(self.description.class_names)
        self._loaded = []
        return model

    def _is_as_loaded(self) -> bool:
        path = os.path.abspath(self._weights)
        return isinstance(self._model, ExportedModel) and os.path.abspath(self._model.path) == path

    def _identify(self) -> str:
        return self.description.weights_digest

    def plan(self) -> Plan:
        """Says how many images run at once: what the arguments say, or what suits the runtime."""
        plan = super().plan()._replace(batch_size=self.batch_size or self.description.batch or 2)
        if self.workers or is_of_torch(self._weights):
            return plan
        return plan._replace(workers=1, threads=torch.get_num_threads())


def load(path: str | os.PathLike[str] | ExportedModel, **options: Any) -> ExportedPredictor:
    """Opens an exported detector, and gives an object that is called with an image; `options` are its arguments."""
    return ExportedPredictor(path, **options)

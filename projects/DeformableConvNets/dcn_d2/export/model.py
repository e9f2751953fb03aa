# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""An exported file that is called as Detectron2's models are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from .check import instances_of
from .formats import Session, is_of_torch, open_session, runtime_of
from .shapes import round_up

Inputs = dict[str, Any]


class ExportedModel(nn.Module):
    """Runs an exported detector on a list of images, and gives what the model gives that was exported.

    It is a module because Detectron2 looks at modes and devices of modules; it has no parameters. The images of a call
    lie at the top left of canvases of one size: that of the file or, if sizes are free, that of the largest image, as
    in Detectron2. If the file has a fixed batch, images run in batches of that size; the last one is filled up.

    Several threads may call it at once. Pickling it keeps the place of the file, and a copy opens it.

    Args:
        session: an exported detector.
        path: of its file, for messages and for copies.
        threads: that the session was opened with.

    Raises:
        ValueError: the file holds another part of a model.
    """

    def __init__(self, session: Session, path: str | os.PathLike[str] = "", threads: int = 0) -> None:
        super().__init__()
        self.description = session.description
        self.path, self._threads = os.fspath(path), threads
        if self.description.part != "detector":
            raise ValueError(
                f"{self.path or 'the file'} holds the {self.description.part} of a model, which detects nothing: "
                "export it with --part detector"
            )
        self._run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = session.run
        self._session = session
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where images and results are."""
        return torch.device("cpu")

    def extra_repr(self) -> str:
        """The file and what runs it, for `repr`."""
        return f"{self.path}, {runtime_of(self.path)}" if self.path else ""

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.path:
            raise TypeError("an ExportedModel without a path cannot be pickled")
        return open_model, (os.path.abspath(self.path), self._threads)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExportedModel:
        """A copy with the same session: nothing of it changes."""
        return type(self)(self._session, self.path, self._threads)

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Inputs]) -> list[dict[str, Instances]]:
        """Detects objects.

        Args:
            batched_inputs: of each image "image" (C, H, W), values from 0 to 255, and "height" and "width", to which
                the results are scaled; by default those of "image".

        Returns:
            Of each image {"instances": Instances}, with `pred_boxes`, `scores`, `pred_classes` and, if the file gives
            masks, `pred_masks`, on the CPU.

        Raises:
            ValueError: an image is larger than the file's fixed size, or has another number of channels.
        """
        if not batched_inputs:
            return []
        canvas = self._canvas_of([tuple(each["image"].shape) for each in batched_inputs])
        results: list[dict[str, Instances]] = [{}] * len(batched_inputs)
        with torch.autocast("cpu", enabled=False):  # the graph has its own precision
            for numbers in self._batches(batched_inputs):
                found = self._run_batch([batched_inputs[number] for number in numbers], canvas)
                for number, instances in zip(numbers, found):
                    results[number] = {"instances": instances}
        return results

    def _canvas_of(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        """Gives (height, width) of the canvas on which images of these shapes lie, (C, H, W) each."""
        height, width = (max(sides) for sides in list(zip(*shapes))[1:])
        if self.description.size is None:
            unit = self.description.size_divisibility
            return round_up(height, unit), round_up(width, unit)
        canvas = self.description.size
        for _, *size in shapes:
            if size[0] > canvas[0] or size[1] > canvas[1]:
                raise ValueError(
                    f"an image of {size[0]} x {size[1]} pixels (height x width) does not fit into the size of the "
                    f"exported model{f' {self.path}' if self.path else ''}, {canvas[0]} x {canvas[1]}: resize it (with "
                    "INPUT.CANVAS_TEST the mapper and the predictor do), or export with free sizes"
                )
        return canvas

    def _batches(self, inputs: Sequence[Inputs]) -> Iterator[list[int]]:
        """Gives the numbers of the images that run together: one output size, and no more than the file's batch."""
        groups: dict[Any, list[int]] = {}
        for number, each in enumerate(inputs):
            groups.setdefault(_output_size(each) if self.description.masks == "pasted" else None, []).append(number)
        for numbers in groups.values():
            size = self.description.batch or len(numbers)
            yield from (numbers[start : start + size] for start in range(0, len(numbers), size))

    def _run_batch(self, inputs: Sequence[Inputs], canvas: tuple[int, int]) -> list[Instances]:
        images = [self._with_channels(each["image"]) for each in inputs]
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        filled = [*range(len(images)), *[0] * ((self.description.batch or 0) - len(images))]
        canvases = np.zeros((len(filled), images[0].shape[0], *canvas), np.float32)
        for place, number in enumerate(filled):
            height, width = sizes[number]
            canvases[place, :, :height, :width] = images[number].cpu().numpy()
        arrays: dict[str, np.ndarray] = {
            "images": canvases,
            "image_sizes": np.array([sizes[number] for number in filled], np.int64),
        }
        if self.description.masks == "pasted":
            arrays["output_size"] = np.array(_output_size(inputs[0]), np.int64)
        outputs = self._run(arrays)
        return [
            instances_of(outputs, place, size, _output_size(each))
            for place, (size, each) in enumerate(zip(sizes, inputs))
        ]

    def _with_channels(self, image: Tensor) -> Tensor:
        """Gives an image with the channels of the graph; grey is repeated, as subtracting the means of all does."""
        wanted = self.description.inputs[0].shape[1]
        if image.shape[0] not in (1, wanted):
            raise ValueError(
                f"an image has {image.shape[0]} channels, but the exported model"
                f"{f' {self.path}' if self.path else ''} takes {wanted} ({self.description.channel_order})"
            )
        return image.expand(int(wanted), -1, -1)


def open_model(path: str | os.PathLike[str], threads: int = 0) -> ExportedModel:
    """Opens an exported detector.

    Args:
        path: of the file.
        threads: how many the runtime uses; 0 takes as many as torch. Where torch is the runtime, 0 leaves it to each
            thread that calls the model.

    Raises:
        ValueError, FileNotFoundError: the file is missing, of no known format, not dcn_d2's, or holds no detector.
    """
    if threads < 0:
        raise ValueError(f"threads is {threads}; it must be 0, as many as torch has, or more")
    number = threads if threads or is_of_torch(path) else torch.get_num_threads()
    return ExportedModel(open_session(path, number), path, threads)


def _output_size(each: Inputs) -> tuple[int, int]:
    """(height, width) to which the results of an image are scaled."""
    return int(each.get("height", each["image"].shape[1])), int(each.get("width", each["image"].shape[2]))

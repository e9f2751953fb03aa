# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What an exported file says about itself. It lies in the file, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# The name under which every format keeps the description.
KEY = "dcn_d2"
# Raised when the meaning of a field or of a tensor changes.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that goes in or comes out: its name, its dtype, and its shape, where a free size has a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Description:
    """What a program needs to know to run an exported file.

    Attributes:
        format_version: of this description.
        dcn_d2_version: the version that exported the file.
        part: "detector" or "backbone".
        row: the name of the config file, such as that of a row of the model zoo.
        class_names: of the detector, [] if nobody said them.
        weights: where the weights came from.
        weights_digest: SHA-256 of the weights' values.
        channel_order: of the images: "RGB", "BGR", or another value of INPUT.FORMAT.
        pixel_mean, pixel_std: with which the graph normalises images; the caller does not.
        size: (height, width) of the images, or None if both are free.
        size_divisibility: free heights and widths must be multiples of it.
        batch: the number of images, or None if it is free.
        dtype: in which backbone and heads compute.
        masks: "boxes": probabilities within each box; "pasted": truth values in the image; "none": no masks.
        detections_per_image: the number of detections of each image, filled up with class -1.
        min_size_test, max_size_test: lengths of the sides to which an image is resized, as INPUT.MIN_SIZE_TEST says.
        resize_with: "PIL" or "cv2", as INPUT.RESIZE_WITH says.
        inputs, outputs: the tensors, in their order.
        config: the text of the config.
    """

    part: str
    row: str
    class_names: tuple[str, ...]
    weights: str
    weights_digest: str
    channel_order: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    size: tuple[int, int] | None
    size_divisibility: int
    batch: int | None
    dtype: str
    masks: str
    detections_per_image: int
    min_size_test: int
    max_size_test: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    config: str = field(repr=False)  # hundreds of lines
    dcn_d2_version: str
    format_version: int = FORMAT_VERSION
    resize_with: str = "PIL"

    def to_json(self) -> str:
        """Gives it as text, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, file: str = "the file") -> Description:
        """Reads what `to_json` gave.

        Raises:
            ValueError: it is not such a text, or one of a later version; the message names `file`.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            version = values.get("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"its format version is {version}, and this dcn_d2 reads {FORMAT_VERSION}")
            for name in ("inputs", "outputs"):
                values[name] = tuple(
                    TensorInfo(tensor["name"], tensor["dtype"], tuple(tensor["shape"])) for tensor in values[name]
                )
            for name in ("class_names", "pixel_mean", "pixel_std", "size"):
                values[name] = None if values[name] is None else tuple(values[name])
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}: its description by dcn_d2 cannot be read: {reason}") from error

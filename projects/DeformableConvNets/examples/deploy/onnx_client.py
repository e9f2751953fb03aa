# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs a detector that export.py has written as ONNX. It needs neither PyTorch nor Detectron2 nor dcn_d2.

    pip install numpy onnxruntime pillow
    python onnx_client.py model.onnx photo.jpg                       prints the detections as JSON
    python onnx_client.py model.onnx photo.jpg --picture found.png   also draws them

Copy this file into your program: `Detector` is all there is. How images are to be prepared is read from the model's
file. Images are resized as in training: with Pillow, or for INPUT.RESIZE_WITH "cv2" as OpenCV does. Some pixels in a
thousand differ from OpenCV's, by a grey level.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

CHANNELS = {"RGB": "RGB", "BGR": "RGB", "L": "L"}  # Pillow's modes


class Detector:
    """A detector in an ONNX file.

    Args:
        path: of the file.
        threads: how many ONNX Runtime uses; 0 leaves it to ONNX Runtime.
        providers: of ONNX Runtime, for example ["CUDAExecutionProvider", "CPUExecutionProvider"].
    """

    def __init__(self, path: str, threads: int = 0, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        with open(path, "rb"):  # says plainly that there is no such file
            pass
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors have no class of their own in common
            raise ValueError(f"{path} cannot be opened by ONNX Runtime: {error}") from error
        about = self.session.get_modelmeta().custom_metadata_map
        if "dcn_d2" not in about:
            raise ValueError(f"{path} was not written by export.py of dcn_d2")
        self.about: dict[str, Any] = json.loads(about["dcn_d2"])
        if self.about["part"] != "detector":
            raise ValueError(f"{path} holds a {self.about['part']}, not a detector")
        if self.about["channel_order"] not in CHANNELS:
            raise ValueError(f"{path} takes images in {self.about['channel_order']}, which this program cannot make")
        if (self.about["batch"] or 1) != 1:
            raise ValueError(f"{path} takes {self.about['batch']} images at once; this program gives it one")

    def __call__(self, image: Image.Image) -> dict[str, np.ndarray]:
        """Detects objects.

        Returns:
            "boxes" (K, 4) as x0, y0, x1, y1 in pixels of the image, "scores" (K,), highest first, "classes" (K,) and,
            if the model has masks, "masks" (K, height, width) of bool.
        """
        pixels = self.read(image)
        height, width = pixels.shape[:2]
        resized = self.resize(pixels)
        inputs = {"images": self.canvas(resized), "image_sizes": np.array([resized.shape[:2]], np.int64)}
        pasted = self.about["masks"] == "pasted"  # then boxes are in pixels of the image already
        if pasted:
            inputs["output_size"] = np.array([height, width], np.int64)
        names = [output.name for output in self.session.get_outputs()]
        results = dict(zip(names, (result[0] for result in self.session.run(names, inputs))))
        boxes = results["boxes"]
        if not pasted:
            boxes = boxes * np.tile([width / resized.shape[1], height / resized.shape[0]], 2).astype(np.float32)
            boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
        kept = (results["classes"] >= 0) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        found = {name: result[kept] for name, result in (results | {"boxes": boxes}).items()}
        if self.about["masks"] == "boxes":
            found["masks"] = paste(found["masks"], found["boxes"], height, width)
        return found

    def read(self, image: Image.Image) -> np.ndarray:
        """Gives the pixels (height, width, channels), upright and in the model's order of channels."""
        order = self.about["channel_order"]
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(CHANNELS[order]))
        return pixels[:, :, None] if order == "L" else pixels[:, :, ::-1] if order == "BGR" else pixels

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """Resizes as the model's config says, and so that the image fits into the model's size, if that is fixed."""
        height, width = self.resized_size(*pixels.shape[:2])
        if (height, width) == pixels.shape[:2]:
            return pixels
        if self.about["resize_with"] == "cv2":
            return interpolate(pixels, height, width)
        channels = [Image.fromarray(channel) for channel in np.ascontiguousarray(pixels.transpose(2, 0, 1))]
        return np.stack([np.asarray(c.resize((width, height), Image.Resampling.BILINEAR)) for c in channels], axis=-1)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Gives the height and width to which an image is resized."""
        shortest, longest = self.about["min_size_test"], self.about["max_size_test"]
        factor = min(shortest / min(height, width), longest / max(height, width)) if shortest else 1.0
        size = int(height * factor + 0.5), int(width * factor + 0.5)
        canvas = self.about["size"]
        if canvas and (size[0] > canvas[0] or size[1] > canvas[1]):
            factor = min(canvas[0] / height, canvas[1] / width)
            size = int(height * factor + 0.5), int(width * factor + 0.5)
        return size

    def canvas(self, pixels: np.ndarray) -> np.ndarray:
        """Puts an image at the top left of a canvas (1, channels, height, width) of a size that the model takes."""
        unit = self.about["size_divisibility"]
        height, width = self.about["size"] or (-(-side // unit) * unit for side in pixels.shape[:2])
        canvas = np.zeros((1, pixels.shape[2], height, width), np.float32)
        canvas[0, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
        return canvas


def interpolate(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes bilinearly without smoothing, in whole numbers as OpenCV does: weights have 11 bits."""
    (above, below, *down), (left, right, *across) = (
        _neighbours(*sides) for sides in zip(pixels.shape, (height, width))
    )
    pixels = pixels.astype(np.int32)
    rows = pixels[:, left] * across[0][:, None] + pixels[:, right] * across[1][:, None]
    numbers = zip((above, below), down)
    upper, lower = ((rows[number] >> 4) * weight[:, None, None] >> 16 for number, weight in numbers)
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, ...]:
    """Gives for each new pixel the old ones on both sides, and the weights of both."""
    position = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1).astype(np.float32)
    first = np.floor(position).astype(np.int64)
    second = position - first
    weights = (np.rint(share * 2048).astype(np.int32) for share in (1 - second, second))
    return first, np.minimum(first + 1, old - 1), *weights


def paste(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pastes masks (K, h, w) of probabilities, each within its box, into images: (K, height, width) of bool."""
    pasted = np.zeros((len(masks), height, width), dtype=bool)
    for mask, (x0, y0, x1, y1), picture in zip(masks, boxes, pasted):
        rows, columns = _weights(height, y0, y1, mask.shape[0]), _weights(width, x0, x1, mask.shape[1])
        picture[:] = rows @ mask @ columns.T >= 0.5
    return pasted


def _weights(pixels: int, start: float, end: float, cells: int) -> np.ndarray:
    """Gives the share (pixels, cells) that each cell of a mask from `start` to `end` has in each pixel of a row."""
    position = (np.arange(pixels, dtype=np.float32) + 0.5 - start) / (end - start) * cells - 0.5
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells, dtype=np.float32)))


def records(found: dict[str, np.ndarray], class_names: list[str], confidence: float) -> list[dict[str, Any]]:
    """Gives detections as objects for JSON; masks are COCO's run lengths, column by column."""
    listed = []
    for number in np.flatnonzero(found["scores"] >= confidence):
        index = int(found["classes"][number])
        record: dict[str, Any] = {
            "class": class_names[index] if class_names else str(index),
            "score": float(found["scores"][number]),
            "box": [float(side) for side in found["boxes"][number]],
        }
        if "masks" in found:
            mask = found["masks"][number]
            changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False, append=~mask[-1, -1]))
            record["mask"] = {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}
        listed.append(record)
    return listed


def draw(image: Image.Image, found: dict[str, np.ndarray], listed: list[dict[str, Any]]) -> Image.Image:
    """Draws the listed detections, which are the first ones found."""
    picture = ImageOps.exif_transpose(image).convert("RGB")
    for number in range(len(listed) if "masks" in found else 0):
        picture.paste((255, 120, 40), mask=Image.fromarray(found["masks"][number].astype(np.uint8) * 110))
    pen = ImageDraw.Draw(picture)
    for record in listed:
        pen.rectangle(record["box"], outline=(255, 255, 0))
        pen.text(record["box"][:2], f"{record['class']} {record['score']:.2f}", fill=(255, 255, 0))
    return picture


def main(arguments: list[str] | None = None) -> None:
    """Detects objects in one image, and prints them."""
    parser = argparse.ArgumentParser(description="Detects objects with an ONNX file that export.py has written.")
    parser.add_argument("model", help="the ONNX file")
    parser.add_argument("image", help="an image file")
    parser.add_argument("--confidence", type=float, default=0.5, help="lowest score that is printed")
    parser.add_argument("--picture", type=Path, help="where a picture with the detections goes")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; by default it decides")
    args = parser.parse_args(arguments)
    try:
        detector = Detector(args.model, args.threads)
        with Image.open(args.image) as image:
            found = detector(image)
            listed = records(found, detector.about["class_names"], args.confidence)
            if args.picture:
                draw(image, found, listed).save(args.picture)
    except (OSError, ValueError) as error:
        sys.exit(f"onnx_client.py: {error}")
    json.dump(listed, sys.stdout)
    print()


if __name__ == "__main__":
    main()

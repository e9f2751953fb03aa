# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reads images, for training, evaluation, prediction and the demo.

Images of 8 bits a channel become what Detectron2's `read_image` makes of them: rotated as their EXIF data says,
palettes looked up, alpha left out, CMYK and grey converted. What differs:

- With 16 bits a channel the upper 8 are taken, value // 256, so that 65535 becomes 255. Pillow and OpenCV do the same
  to 16-bit colour files. The rule looks at one value and never at its neighbours: a grey level means the same in every
  image, in training and in prediction. Data of 12 or 14 bits in such files come out dark, and a warning says so.
- Floats, 32-bit integers, and files of several pages or frames have no such rule: they are refused.
- A file that ends too early is refused, and every error names the file.
"""

from __future__ import annotations

import logging
import os
from http.client import HTTPException
from io import BytesIO
from typing import IO
from urllib.request import urlopen

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from iopath.common.file_io import HTTPURLHandler
from PIL import Image

from ..config.checks import check_channels, raise_problems

IMAGE_KINDS = "a uint8 (or uint16) array of shape (height, width, 3) in BGR or (height, width) in grey, a PIL image, "
IMAGE_KINDS += "or the path or the bytes of an image file"

WEB_TIMEOUT = 60.0  # seconds without an answer

# Which modes Pillow gives to a grey image of 16 bits depends on its version and on the byte order of the file.
_MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_FORMATS_16 = ("PNG", "PPM")  # their greys of more than 8 bits may come as mode I, of 32 bits
_MODES_8 = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class ImageError(ValueError):
    """An image that cannot be used; the message says which, and why."""


def read_image(file_name: str | os.PathLike[str], format: str = "BGR") -> np.ndarray:
    """Reads an image file.

    Args:
        file_name: a path, or an address that Detectron2's `PathManager` knows.
        format: as INPUT.FORMAT: "BGR", "RGB", "L" (grey), "YUV-BT.601", or another mode of Pillow.

    Returns:
        (height, width, channels) of uint8; "YUV-BT.601" is float.

    Raises:
        ImageError: The file is not an image, or is damaged, cut off, too large, or of a kind that is refused; or an
            address of the web could not be fetched.
        OSError: There is no such file, or it may not be read.
    """
    name = os.fspath(file_name)
    if "://" not in name and PathManager.isdir(name):  # handlers of addresses need not know folders
        raise ImageError(f"{name} is a folder, an image file was expected")
    with _open(name) as file:
        return _decode(file, format, name)


def _open(name: str) -> IO[bytes]:
    """Opens a path or an address.

    Images from the web are fetched each time: Detectron2's handler would keep all of them, under names without the
    host, so that those of two hosts are taken for each other.
    """
    if not name.startswith(("http://", "https://")) or not isinstance(
        PathManager._path_handlers.get(f"{name.partition('://')[0]}://"), HTTPURLHandler
    ):
        return PathManager.open(name, "rb")
    try:
        with urlopen(name, timeout=WEB_TIMEOUT) as response:
            return BytesIO(response.read())
    except (OSError, ValueError, HTTPException) as error:
        raise ImageError(f"{name} could not be fetched: {error}") from error


def _decode(file: IO[bytes], format: str, name: str) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return convert_image(image, format, name)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that Pillow can read") from error
    except Exception as error:  # decoders raise errors of all kinds for damaged files
        raise ImageError(f"{name} cannot be read: {error}") from error


def convert_image(image: Image.Image, format: str, name: str = "the image") -> np.ndarray:
    """Gives the pixels of a Pillow image by the rules of this module; arguments and result as in `read_image`."""
    if fault := fault_of(image):
        raise ImageError(f"{name} {fault}")
    if 0 in image.size:
        raise ImageError(f"{name} has {image.width} x {image.height} pixels")
    image.load()  # also finds out that a file is cut off
    sixteen = has_16_bits(image)
    image = _apply_exif_orientation(image)
    if sixteen:
        image = Image.fromarray(_upper_8_bits(np.asarray(image), name))
    return convert_PIL_to_numpy(image, format)


def fault_of(image: Image.Image) -> str:
    """Says why images of this kind are refused, from the header alone; "" if they are read."""
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # an MPO is a photograph and its preview
    if pages > 1:
        return f"holds {pages} pages or frames; only single images are read: save them one by one"
    if image.mode in _MODES_8 or has_16_bits(image):
        return ""
    return f"has the mode {image.mode}: only 8 bits a channel, and 16 bits without a sign, are read; convert it to them"


def has_16_bits(image: Image.Image) -> bool:
    """True if Pillow gives an image 16 bits a channel: grey ones. Of colours it has dropped the lower 8 itself."""
    return image.mode in _MODES_16 or (image.mode == "I" and image.format in _FORMATS_16)


def pixels_of(image: object, format: str = "BGR") -> np.ndarray:
    """Gives the pixels of anything that is an image.

    Args:
        image: a uint8 array, (height, width, 3) in the order BGR or (height, width) or (height, width, 1) in grey;
            uint16 loses its lower 8 bits. Or a PIL image, or the path or the bytes of a file: see `read_image`.
        format: see `read_image`.

    Raises:
        ImageError: It is something else. Floats are refused too: whether they reach to 1, 255 or elsewhere cannot be
            told from one image.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, format)
    if isinstance(image, (bytes, bytearray)):
        return _decode(BytesIO(image), format, f"the image of {len(image)} bytes")
    if isinstance(image, Image.Image):
        return convert_image(image, format)
    if image is None:
        raise ImageError(f"the image is None, which OpenCV gives for what it cannot read; expected {IMAGE_KINDS}")
    if not isinstance(image, np.ndarray):
        raise ImageError(f"the image is a {type(image).__module__}.{type(image).__qualname__}; expected {IMAGE_KINDS}")
    what = f"the image is an array of {image.dtype} and shape {image.shape}{_range(image)}"
    if 0 in image.shape or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
        raise ImageError(f"{what}; expected {IMAGE_KINDS}")
    if image.dtype.kind != "u" or image.dtype.itemsize > 2:
        raise ImageError(f"{what}; expected {IMAGE_KINDS}: scale the values to 0..255 and round them to uint8")
    if image.dtype.itemsize == 2:
        image = _upper_8_bits(image, "the image")
    if image.ndim == 2:
        image = image[:, :, None]
    bgr = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return bgr if format == "BGR" else convert_PIL_to_numpy(Image.fromarray(bgr[:, :, ::-1]), format)


def check_input_format(cfg: CfgNode) -> None:
    """Checks that images can be read in INPUT.FORMAT, and that PIXEL_MEAN and PIXEL_STD have its channels.

    `dcn_d2.config.check_config` allows more, because images may have their own reader; here it is `pixels_of`.

    Raises:
        ValueError: One does not fit; the message names the key.
    """
    name = cfg.INPUT.FORMAT
    try:
        _, _, channels = pixels_of(np.zeros((1, 1, 3), np.uint8), name).shape
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f'INPUT.FORMAT is {name!r}; it may be "BGR", "RGB", "L" or "YUV-BT.601"') from error
    raise_problems([*check_channels(cfg, channels)])


def _upper_8_bits(pixels: np.ndarray, name: str) -> np.ndarray:
    text = f"{name} has 16 bits a channel: of all such images the upper 8 are taken (value // 256)"
    if pixels.max() >= 2**14:
        log_first_n(logging.WARNING, text, name=__name__)
    else:  # counted by itself, so that an earlier bright image does not silence it
        text += f"; its largest value is {pixels.max()} of 65535, so it comes out dark: better scale the files first"
        log_first_n(logging.WARNING, text, name=__name__)
    return (pixels >> 8).astype(np.uint8)


def _range(pixels: np.ndarray) -> str:
    """Says which range the values have; "" if there are none, or they have no order."""
    if pixels.size == 0 or pixels.dtype.kind not in "buif":
        return ""
    return f" with values from {pixels.min()} to {pixels.max()}"

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is to be exported, and what of it cannot be done: found out before anything slow runs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from .detector import MASKS
from .formats import SUFFIXES, files_of, format_module, format_of
from .onnx import packages as onnx_packages

PARTS = ("detector", "backbone")
SMALLEST_SIDE = 32
# In which a graph of a format may compute, and why not in others.
DTYPES = {
    "onnx": ("float32", "float16"),
    "openvino": ("float32", "float16"),
    "pt2": ("float32", "float16", "bfloat16"),
    "torchscript": ("float32", "float16", "bfloat16"),
}
_WHY_NOT = {
    "onnx": "ONNX's DeformConv has no bfloat16 in opset 19, which all runtimes read",
    "openvino": "OpenVINO keeps weights in float32 or float16, and chooses itself in what it computes",
}
# What a format needs besides torch, and the extra of dcn_d2 that has it.
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
# The way out for detectors that cannot be exported.
USE_BACKBONE = '; --part backbone (part="backbone") exports its backbone'


@dataclass(frozen=True)
class Request:
    """What is to be exported, into which file.

    Attributes:
        path: of the file.
        format: "" takes that of the file's suffix.
        part: "detector" or "backbone".
        size: height and width of the images, None leaves them free.
        batch: number of images, None leaves it free.
        dtype: in which backbone and heads compute.
        masks: see `ExportableDetector`.
        overwrite: replace a file that is there.
        options: of the format.
    """

    path: Path
    format: str = ""
    part: str = "detector"
    size: tuple[int, int] | None = None
    batch: int | None = None
    dtype: str = "float32"
    masks: str = "boxes"
    overwrite: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def check_request(request: Request) -> Request:
    """Refuses what no model can be exported to; gives the request with its format.

    Raises:
        ValueError, OSError, ImportError: the message names the argument, and what it may be.
    """
    request = replace(request, format=request.format or format_of(request.path))
    if request.format not in SUFFIXES:
        raise ValueError(f"format is {request.format!r}; it may be {', '.join(SUFFIXES)}")
    suffix = SUFFIXES[request.format]
    if request.path.suffix != suffix:
        raise ValueError(f"{request.path}: a file of the format {request.format} has the suffix {suffix}")
    for name, value, known in (("part", request.part, PARTS), ("masks", request.masks, MASKS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it may be {', '.join(known)}")
    if request.part == "backbone" and request.masks != "boxes":
        raise ValueError(f"masks is {request.masks!r}, but a backbone has no masks: leave it out")
    _check_dtype(request)
    _check_numbers(request)
    _check_packages(request.format)
    _check_options(request)
    _check_output(request)
    return request


def _check_dtype(request: Request) -> None:
    known = DTYPES[request.format]
    if request.dtype not in known:
        why = _WHY_NOT.get(request.format, "") if request.dtype == "bfloat16" else ""
        reason = f": {why}" if why else ""
        raise ValueError(f"dtype is {request.dtype!r}; with {request.format} it may be {', '.join(known)}{reason}")


def _check_numbers(request: Request) -> None:
    if request.batch is not None and not isinstance(request.batch, int):
        raise ValueError(f"batch is {request.batch!r}; it must be a whole number, and without it the batch is free")
    if request.size is not None and not _is_size(request.size):
        raise ValueError(f"size is {request.size!r}; it must be (height, width), two whole numbers, or None")
    if request.batch is not None and request.batch < 1:
        raise ValueError(f"batch is {request.batch}; it must be at least 1, and without it the batch is free")
    if request.size is not None and min(request.size) < SMALLEST_SIDE:
        height, width = request.size
        raise ValueError(f"size is {height} x {width}; height and width must be at least {SMALLEST_SIDE} pixels")


def _is_size(size: Any) -> bool:
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) for side in size)


def _check_packages(format: str) -> None:
    # A folder of this name on the path, such as one of exported files, is also found, but has no file.
    found = {name: find_spec(name) for name in PACKAGES.get(format, ())}
    missing = [name for name, spec in found.items() if spec is None or spec.origin is None]
    if missing:
        raise ImportError(f"the format {format} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if format == "onnx":
        onnx_packages.load(*found)  # refuses those that are too old


def _check_options(request: Request) -> None:
    """Options of a format are the arguments of its `write` behind the path."""
    arguments = list(inspect.signature(format_module(request.format).write).parameters.values())[4:]
    known = [argument.name for argument in arguments if argument.kind is not argument.VAR_KEYWORD]
    for name in request.options:
        if name not in known:
            may = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the format {request.format} has no option {name!r}; {may}")


def _check_output(request: Request) -> None:
    folder = request.path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} for {request.path.name} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"the folder {folder} may not be written to")
    if request.path.is_dir():
        raise IsADirectoryError(f"{request.path} is a folder; a file for the exported model was expected")
    check_free(files_of(request.path), request.overwrite)


def check_free(files: Iterable[Path], overwrite: bool) -> None:
    """Refuses files that are there, unless they may be replaced."""
    for file in files:
        if os.path.lexists(file) and not overwrite:
            raise FileExistsError(f"{file} exists: --overwrite (overwrite=True) replaces it")


def check_config(cfg: CfgNode, request: Request) -> None:
    """Refuses a config whose model cannot be exported as `request` says, before it is built.

    What a config cannot tell, because a name may stand for anything, `check_model` finds out.

    Raises:
        ValueError: the message names the key, and the way out.
    """
    if not isinstance(cfg, CfgNode):
        raise ValueError(
            f"cfg is {cfg!r}; it must be a config: dcn_d2.engine.load_config(FILE), with MODEL.WEIGHTS set to the "
            "trained weights"
        )
    if request.part == "backbone":
        return
    model = cfg.MODEL
    if model.META_ARCHITECTURE != "GeneralizedRCNN":
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {model.META_ARCHITECTURE}; of detectors, GeneralizedRCNN can be exported"
            + USE_BACKBONE
        )
    if model.LOAD_PROPOSALS:
        raise ValueError(f"MODEL.LOAD_PROPOSALS is True: a graph cannot read files of proposals{USE_BACKBONE}")
    if model.KEYPOINT_ON:
        raise ValueError(f"MODEL.KEYPOINT_ON is True: keypoint heads cannot be exported{USE_BACKBONE}")
    if model.ROI_BOX_HEAD.USE_SIGMOID_CE:
        raise ValueError(f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True: such scores cannot be exported{USE_BACKBONE}")
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED is True: test-time augmentation is not part of a graph; add TEST.AUG.ENABLED False"
        )
    for head, is_used in (("ROI_BOX_HEAD", True), ("ROI_MASK_HEAD", model.MASK_ON)):
        if is_used and request.format in PACKAGES and model[head].POOLER_TYPE == "ROIPool":
            raise ValueError(
                f"MODEL.{head}.POOLER_TYPE is ROIPool, which cannot be exported to {request.format}: "
                f"export to a .pt2 or .ts file, or train with ROIAlignV2{USE_BACKBONE}"
            )
    if request.masks == "pasted" and not model.MASK_ON:
        raise ValueError("masks is 'pasted', but MODEL.MASK_ON is False: the model has no masks")
    for key, value in (
        ("TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE),
        ("MODEL.RPN.PRE_NMS_TOPK_TEST", model.RPN.PRE_NMS_TOPK_TEST),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", model.RPN.POST_NMS_TOPK_TEST),
    ):
        if value < 1:
            raise ValueError(f"{key} is {value}; a graph has a fixed number of boxes, which must be at least 1")

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""From a config or a model to a file of another runtime, which is compared with the model before it gets its name."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .. import __version__
from ..config import with_dcn_keys
from ..data.images import check_input_format
from ..engine import DCNPredictor
from ..engine.pickling import digest
from .check import check_equal
from .compare import Comparison
from .description import Description, TensorInfo
from .detector import ExportableBackbone, ExportableDetector
from .formats import format_module
from .request import Request, check_config, check_free, check_request
from .samples import open_image
from .shapes import BATCH, HEIGHT, WIDTH, example_inputs, input_tensors, round_up
from .supported import check_model


@dataclass(frozen=True)
class Exported:
    """What `export` has done.

    Attributes:
        path: the file that programs open.
        files: all files, with their sizes in bytes.
        description: what the file says about itself.
        comparison: with the model's own results; None if it was not asked for.
        notes: what differs from what was asked for.
    """

    path: Path
    files: dict[Path, int]
    description: Description
    comparison: Comparison | None
    notes: tuple[str, ...] = ()


def export(
    cfg: CfgNode,
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    class_names: Sequence[str] = (),
    format: str = "",
    part: str = "detector",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    dtype: str = "float32",
    masks: str = "boxes",
    check: bool = True,
    image: Any = None,
    row: str = "",
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Writes a trained model into a file that another runtime runs, and compares its results with the model's.

    Args:
        cfg: of the model.
        path: of the file. It appears when it is complete and has been compared.
        model: built and trained; it is not changed. By default it is built from `cfg`, with MODEL.WEIGHTS.
        class_names: of a given `model`, by default DATASETS.CLASS_NAMES.
        format: "onnx", "openvino", "pt2" or "torchscript"; by default that of the suffix of `path`.
        part: "detector", or "backbone": images in, feature maps out.
        size: height and width of the images, rounded up to what the backbone divides them by. By default they are free.
        batch: the number of images; by default it is free.
        dtype: in which backbone and heads compute.
        masks: "boxes": probabilities within each box; "pasted": truth values in the image; "none": no masks.
        check: compares the file with the model.
        image: with which they are compared, anything that `DCNPredictor` takes; by default one of nuclei.
        row: the name of the config file, for the description.
        overwrite: replaces a file that is there.
        options: of the format, see its `write`.

    Raises:
        ValueError, OSError, ImportError: what was asked for is not possible; the message says what is.
        DifferentResultError: the file's results differ from the model's by more than rounding. It is not kept.
    """
    request = Request(Path(path), format, part, size, batch, dtype, masks, overwrite, options)
    request = check_request(request)
    check_config(cfg, request)
    check_input_format(cfg)
    pixels = open_image(image, cfg.INPUT.FORMAT) if check else None
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if model is None:
        predictor = DCNPredictor(cfg)
        model, class_names = predictor.model, predictor.class_names
    check_model(model, part)
    reference = _copy(model)
    module, names = exportable(_copy(model), request)
    request, notes = _fit_size(request, reference)
    description = _describe(cfg, request, reference, module, row, class_names or cfg.DATASETS.get("CLASS_NAMES", ()))
    with tempfile.TemporaryDirectory(prefix=f".{request.path.name[-200:]}.", dir=request.path.parent) as folder:
        file = Path(folder, request.path.name)
        _write(module, description, file, request)
        comparison = None
        if pixels is not None:

            def write_again(changed: nn.Module) -> Path:
                """The same graph with other thresholds."""
                again = Path(folder, "again")
                again.mkdir(exist_ok=True)
                _write(changed, description, again / request.path.name, request)
                return again / request.path.name

            comparison = check_equal(file, cfg, reference, module, description, pixels, write_again)
        files = _move(file, request.path, request.overwrite)
    return Exported(request.path, files, description, comparison, tuple(notes))


def _copy(model: nn.Module) -> Any:
    """A copy on the CPU in evaluation mode."""
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def exportable(model: Any, request: Request) -> tuple[nn.Module, list[str]]:
    """Makes the module that is exported, and the names of its results. With another dtype it changes the model."""
    # OpenVINO's writer makes halves of float32 weights itself.
    dtype = torch.float32 if request.format == "openvino" else getattr(torch, request.dtype)
    if request.part == "backbone":
        backbone = ExportableBackbone(model, dtype).eval()
        return backbone, backbone.names
    detector = ExportableDetector(model, request.masks, dtype).eval()
    return detector, detector.names


def _fit_size(request: Request, model: Any) -> tuple[Request, list[str]]:
    """Rounds the size up to multiples of the backbone's divisibility, and says so."""
    unit = max(model.backbone.size_divisibility, 1)
    if request.size is None:
        return request, []
    height, width = (round_up(side, unit) for side in request.size)
    if (height, width) == tuple(request.size):
        return request, []
    asked = " x ".join(map(str, request.size))
    note = f"the size {asked} became {height} x {width}: height and width must be multiples of {unit}"
    return replace(request, size=(height, width)), [note]


def _describe(
    cfg: CfgNode, request: Request, model: Any, module: Any, row: str, class_names: Sequence[str]
) -> Description:
    """Says everything about the file. The shapes of results are found by running the module on an example."""
    detector = request.part == "detector"
    masks = module.masks if detector else "none"
    cfg = with_dcn_keys(cfg)
    description = Description(
        part=request.part,
        row=row,
        class_names=tuple(class_names),
        weights=cfg.MODEL.WEIGHTS,
        weights_digest=digest(model),
        channel_order=cfg.INPUT.FORMAT,
        pixel_mean=tuple(model.pixel_mean.flatten().tolist()),
        pixel_std=tuple(model.pixel_std.flatten().tolist()),
        size=request.size,
        size_divisibility=max(model.backbone.size_divisibility, 1),
        batch=request.batch,
        dtype=request.dtype,
        masks=masks,
        detections_per_image=0,
        min_size_test=cfg.INPUT.MIN_SIZE_TEST,
        max_size_test=cfg.INPUT.MAX_SIZE_TEST,
        resize_with=cfg.INPUT.RESIZE_WITH,
        inputs=input_tensors(model.pixel_mean.numel(), request.size, request.batch, masks == "pasted"),
        outputs=(),
        config=cfg.dump(),
        dcn_d2_version=__version__,
    )
    with torch.no_grad():
        results = module(*example_inputs(description))
    outputs = tuple(
        TensorInfo(name, str(result.dtype).removeprefix("torch."), _free_shape(result, name, description, model))
        for name, result in zip(module.names, results)
    )
    return replace(description, outputs=outputs, detections_per_image=results[0].shape[1] if detector else 0)


def _free_shape(result: Tensor, name: str, description: Description, model: Any) -> tuple[int | str, ...]:
    """The shape of a result, with names in place of sizes that are free."""
    shape: list[int | str] = list(result.shape)
    if description.batch is None:
        shape[0] = BATCH
    if description.part == "backbone" and description.size is None:
        stride = model.backbone.output_shape()[name].stride
        exact = description.size_divisibility % stride == 0
        shape[2:] = [f"{side}/{stride}" if exact else f"ceil({side}/{stride})" for side in (HEIGHT, WIDTH)]
    if description.masks == "pasted" and name == "masks":
        shape[2:] = [f"output_{HEIGHT}", f"output_{WIDTH}"]
    return tuple(shape)


def _write(module: nn.Module, description: Description, path: Path, request: Request) -> None:
    with torch.no_grad():
        format_module(request.format).write(module, example_inputs(description), description, path, **request.options)


def _move(file: Path, path: Path, overwrite: bool) -> dict[Path, int]:
    """Moves a file, and what was written beside it, to its place; gives the files and their sizes."""
    parts = {path.with_name(part.name): part for part in sorted(file.parent.iterdir()) if part.is_file()}
    check_free(parts, overwrite)  # another program may have written them meanwhile
    if len(parts) > 1:
        path.unlink(missing_ok=True)  # so that there is never a graph with another one's weights
    for target, part in parts.items():
        os.replace(part, target)
    return {target: target.stat().st_size for target in parts}

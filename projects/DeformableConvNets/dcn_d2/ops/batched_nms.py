# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression of many sets of boxes in one call, with a result of fixed shape: schema, shapes, fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import FLOAT_DTYPES, are_tensors, check, check_layout, check_shape, check_types, number
from ._library import define, has_kernel, register_fake, register_fallback

define("batched_nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")


def batched_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Tells which boxes non-maximum suppression keeps, for each row of a batch on its own.

    Boxes are taken from the highest score to the lowest, those of equal scores in their order. A box is kept unless it
    overlaps a kept one by more than `iou_threshold`. That is `torchvision.ops.nms`, but several sets of boxes are one
    call, and the result has the same shape whatever is kept. So models with it can be exported with fixed shapes.

    A box with score -inf is never kept and suppresses nothing, so rows may be filled up with such boxes. The same holds
    for a box or score that is NaN. Half precision is computed in float32. There are no gradients. It runs on the CPU
    for tensors on other devices too.

    Args:
        boxes: (B, R, 4) of (x0, y0, x1, y1), float64, float32, float16 or bfloat16.
        scores: (B, R), of the dtype of the boxes.
        iou_threshold: the intersection over union above which the box of the lower score goes.

    Returns:
        (B, R), bool: whether each box is kept.

    Raises:
        RuntimeError: A tensor's shape, dtype, device or layout does not fit; the message names it and both values.
        TypeError: An operand is not a tensor.
        ValueError: `iou_threshold` is not a number.

    Example:
        >>> import torch
        >>> from dcn_d2.ops import batched_nms
        >>> boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [5.0, 5.0, 6.0, 6.0]]])
        >>> batched_nms(boxes, torch.tensor([[0.8, 0.9, 0.1]]), 0.5)  # the first two overlap by 0.75
        tensor([[False,  True,  True]])
    """
    if not are_tensors((boxes, scores), ()):
        check_types("batched_nms", boxes=boxes, scores=scores)
    return torch.ops.dcn_d2.batched_nms(boxes, scores, number(iou_threshold, "iou_threshold"))


def _check_operands(boxes: Tensor, scores: Tensor) -> None:
    """Checks what `csrc/nms.h` checks, for the fallback and for tracing."""
    name = "batched_nms"
    check_layout(name, "boxes", boxes)
    check_layout(name, "scores", scores)
    check(
        boxes.dtype in FLOAT_DTYPES,
        lambda: f"{name}: boxes must be float64, float32, float16 or bfloat16, got {boxes.dtype}",
    )
    check(scores.dtype == boxes.dtype, lambda: f"{name}: scores has dtype {scores.dtype}, but boxes has {boxes.dtype}")
    check(
        scores.device == boxes.device, lambda: f"{name}: scores is on {scores.device}, but boxes is on {boxes.device}"
    )
    message = f"{name}: boxes must have shape [B, R, 4], got {list(boxes.shape)}"
    check(boxes.dim() == 3 and boxes.shape[2] == 4, lambda: message)
    check_shape(name, "scores", scores, boxes.shape[:2])


def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    _check_operands(boxes, scores)
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def _reference(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The same in plain torch, all rows side by side."""
    _check_operands(boxes, scores)
    if boxes.dtype in (torch.float16, torch.bfloat16):
        boxes, scores = boxes.float(), scores.float()
    takes_part = (scores > -torch.inf) & ~boxes.isnan().any(-1)
    order = scores.masked_fill(~takes_part, -torch.inf).argsort(dim=1, descending=True, stable=True)
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    kept = takes_part.gather(1, order)
    x0, y0, x1, y1 = boxes.unbind(-1)
    area = (x1 - x0) * (y1 - y0)
    # Those that take part come first in each row, so the longest such start is all that there is to do.
    for i in range(int(kept.sum(1).max()) if kept.numel() else 0):
        width = torch.minimum(x1, x1[:, i, None]) - torch.maximum(x0, x0[:, i, None])
        height = torch.minimum(y1, y1[:, i, None]) - torch.maximum(y0, y0[:, i, None])
        both = width.clamp(min=0) * height.clamp(min=0)
        overlap = both / (area[:, i, None] + area - both)
        suppressed = (overlap.double() > iou_threshold) & kept[:, i, None]
        kept[:, i + 1 :] &= ~suppressed[:, i + 1 :]
    return torch.zeros_like(kept).scatter(1, order, kept)


# The compiled kernels serve every device.
if not has_kernel("batched_nms", "CompositeExplicitAutograd"):
    register_fallback("batched_nms", _reference)
register_fake("batched_nms", _fake)

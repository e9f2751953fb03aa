# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""batched_nms keeps, in every row, what `torchvision.ops.nms` keeps; compiled, and as the reference in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dcn_d2.ops import batched_nms
from dcn_d2.ops.batched_nms import _reference

Nms = Callable[[Tensor, Tensor, float], Tensor]

both = pytest.mark.parametrize("nms", [batched_nms, _reference], ids=["compiled", "reference"])
INF, NAN = float("inf"), float("nan")


def random_boxes(batch: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Boxes of which many overlap, some exactly, and scores of which several are equal."""
    boxes = torch.randint(0, 12, (batch, count, 4)).to(dtype)
    boxes[..., 2:] = boxes[..., :2] + 1 + boxes[..., 2:] / 3
    return boxes, (torch.rand(batch, count) * 40).round().to(dtype) / 40


def expected_kept(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    torchvision = pytest.importorskip("torchvision")
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row, (of_row, score) in enumerate(zip(boxes, scores)):
        valid = (score > -INF).nonzero().flatten()
        # torchvision's order of equal scores is not fixed, so the boxes are given to it in an order of different ones.
        order = valid[score[valid].argsort(descending=True, stable=True)]
        ranks = torch.arange(len(order), 0, -1, dtype=torch.float32).to(of_row)
        kept[row, order[torchvision.ops.nms(of_row[order], ranks, iou_threshold)]] = True
    return kept


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_keeps_what_torchvision_keeps(nms: Nms, dtype: torch.dtype, threshold: float) -> None:
    boxes, scores = random_boxes(6, 70, dtype)
    scores[1, ::3] = -INF
    scores[2] = -INF
    scores[3, 1:] = -INF
    kept = nms(boxes, scores, threshold)
    assert torch.equal(kept, expected_kept(boxes, scores, threshold))
    assert 0 < int(kept.sum()) < kept.numel()
    assert not kept[2].any() and kept[3].sum() == 1


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(nms: Nms, dtype: torch.dtype) -> None:
    boxes, scores = random_boxes(3, 50, dtype)
    assert torch.equal(nms(boxes, scores, 0.4), nms(boxes.float(), scores.float(), 0.4))


@both
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_without_boxes(nms: Nms, shape: tuple[int, int]) -> None:
    kept = nms(torch.zeros(*shape, 4), torch.zeros(shape), 0.5)
    assert kept.shape == shape and kept.dtype == torch.bool


@both
def test_equal_scores_and_equal_boxes_keep_the_first(nms: Nms) -> None:
    boxes = torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(1, 4, 4)
    assert nms(boxes, torch.full((1, 4), 0.5), 0.5).tolist() == [[True, False, False, False]]
    assert nms(boxes, torch.tensor([[0.1, 0.3, 0.3, 0.2]]), 0.5).tolist() == [[False, True, False, False]]
    assert nms(boxes, torch.full((1, 4), 0.5), 1.0).all()  # none overlaps by more than 1


@both
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_the_threshold_itself_is_compared_as_torchvision_does(nms: Nms, threshold: float) -> None:
    """0.1 in float32 is greater than 0.1, and 0.7 in float32 is less than 0.7."""
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 10 * threshold, 1.0]]])
    scores = torch.tensor([[0.9, 0.8]])
    assert torch.equal(nms(boxes, scores, threshold), expected_kept(boxes, scores, threshold))


@both
def test_boxes_of_no_area_and_infinite_boxes_suppress_nothing(nms: Nms) -> None:
    boxes = torch.tensor([[[1.0, 1, 1, 1], [1, 1, 1, 1], [-INF, 0, INF, 9], [0, 0, 2, 2], [3, 3, 1, 1]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    assert torch.equal(nms(boxes, scores, 0.5), expected_kept(boxes, scores, 0.5))
    assert nms(boxes, scores, 0.5).all()


@both
def test_nan_is_never_kept_and_suppresses_nothing(nms: Nms) -> None:
    boxes = torch.tensor([0.0, 0.0, 4.0, 4.0]).repeat(2, 3, 1)
    boxes[0, 0, 2] = NAN
    scores = torch.tensor([[0.9, 0.8, 0.1], [NAN, 0.3, 0.6]])
    assert nms(boxes, scores, 0.5).tolist() == [[False, True, False], [False, False, True]]
    assert not nms(boxes, torch.full((2, 3), NAN), 0.5).any()


@both
def test_infinite_scores_come_first(nms: Nms) -> None:
    boxes = torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(1, 3, 4)
    assert nms(boxes, torch.tensor([[0.9, INF, -INF]]), 0.5).tolist() == [[False, True, False]]


def test_operands_may_be_views_and_need_no_gradient() -> None:
    boxes, scores = random_boxes(3, 40)
    expected = batched_nms(boxes, scores, 0.5)
    views = boxes.permute(2, 0, 1).contiguous().permute(1, 2, 0), scores.T.contiguous().T
    assert torch.equal(batched_nms(*views, 0.5), expected)
    kept = batched_nms(boxes.requires_grad_(), scores.requires_grad_(), 0.5)
    assert torch.equal(kept, expected) and not kept.requires_grad


def test_kernels_are_compiled_for_every_device() -> None:
    for key in ("CPU", "CompositeExplicitAutograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("dcn_d2::batched_nms", key)
    boxes, scores = random_boxes(2, 30)
    by_cpu = torch.ops.dcn_d2.batched_nms.default._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd, boxes, scores, 0.5
    )
    assert torch.equal(by_cpu, batched_nms(boxes, scores, 0.5))


@pytest.mark.gpu
def test_keeps_the_same_on_a_gpu() -> None:
    boxes, scores = random_boxes(4, 60)
    kept = batched_nms(boxes.cuda(), scores.cuda(), 0.5)
    assert kept.is_cuda and torch.equal(kept.cpu(), batched_nms(boxes, scores, 0.5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(2, 3), r"boxes must have shape \[B, R, 4\], got \[2, 3, 5\]"),
        (torch.zeros(3, 4), torch.zeros(3), r"boxes must have shape \[B, R, 4\], got \[3, 4\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), r"scores must have shape \[2, 3\], got \[2, 4\]"),
        (torch.zeros(2, 3, 4), torch.zeros(6), r"scores must have shape \[2, 3\], got \[6\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).double(), "scores has dtype torch.float64, but boxes has torch.float"),
        (torch.zeros(2, 3, 4).int(), torch.zeros(2, 3).int(), "boxes must be float64, float32, float16 or bfloat16"),
    ],
)
def test_bad_operands_are_named(boxes: Tensor, scores: Tensor, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=f"^batched_nms: {message}"):
        batched_nms(boxes.to(device), scores.to(device), 0.5)


def test_bad_arguments_are_named() -> None:
    boxes, scores = random_boxes(1, 2)
    with pytest.raises(TypeError, match="batched_nms: scores must be a tensor, got a list"):
        batched_nms(boxes, [0.5], 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iou_threshold must be a number"):
        batched_nms(boxes, scores, "half")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="scores is on meta, but boxes is on cpu"):
        batched_nms(boxes, scores.to("meta"), 0.5)


class Keep(torch.nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return batched_nms(boxes, scores, 0.5)


@pytest.mark.unsanitized
def test_opcheck_and_export_with_free_sizes() -> None:
    boxes, scores = random_boxes(2, 20)
    torch.library.opcheck(torch.ops.dcn_d2.batched_nms.default, (boxes, scores, 0.5))
    batch, count = torch.export.Dim("batch"), torch.export.Dim("count")
    sizes = {0: batch, 1: count}
    program = torch.export.export(Keep(), (boxes, scores), dynamic_shapes=(sizes, sizes))
    for shape in ((2, 20), (5, 33)):
        operands = random_boxes(*shape)
        assert torch.equal(program.module()(*operands), batched_nms(*operands, 0.5))

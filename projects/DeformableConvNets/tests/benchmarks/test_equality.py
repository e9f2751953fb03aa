# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Whoever computes something else than the reference is found."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import deform_conv2d, deform_roi_pool, detector, layer, on_cuda

from ..slim import SLIM
from .helpers import DTYPES, WIDE, relative_error, spoilt, wide_pooling


def test_torchvision_computes_bfloat16_in_float32_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution = deform_conv2d.Layer(deform_conv2d.Shape("tiny", 32, 4, 5), "cpu", torch.bfloat16)
    dtypes = set()

    def operator(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        dtypes.update(t.dtype for t in (x, offset, weight, rest[-1]))
        return x

    monkeypatch.setattr(torchvision.ops, "deform_conv2d", operator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        names = ("input", "weight", "offset", "mask")
        tensors = [torch.empty(getattr(convolution, name).shape, device="cuda", dtype=torch.bfloat16) for name in names]
        output = convolution.theirs(*tensors)
    assert dtypes == {torch.float32} and output.dtype == torch.bfloat16 and output.device.type == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions_are_compared_with_torchvision_in_float32(dtype: torch.dtype) -> None:
    convolution = deform_conv2d.Layer(deform_conv2d.Shape(**WIDE), "cpu", dtype)
    for backward in (False, True):
        failed: dict[str, str] = {}
        deform_conv2d.check_equal(
            convolution, deform_conv2d.TOLERANCES[str(dtype).removeprefix("torch.")], failed, backward
        )
        assert not failed
    if dtype == torch.float16:  # what torchvision computes in it would be no measure
        theirs = convolution.contestants(False)["torchvision"]()
        assert relative_error(theirs, convolution.reference(False)[0]) > 0.03


def test_the_reference_does_not_round_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda.set_precision("tf32")
    allowed = []

    def operator(x: torch.Tensor, *_: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return x

    monkeypatch.setattr(torchvision.ops, "deform_conv2d", operator)
    deform_conv2d.Layer(deform_conv2d.Shape("tiny", 32, 4, 5), "cpu", torch.float32).reference(False)
    assert allowed == [False] and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_convolutions_are_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(layer, "deform_conv2d", spoilt(layer.deform_conv2d))
    convolution = deform_conv2d.Layer(deform_conv2d.Shape(**WIDE), "cpu", dtype)
    for backward, words in ((False, "its output differs"), (True, "its input's gradient differs")):
        failed: dict[str, str] = {}
        deform_conv2d.check_equal(
            convolution, deform_conv2d.TOLERANCES[str(dtype).removeprefix("torch.")], failed, backward
        )
        assert set(failed) == {"dcn_d2 NCHW", "dcn_d2 NHWC"}
        assert failed["dcn_d2 NHWC"].startswith(words) and re.search(r"by 0\.(1|09)", failed["dcn_d2 NHWC"])


@pytest.mark.parametrize("name", ["weight", "offset", "mask"])
def test_wrong_gradients_are_found(name: str) -> None:
    names = ["input", "weight", "offset", "mask"]
    expected = [torch.randn(100) for _ in names]
    actual = [e * (1.1 if n == name else 1) for n, e in zip(names, expected)]
    assert f"its {name}'s gradient differs" in deform_conv2d._difference(actual, expected, 0.02, branch=False)
    assert not deform_conv2d._difference(expected, expected, 0.0, branch=False)
    assert not deform_conv2d._difference([*expected[:2], torch.zeros(9)], expected, 0.0, branch=True)


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_is_compared_with_roi_align_in_float32(dtype: torch.dtype, sampling: int) -> None:
    pooling = wide_pooling(deform_roi_pool, dtype, sampling)
    assert deform_roi_pool.check_equal(pooling) == {}
    if dtype == torch.float16:  # the one that is timed is in float16, and would be no measure
        timed = pooling.contestants(backward=False)["roi_align NCHW"]()
        assert timed.dtype == dtype and relative_error(timed, pooling.roi_align(pooling.input, torch.float32)) > 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_pooling_is_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    right = deform_roi_pool.deform_roi_pool

    def wrong_in_channels_last(x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return right(x, *arguments, **keywords) * (1 if x.is_contiguous() else 1.1)

    monkeypatch.setattr(deform_roi_pool, "deform_roi_pool", wrong_in_channels_last)
    assert set(deform_roi_pool.check_equal(wide_pooling(deform_roi_pool, dtype))) == {
        f"{m} NHWC" for m in deform_roi_pool.MODES[:3]
    }
    monkeypatch.setattr(deform_roi_pool, "deform_roi_pool", spoilt(right))
    assert set(deform_roi_pool.check_equal(wide_pooling(deform_roi_pool, dtype))) == {
        "plain NCHW",
        "plain NHWC",
        "modulated NCHW",
    }


def test_a_detector_that_pools_fewer_boxes_is_not_compared() -> None:
    models = detector.Detector((64, 96), SLIM, "cpu", torch.float32)
    assert detector.check_equal(models, detector.TOLERANCES["float32"]) == {}
    generator = models.models["plain NHWC"].proposal_generator
    generator.register_forward_hook(lambda _, inputs, output: ([output[0][0][:1]], output[1]))
    failed = detector.check_equal(models, detector.TOLERANCES["float32"])
    assert list(failed) == ["plain NHWC"] and failed["plain NHWC"].startswith("pools 1 boxes, another model ")


def test_a_detector_whose_trunk_differs_is_found() -> None:
    models = detector.Detector((64, 96), SLIM, "cpu", torch.float32)
    models.models["plain NHWC"].backbone.bottom_up.register_forward_hook(
        lambda _, inputs, output: {name: features * 1.1 for name, features in output.items()}
    )
    failed = detector.check_equal(models, detector.TOLERANCES["float32"])
    assert list(failed) == ["plain NHWC"]
    assert re.match(r"its trunk differs from plain NCHW in \w+ by 0\.(1|09)\d* \(relative\)", failed["plain NHWC"])
    assert detector.check_equal(models, 0.2) == {}  # what is allowed counts

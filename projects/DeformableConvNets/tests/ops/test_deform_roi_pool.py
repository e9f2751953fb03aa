# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import functools
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcn_d2.ops import deform_roi_pool, reference

from .samples import DEVICES, ROI_SAMPLES, RoiSample, assert_same, by_name, gradients

parametrize_samples = pytest.mark.parametrize("sample", ROI_SAMPLES, ids=by_name)
parametrize_devices = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def oracle(sample: RoiSample, **operands: Any) -> Tensor:
    return reference.deform_roi_pool(**operands, **sample.arguments)


def compiled(sample: RoiSample, **operands: Any) -> Tensor:
    return deform_roi_pool(**operands, **sample.arguments)


@parametrize_devices
@parametrize_samples
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(sample: RoiSample, dtype: torch.dtype, device: str) -> None:
    operands = sample.tensors(dtype, device)
    exact = {name: t.double() if isinstance(t, Tensor) else t for name, t in operands.items()}
    actual = gradients(functools.partial(compiled, sample), operands)
    assert all(t.dtype == dtype for t in actual.values())
    assert_same(actual, gradients(functools.partial(oracle, sample), exact), TOLERANCE[dtype])


@parametrize_devices
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 5])
def test_zero_offset_equals_torchvision_roi_align(sampling_ratio: int, device: str) -> None:
    sample = RoiSample("align", geometry={"sampling_ratio": sampling_ratio})
    operands = sample.tensors(torch.float64, device)
    expected = torchvision.ops.roi_align(
        operands["input"], operands["rois"], (3, 2), sample.spatial_scale, sampling_ratio, aligned=True
    )
    for offset in (None, torch.zeros_like(operands["offset"])):
        actual = deform_roi_pool(operands["input"], operands["rois"], offset, **sample.arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@parametrize_devices
@parametrize_samples
def test_gradcheck(sample: RoiSample, device: str) -> None:
    operands = sample.tensors(torch.float64, device)
    leaves = {n: t.requires_grad_() for n, t in operands.items() if isinstance(t, Tensor) and n != "rois"}

    def function(*tensors: Tensor) -> Tensor:
        return compiled(sample, **(operands | dict(zip(leaves, tensors))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize("sample", [ROI_SAMPLES[0], ROI_SAMPLES[2], ROI_SAMPLES[-1]], ids=by_name)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(sample: RoiSample, memory_format: torch.memory_format) -> None:
    operands = sample.tensors()
    operands["input"] = operands["input"].contiguous(memory_format=memory_format)
    for name, tensor in operands.items():
        if isinstance(tensor, Tensor) and name != "rois":
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.dcn_d2.deform_roi_pool.default,
        (operands["input"], operands["rois"], operands["offset"]),
        dict(sample.arguments, output_size=list(sample.output_size), mask=operands.get("mask")),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    coordinate = st.floats(-30, 60, width=16)
    batch = number(1, 3)
    sample = RoiSample(
        "any",
        batch=batch,
        channels=number(1, 20),
        size=(number(1, 9), number(1, 9)),
        output_size=(number(1, 4), number(1, 4)),
        spatial_scale=data.draw(st.sampled_from([1.0, 0.5, 0.0625])),
        geometry={"sampling_ratio": number(0, 3), "gamma": data.draw(st.sampled_from([0.0, 0.1, 1.0]))},
        offset=data.draw(st.booleans()),
        mask=data.draw(st.booleans()),
        rois=tuple((number(0, batch - 1), *(data.draw(coordinate) for _ in range(4))) for _ in range(number(0, 3))),
    )
    operands = sample.tensors(seed=number(0, 9))
    expected = gradients(functools.partial(oracle, sample), operands)
    assert_same(gradients(functools.partial(compiled, sample), operands), expected, 1e-10)


def test_hand_checkable_numbers() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)  # value 8y + x
    rois = torch.tensor([[0, 1.0, 2.0, 5.0, 4.0]])  # 4 wide, 2 high
    plain = deform_roi_pool(image, rois, None, (1, 1))
    assert plain.item() == pytest.approx(8 * 2.5 + 2.5)  # the RoI's centre (3, 3) less half a pixel
    offset = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)  # in x, then in y
    moved = deform_roi_pool(image, rois, offset, (1, 1), gamma=0.1)
    assert moved.item() == pytest.approx(plain.item() + 0.1 * 4 * 1 + 8 * 0.1 * 2 * 2, rel=1e-6)
    masked = deform_roi_pool(image, rois, offset, (1, 1), gamma=0.1, mask=torch.full((1, 1, 1, 1), 0.25))
    assert masked.item() == pytest.approx(moved.item() / 4)


@parametrize_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30], ids=str)
def test_wild_offsets_read_zero(bad: float, device: str) -> None:
    sample = RoiSample("wild")
    operands = sample.tensors(torch.float32, device)
    operands["offset"][:, :, 1] = bad
    found = gradients(functools.partial(compiled, sample), operands)
    assert not found["output"][:, :, 1].any() and found["output"][0, :, 0].all()
    assert all(bool(torch.isfinite(t).all()) for t in found.values())
    assert not found["offset"][:, :, 1].any()


@parametrize_devices
def test_rois_without_area_or_not_finite_give_zero(device: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [(0, 5, 5, 5, 5), (0, 9, 9, 3, 3), (0, nan, 1, 5, 5), (0, 1, 1, inf, 5), (0, -inf, -inf, inf, inf)]
    sample = RoiSample("empty", rois=tuple(rows))
    found = gradients(functools.partial(compiled, sample), sample.tensors(torch.float32, device))
    assert not found["output"].any() and not found["input"].any() and not found["offset"].any()


@parametrize_devices
def test_a_roi_far_larger_than_the_map_takes_no_time(device: str) -> None:
    image = torch.ones(1, 2, 6, 5, device=device)
    rois = torch.tensor([[0, -1e12, -1e12, 1e12, 1e12]], device=device)
    assert deform_roi_pool(image, rois, None, (3, 3)).abs().max() < 1e-6  # all but a few samples are off the map


def test_batch_index_outside_the_batch() -> None:
    sample = RoiSample("index", rois=((0, 1.0, 1.0, 5.0, 5.0), (2, 1.0, 1.0, 5.0, 5.0)))
    with pytest.raises(RuntimeError, match=r"rois\[1\] names image 2, but input has 2 images"):
        compiled(sample, **sample.tensors())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")
def test_batch_index_outside_the_batch_is_nan_on_cuda() -> None:
    sample = RoiSample("index", rois=((0, 1.0, 1.0, 5.0, 5.0), (2, 1.0, 1.0, 5.0, 5.0)))
    output = compiled(sample, **sample.tensors(device="cuda"))
    assert torch.isfinite(output[0]).all() and output[1].isnan().all()


@parametrize_devices
def test_memory_format_is_accepted(device: str) -> None:
    sample = RoiSample("format")
    operands = sample.tensors(torch.float32, device)
    last = operands | {"input": operands["input"].contiguous(memory_format=torch.channels_last)}
    expected, actual = (gradients(functools.partial(compiled, sample), each) for each in (operands, last))
    assert actual["input"].is_contiguous(memory_format=torch.channels_last)
    assert_same(actual, expected, 1e-6)


@parametrize_devices
def test_autocast_keeps_rois_in_float32(device: str) -> None:
    sample = RoiSample("autocast", size=(60, 80), rois=((0, 1001.3, 900.7, 1207.9, 955.1),), spatial_scale=0.0625)
    operands = sample.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        actual = compiled(sample, **operands)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), compiled(sample, **operands), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    sample = RoiSample("threads", channels=70)
    operands = sample.tensors()
    try:
        torch.set_num_threads(threads)
        actual = gradients(functools.partial(compiled, sample), operands)
    finally:
        torch.set_num_threads(before)
    assert_same(actual, gradients(functools.partial(oracle, sample), operands), 1e-10)


BAD_OPERANDS: list[tuple[dict[str, Any], str]] = [
    ({"input": torch.zeros(3, 10, 13)}, r"input must have 4 dimensions, got \[3, 10, 13\]"),
    ({"rois": torch.zeros(3, 4)}, r"rois must have shape \[R, 5\], got \[3, 4\]"),
    ({"rois": torch.zeros(5)}, r"rois must have 2 dimensions, got \[5\]"),
    ({"rois": torch.zeros(3, 5, dtype=torch.float64)}, r"rois has dtype .*, but input has"),
    ({"offset": torch.zeros(3, 1, 3, 2)}, r"offset must have shape \[3, 2, 3, 2\], got \[3, 1, 3, 2\]"),
    ({"offset": torch.zeros(2, 2, 3, 2)}, r"offset must have shape \[3, 2, 3, 2\], got \[2, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 2, 3, 2)}, r"mask must have shape \[3, 1, 3, 2\], got \[3, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 1, 3, 2, dtype=torch.float16)}, r"mask has dtype .*, but input has"),
    ({"input": torch.zeros(2, 3, 10, 13, dtype=torch.int32)}, r"input must be float64, float32, float16 or bfloat16"),
    ({"output_size": (0, 2)}, r"output_size must be .*at least 1, got \[0, 2\]"),
    ({"sampling_ratio": -1}, r"sampling_ratio must be at least 0, got -1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPERANDS)
@pytest.mark.parametrize("path", ["compiled", "fake"])
def test_bad_operands_are_named(change: dict[str, Any], message: str, path: str) -> None:
    sample = RoiSample("good")
    operands = sample.tensors(torch.float32) | sample.arguments | change
    if path == "fake":
        operands = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in operands.items()}
    with pytest.raises(RuntimeError, match="deform_roi_pool: " + message):
        deform_roi_pool(**operands)

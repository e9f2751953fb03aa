# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What holds for every RoI pooling operator; what is special to one is in its own file."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import dcn_d2.ops
from dcn_d2.ops import reference

from .samples import DEVICES, PSROI_SAMPLES, ROI_SAMPLES, RoiSample, assert_same, gradients, number_of_threads

SAMPLES = {"deform_roi_pool": ROI_SAMPLES, "deform_psroi_pool": PSROI_SAMPLES}
parametrize_operators = pytest.mark.parametrize("name", SAMPLES)
parametrize_samples = pytest.mark.parametrize(
    ("name", "sample"),
    [pytest.param(name, sample, id=f"{name}-{sample.name}") for name, samples in SAMPLES.items() for sample in samples],
)
parametrize_devices = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def oracle(name: str, sample: RoiSample, **operands: Any) -> Tensor:
    return getattr(reference, name)(**operands, **sample.arguments)


def compiled(name: str, sample: RoiSample, **operands: Any) -> Tensor:
    return getattr(dcn_d2.ops, name)(**operands, **sample.arguments)


@parametrize_devices
@parametrize_samples
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(name: str, sample: RoiSample, dtype: torch.dtype, device: str) -> None:
    operands = sample.tensors(dtype, device)
    exact = {key: t.double() if isinstance(t, Tensor) else t for key, t in operands.items()}
    actual = gradients(functools.partial(compiled, name, sample), operands)
    assert all(t.dtype == dtype for t in actual.values())
    assert_same(actual, gradients(functools.partial(oracle, name, sample), exact), TOLERANCE[dtype])


@parametrize_devices
@parametrize_samples
def test_gradcheck(name: str, sample: RoiSample, device: str) -> None:
    operands = sample.tensors(torch.float64, device)
    leaves = {n: t.requires_grad_() for n, t in operands.items() if isinstance(t, Tensor) and n != "rois"}

    def function(*tensors: Tensor) -> Tensor:
        return compiled(name, sample, **(operands | dict(zip(leaves, tensors))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), nondet_tol=1e-9, fast_mode=True)


@parametrize_operators
@pytest.mark.parametrize("index", [0, 2, -1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(name: str, index: int, memory_format: torch.memory_format) -> None:
    sample = SAMPLES[name][index]
    operands = sample.tensors()
    operands["input"] = operands["input"].contiguous(memory_format=memory_format)
    for operand, tensor in operands.items():
        if isinstance(tensor, Tensor) and operand != "rois":
            tensor.requires_grad_()
    torch.library.opcheck(
        getattr(torch.ops.dcn_d2, name).default,
        (operands["input"], operands["rois"], operands["offset"]),
        dict(sample.arguments, output_size=list(sample.output_size), mask=operands.get("mask")),
    )


@parametrize_operators
@parametrize_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30], ids=str)
def test_wild_offsets_read_zero(name: str, bad: float, device: str) -> None:
    sample = RoiSample("wild")
    operands = sample.tensors(torch.float32, device)
    operands["offset"][:, :, 1] = bad
    operands["rois"][0] = torch.tensor([0, 4.0, 4.0, 36.0, 28.0])
    found = gradients(functools.partial(compiled, name, sample), operands)
    assert not found["output"][:, :, 1].any() and found["output"][0, :, 0].all()
    assert all(bool(torch.isfinite(t).all()) for t in found.values())
    assert not found["offset"][:, :, 1].any()


@parametrize_operators
def test_batch_index_outside_the_batch(name: str) -> None:
    sample = RoiSample("index", rois=((0, 1.0, 1.0, 5.0, 5.0), (2, 1.0, 1.0, 5.0, 5.0)))
    with pytest.raises(RuntimeError, match=r"rois\[1\] names image 2, but input has 2 images"):
        compiled(name, sample, **sample.tensors())


@parametrize_operators
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")
def test_batch_index_outside_the_batch_is_nan_on_cuda(name: str) -> None:
    sample = RoiSample("index", rois=((0, 1.0, 1.0, 5.0, 5.0), (2, 1.0, 1.0, 5.0, 5.0)))
    output = compiled(name, sample, **sample.tensors(device="cuda"))
    assert torch.isfinite(output[0]).all() and output[1].isnan().all()


@parametrize_operators
@parametrize_devices
def test_memory_format_is_accepted(name: str, device: str) -> None:
    sample = RoiSample("format")
    operands = sample.tensors(torch.float32, device)
    last = operands | {"input": operands["input"].contiguous(memory_format=torch.channels_last)}
    expected, actual = (gradients(functools.partial(compiled, name, sample), each) for each in (operands, last))
    assert actual["input"].is_contiguous(memory_format=torch.channels_last)
    assert_same(actual, expected, 1e-6)


@parametrize_operators
@parametrize_devices
def test_autocast_keeps_rois_in_float32(name: str, device: str) -> None:
    sample = RoiSample("autocast", size=(60, 80), rois=((0, 1001.3, 900.7, 1207.9, 955.1),), spatial_scale=0.0625)
    operands = sample.tensors(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        actual = compiled(name, sample, **operands)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), compiled(name, sample, **operands), rtol=0.03, atol=0.03)


@parametrize_operators
def test_rois_in_float32_fit_maps_in_float64(name: str) -> None:
    # Detectron2's boxes are float32 always.
    operands = RoiSample("mixed").tensors(torch.float64)
    operands["rois"] = operands["rois"].float()
    expected = compiled(name, RoiSample("mixed"), **operands | {"rois": operands["rois"].double()})
    assert torch.equal(compiled(name, RoiSample("mixed"), **operands), expected)


@parametrize_operators
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(name: str, threads: int) -> None:
    sample = RoiSample("threads", channels=70)
    operands = sample.tensors()
    with number_of_threads(threads):
        actual = gradients(functools.partial(compiled, name, sample), operands)
    assert_same(actual, gradients(functools.partial(oracle, name, sample), operands), 1e-10)


# What is replaced in the operands of `RoiSample("good")`, and what the message must name.
COMMON: list[tuple[dict[str, Any], str]] = [
    ({"input": torch.zeros(3, 10, 13)}, r"input must have 4 dimensions, got \[3, 10, 13\]"),
    ({"rois": torch.zeros(3, 4)}, r"rois must have shape \[R, 5\], got \[3, 4\]"),
    ({"rois": torch.zeros(5)}, r"rois must have 2 dimensions, got \[5\]"),
    ({"rois": torch.zeros(3, 5, dtype=torch.float64)}, r"rois has dtype .*, but input has"),
    ({"offset": torch.zeros(2, 2, 3, 2)}, r"offset must have shape \[3, 2, 3, 2\], got \[2, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 2, 3, 2)}, r"mask must have shape \[3, 1, 3, 2\], got \[3, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 1, 3, 2, dtype=torch.float16)}, r"mask has dtype .*, but input has"),
    ({"input": torch.zeros(2, 3, 10, 13, dtype=torch.int32)}, r"input must be float64, float32, float16 or bfloat16"),
    ({"output_size": (0, 2)}, r"output_size must be .*at least 1, got \[0, 2\]"),
]
OWN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "deform_roi_pool": [
        ({"offset": torch.zeros(3, 1, 3, 2)}, r"offset must have shape \[3, 2, 3, 2\], got \[3, 1, 3, 2\]"),
        ({"sampling_ratio": -1}, r"sampling_ratio must be at least 0, got -1"),
    ],
    "deform_psroi_pool": [
        ({"offset": torch.zeros(3, 1, 3, 2)}, r"offset has 1 channels.*the 3 output channels"),
        ({"input": torch.zeros(2, 3, 10, 13), "group_size": 2}, r"input has 3 channels.*group_size\^2 = 4"),
        ({"offset": torch.zeros(3, 3, 3, 2)}, r"offset has 3 channels.*the 3 output channels"),
        ({"offset": torch.zeros(3, 4, 3, 2)}, r"offset has 4 channels.*the 3 output channels"),
        ({"part_size": (2, 2)}, r"offset must have shape \[3, 2, 2, 2\], got \[3, 2, 3, 2\]"),
        ({"part_size": (0, 2)}, r"part_size must be .*at least 1, got \[0, 2\]"),
        ({"group_size": 0}, r"group_size must be at least 1, got"),
        ({"sample_per_part": 0}, r"sample_per_part must be at least 1, got"),
    ],
}
BAD_OPERANDS = [(name, *bad) for name, own in OWN.items() for bad in COMMON + own]


@pytest.mark.parametrize(("name", "change", "message"), BAD_OPERANDS)
@pytest.mark.parametrize("path", ["compiled", "fake"])
def test_bad_operands_are_named(name: str, change: dict[str, Any], message: str, path: str) -> None:
    sample = RoiSample("good")
    operands = sample.tensors(torch.float32) | sample.arguments | change
    if path == "fake":
        operands = {key: t.to("meta") if isinstance(t, Tensor) else t for key, t in operands.items()}
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        getattr(dcn_d2.ops, name)(**operands)

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcn_d2.ops import deform_psroi_pool, reference

from .samples import DEVICES, PSROI_SAMPLES, RoiSample, assert_same, by_name, gradients

parametrize_samples = pytest.mark.parametrize("sample", PSROI_SAMPLES, ids=by_name)
parametrize_devices = pytest.mark.parametrize("device", DEVICES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def oracle(sample: RoiSample, **operands: Any) -> Tensor:
    return reference.deform_psroi_pool(**operands, **sample.arguments)


def compiled(sample: RoiSample, **operands: Any) -> Tensor:
    return deform_psroi_pool(**operands, **sample.arguments)


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
@parametrize_samples
def test_gradcheck(sample: RoiSample, device: str) -> None:
    operands = sample.tensors(torch.float64, device)
    leaves = {n: t.requires_grad_() for n, t in operands.items() if isinstance(t, Tensor) and n != "rois"}

    def function(*tensors: Tensor) -> Tensor:
        return compiled(sample, **(operands | dict(zip(leaves, tensors))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize("sample", [PSROI_SAMPLES[0], PSROI_SAMPLES[2], PSROI_SAMPLES[-1]], ids=by_name)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(sample: RoiSample, memory_format: torch.memory_format) -> None:
    operands = sample.tensors()
    operands["input"] = operands["input"].contiguous(memory_format=memory_format)
    for name, tensor in operands.items():
        if isinstance(tensor, Tensor) and name != "rois":
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.dcn_d2.deform_psroi_pool.default,
        (operands["input"], operands["rois"], operands["offset"]),
        dict(sample.arguments, output_size=list(sample.output_size), mask=operands.get("mask")),
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    # Odd eighths: a sample never falls exactly on a bound of the map, where rounding decides whether it counts.
    coordinate = st.integers(-120, 240).map(lambda n: (2 * n + 1) / 8)
    batch, group_size, classes = number(1, 3), number(1, 3), number(1, 2)
    channels, part_size = classes * number(1, 20), (number(1, 4), number(1, 4))
    sample = RoiSample(
        "any",
        batch=batch,
        channels=channels,
        input_channels=channels * group_size**2,
        size=(number(1, 9), number(1, 9)),
        output_size=(number(1, 4), number(1, 4)),
        spatial_scale=data.draw(st.sampled_from([1.0, 0.5, 0.0625])),
        offset_shape=(2 * classes, *part_size),
        geometry={
            "group_size": group_size,
            "part_size": part_size,
            "sample_per_part": number(1, 5),
            "trans_std": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        },
        offset=data.draw(st.booleans()),
        mask=data.draw(st.booleans()),
        rois=tuple((number(0, batch - 1), *(data.draw(coordinate) for _ in range(4))) for _ in range(number(0, 3))),
    )
    operands = sample.tensors(seed=number(0, 9))
    expected = gradients(functools.partial(oracle, sample), operands)
    assert_same(gradients(functools.partial(compiled, sample), operands), expected, 1e-10)


def test_hand_checkable_numbers() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)  # value 8y + x
    rois = torch.tensor([[0, 1.2, 1.8, 4.0, 3.4]])  # rounds to (1, 2, 4, 3): 4 wide and 2 high, the last one included
    plain = deform_psroi_pool(image, rois, None, (1, 1))
    # Samples at 0.5 + (0, 1, 2, 3) in x and 1.5 + (0, 0.5, 1, 1.5) in y.
    assert plain.item() == pytest.approx(8 * 2.25 + 2.0)
    offset = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)  # in x, then in y
    moved = deform_psroi_pool(image, rois, offset, (1, 1), trans_std=0.1)
    assert moved.item() == pytest.approx(plain.item() + 0.1 * 4 * 1 + 8 * 0.1 * 2 * 2, rel=1e-6)
    masked = deform_psroi_pool(image, rois, offset, (1, 1), mask=torch.full((1, 1, 1, 1), 0.25))
    assert masked.item() == pytest.approx(moved.item() / 4)


def test_samples_off_the_map_do_not_count() -> None:
    image = torch.ones(1, 1, 4, 4)
    inside_and_outside = torch.tensor([[0, -8.0, -8.0, 3.0, 3.0], [0, 50.0, 50.0, 60.0, 60.0]])
    output = deform_psroi_pool(image, inside_and_outside, None, (1, 1))
    assert output.flatten().tolist() == [1.0, 0.0]  # the mean of those on the map; nothing where there is none


def test_corners_round_half_away_from_zero() -> None:
    image = torch.arange(12.0).reshape(1, 1, 1, 12).expand(1, 1, 12, 12)
    for corner, rounded in ((2.5, 3.0), (3.5, 4.0), (4.4, 4.0)):
        rois = torch.tensor([[0, corner, 2, 9, 9], [0, rounded, 2, 9, 9]])
        output = deform_psroi_pool(image, rois, None, (1, 1))
        assert output[0] == output[1]


def test_position_sensitive_bins_read_channels_of_their_own() -> None:
    image = torch.arange(8.0)[:, None, None].expand(8, 5, 5)[None]  # channel k has value k
    output = deform_psroi_pool(image, torch.tensor([[0, 1.0, 1.0, 3.0, 3.0]]), None, (2, 2), group_size=2)
    assert output[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@parametrize_devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30], ids=str)
def test_wild_offsets_read_zero(bad: float, device: str) -> None:
    sample = RoiSample("wild")
    operands = sample.tensors(torch.float32, device)
    operands["offset"][:, :, 1] = bad
    operands["rois"][0] = torch.tensor([0, 4.0, 4.0, 36.0, 28.0])
    found = gradients(functools.partial(compiled, sample), operands)
    assert not found["output"][:, :, 1].any() and found["output"][0, :, 0].all()
    assert all(bool(torch.isfinite(t).all()) for t in found.values())
    assert not found["offset"][:, :, 1].any()


@parametrize_devices
def test_rois_not_finite_give_zero(device: str) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [(0, nan, 1, 5, 5), (0, 1, nan, 5, 5), (0, -inf, -inf, inf, inf), (0, inf, 1, inf, 5)]
    sample = RoiSample("empty", rois=tuple(rows))
    found = gradients(functools.partial(compiled, sample), sample.tensors(torch.float32, device))
    assert not found["output"].any() and not found["input"].any() and not found["offset"].any()


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
    ({"offset": torch.zeros(3, 1, 3, 2)}, r"offset has 1 channels.*the 3 output channels"),
    ({"offset": torch.zeros(2, 2, 3, 2)}, r"offset must have shape \[3, 2, 3, 2\], got \[2, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 2, 3, 2)}, r"mask must have shape \[3, 1, 3, 2\], got \[3, 2, 3, 2\]"),
    ({"mask": torch.zeros(3, 1, 3, 2, dtype=torch.float16)}, r"mask has dtype .*, but input has"),
    ({"input": torch.zeros(2, 3, 10, 13, dtype=torch.int32)}, r"input must be float64, float32, float16 or bfloat16"),
    ({"input": torch.zeros(2, 3, 10, 13), "group_size": 2}, r"input has 3 channels.*group_size\^2 = 4"),
    ({"offset": torch.zeros(3, 3, 3, 2)}, r"offset has 3 channels.*the 3 output channels"),
    ({"offset": torch.zeros(3, 4, 3, 2)}, r"offset has 4 channels.*the 3 output channels"),
    ({"part_size": (2, 2)}, r"offset must have shape \[3, 2, 2, 2\], got \[3, 2, 3, 2\]"),
    ({"output_size": (0, 2)}, r"output_size must be .*at least 1, got \[0, 2\]"),
    ({"part_size": (0, 2)}, r"part_size must be .*at least 1, got \[0, 2\]"),
    ({"group_size": 0}, r"group_size must be at least 1, got"),
    ({"sample_per_part": 0}, r"sample_per_part must be at least 1, got"),
]


@pytest.mark.parametrize(("change", "message"), BAD_OPERANDS)
@pytest.mark.parametrize("path", ["compiled", "fake"])
def test_bad_operands_are_named(change: dict[str, Any], message: str, path: str) -> None:
    sample = RoiSample("good")
    operands = sample.tensors(torch.float32) | sample.arguments | change
    if path == "fake":
        operands = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in operands.items()}
    with pytest.raises(RuntimeError, match="deform_psroi_pool: " + message):
        deform_psroi_pool(**operands)

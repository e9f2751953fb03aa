# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs deform_conv2d's tensor-core kernels on the CPU: see emulate.h for what that proves and what it does not."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from dcn_d2.ops import reference
from tests.ops.samples import ConvSample, by_name

from .emulator import GREEDY_WARP, ROUND_ROBIN, SANITIZED, barriers, call, emulate, removal_is_noticed
from .test_cuda_kernels import conv_values

# The numbers of dcn::cuda::Kind in csrc/cuda/mma.cuh.
KINDS = {"float16": 0, "bfloat16": 1, "tf32": 2}
# How the operands are given, and the error allowed relative to the largest value of the float64 reference.
ARITHMETIC = {
    "float16": (torch.float16, False, 1e-2),
    "bfloat16": (torch.bfloat16, False, 1e-2),
    "tf32": (torch.float32, True, 1e-3),
    "float32": (torch.float32, False, 1e-5),
}
SHARED_BYTES = 227 << 10

# Sizes at which the tensor cores compute in all dtypes, around the borders of tiles, steps and chunks.
SAMPLES = [
    ConvSample("several_tiles", channels=24, out_channels=70, size=(9, 15)),
    ConvSample("wide", channels=72, out_channels=136, size=(7, 10), stride=(2, 1), mask=False, kernel=(2, 2)),
    ConvSample("widest", channels=8, out_channels=264, size=(5, 4), batch=1, kernel=(1, 1), padding=(0, 0)),
    ConvSample("deform_groups", channels=64, out_channels=16, deform_groups=4, size=(5, 6), bias=False),
    ConvSample("groups", channels=64, out_channels=64, groups=8, size=(5, 6)),
    ConvSample("small_groups", channels=64, out_channels=64, groups=16, deform_groups=2, size=(6, 7), spread=30.0),
    ConvSample("groups_across_deform_groups", channels=48, out_channels=24, groups=3, deform_groups=2, dilation=(1, 2)),
    ConvSample("many_taps", channels=16, out_channels=8, kernel=(4, 5), padding=(2, 2), size=(7, 7)),
    ConvSample("many_channels", channels=136, out_channels=8, size=(4, 5), kernel=(2, 1), padding=(1, 0)),
    ConvSample("many_positions", channels=8, out_channels=8, size=(19, 31), kernel=(1, 1), padding=(0, 0)),
    ConvSample("one_pixel", channels=8, out_channels=8, size=(1, 1), batch=1),
]


def exact(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in values.items()}


def errors(values: dict[str, Any], found: dict[str, Tensor]) -> dict[str, float]:
    """Largest errors of output and gradients, relative to the largest value of each in float64."""
    names = [name for name in ("input", "offset", "weight", "mask") if name in values]
    expected = reference.gradients(
        lambda *leaves: call(reference, "deform_conv2d", exact(values) | dict(zip(names, leaves))),
        [values[name].double() for name in names],
        found["grad"].double(),
        [True] * len(names),
    )
    oracle = {"output": call(reference, "deform_conv2d", exact(values))} | dict(zip(names, expected))
    return {
        name: float((found[name].double() - value).abs().max() / value.abs().max().clamp(min=1e-3))
        for name, value in oracle.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_matrices", [False, True])
def test_fragments_multiply_to_the_matrix_product(kind: str, as_matrices: bool, library_path: str) -> None:
    dtype = {"tf32": torch.float32}.get(kind) or getattr(torch, kind)
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: no kind rounds them.
    a, b = (torch.randint(-8, 9, (n, 32 // dtype.itemsize), generator=generator).to(dtype) for n in (16, 8))
    found = torch.empty(16, 8)
    ctypes.CDLL(library_path).dcn_emulate_multiply(
        KINDS[kind], *(ctypes.c_void_p(t.data_ptr()) for t in (a, b, found)), ctypes.c_bool(as_matrices)
    )
    assert torch.equal(found, a.float() @ b.float().T)


# The schedules differ in who runs first, which is the same for all dtypes. float16 touches the same memory as bfloat16,
# and TF32 the same as float32, so under the sanitizers two of the four are enough.
ONE_OF_EACH_SIZE = ("bfloat16", "float32")
RUNS = [(ROUND_ROBIN, name) for name in (ONE_OF_EACH_SIZE if SANITIZED in os.environ else ARITHMETIC)]
if SANITIZED not in os.environ:
    RUNS.append((GREEDY_WARP, "bfloat16"))


@pytest.mark.parametrize(("schedule", "arithmetic"), RUNS)
@pytest.mark.parametrize("sample", SAMPLES, ids=by_name)
def test_deform_conv2d(sample: ConvSample, schedule: int, arithmetic: str, configure: Any) -> None:
    configure(schedule)
    dtype, allow_tf32, tolerance = ARITHMETIC[arithmetic]
    values = conv_values(sample, dtype) | {"allow_tf32": allow_tf32}
    if sample.batch > 1:
        values["input"] = values["input"].contiguous(memory_format=torch.channels_last)
    found = emulate("deform_conv2d", values)
    assert found["output"].is_contiguous(memory_format=torch.channels_last) == (
        sample.size == (1, 1) or sample.batch > 1
    )
    for name, error in errors(values, found).items():
        assert error < tolerance, name


def test_kernels_ask_whether_tf32_is_allowed(configure: Any) -> None:
    """As torch's setting is at the time of the call."""
    configure(ROUND_ROBIN)
    operators, values = torch.ops.dcn_d2_emulated, conv_values(SAMPLES[0], torch.float32)
    conv = torch.backends.cudnn.conv
    before, found = conv.fp32_precision, {}  # type: ignore[attr-defined]
    try:
        for allowed in (True, False):
            conv.fp32_precision = "tf32" if allowed else "ieee"  # type: ignore[attr-defined]
            found[allowed] = call(operators, "deform_conv2d", values)
            told = call(operators, "_deform_conv2d", values | {"allow_tf32": allowed})
            assert torch.equal(found[allowed], told)
    finally:
        conv.fp32_precision = before  # type: ignore[attr-defined]
    assert not torch.equal(found[True], found[False])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-3), (torch.float16, 7e-4)], ids=str)
def test_packed_interpolation_costs_little_accuracy(dtype: torch.dtype, limit: float, configure: Any) -> None:
    """A 16-bit sample is rounded after each of its four terms. Over many channels these errors do not add up."""
    configure(ROUND_ROBIN)
    values = conv_values(ConvSample("deep", channels=128, out_channels=64, size=(6, 7), batch=1, bias=False), dtype)
    found = emulate("deform_conv2d", values)
    expected = call(reference, "deform_conv2d", exact(values))
    assert float((found["output"].double() - expected).norm() / expected.norm()) < limit


@pytest.mark.parametrize("arithmetic", ONE_OF_EACH_SIZE)
def test_memory_formats_and_strides(arithmetic: str, configure: Any) -> None:
    configure(ROUND_ROBIN)
    dtype, allow_tf32, _ = ARITHMETIC[arithmetic]
    values = conv_values(SAMPLES[0], dtype) | {"allow_tf32": allow_tf32}
    expected = emulate("deform_conv2d", values)
    last = {
        name: t.contiguous(memory_format=torch.channels_last) if isinstance(t, Tensor) and t.dim() == 4 else t
        for name, t in values.items()
    }
    both = torch.cat([values["mask"], values["offset"]], 1)  # as an offset branch gives them
    last["mask"], last["offset"] = both.split([values["mask"].shape[1], values["offset"].shape[1]], 1)
    last["grad"] = expected["grad"].contiguous(memory_format=torch.channels_last)
    found = emulate("deform_conv2d", last)
    assert found["output"].is_contiguous(memory_format=torch.channels_last)
    assert found["input"].is_contiguous(memory_format=torch.channels_last)
    assert found["weight"].is_contiguous(memory_format=torch.channels_last)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("multiprocessors", [1, 30, 132])
def test_any_split_of_the_sum(multiprocessors: int, configure: Any, device: Any) -> None:
    configure(ROUND_ROBIN)
    device(90, multiprocessors, SHARED_BYTES)
    for channels_last in (False, True):
        values = conv_values(ConvSample("small_map", channels=64, out_channels=40, size=(6, 7)), torch.float32)
        if channels_last:
            values["input"] = values["input"].contiguous(memory_format=torch.channels_last)
        assert max(errors(values, emulate("deform_conv2d", values)).values()) < 1e-5


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_widest_tiles(arithmetic: str, memory_format: torch.memory_format, configure: Any, device: Any) -> None:
    """On one multiprocessor the widest tile is chosen; all of its results must find room on their way to memory."""
    configure(ROUND_ROBIN)
    device(90, 1, SHARED_BYTES)
    dtype, allow_tf32, tolerance = ARITHMETIC[arithmetic]
    values = conv_values(ConvSample("wide_tile", channels=16, out_channels=256, size=(11, 13), batch=1), dtype)
    values["input"] = values["input"].contiguous(memory_format=memory_format)
    found = emulate("deform_conv2d", values | {"allow_tf32": allow_tf32})
    for name, error in errors(values, found).items():
        assert error < tolerance, name


# 3x3 convolutions with 128 channels on 100x152 pixels, 256 on 50x76 and 512 on 25x38, cut into tiles of 128x128 or
# 256x64; on 132 multiprocessors with two blocks each.
@pytest.mark.parametrize(
    ("tiles", "positions", "megabytes", "splits"),
    [(9, 15200, 0.6, {2: 28, 16: 29}), (36, 3800, 2.4, {2: 7, 16: 7}), (144, 950, 9.4, {2: 1, 16: 3})],
)
def test_splits_of_the_weight_gradient_fill_waves(
    tiles: int, positions: int, megabytes: float, splits: dict[int, int], library_path: str
) -> None:
    choose = ctypes.CDLL(library_path).dcn_emulate_weight_gradient_splits
    for batch, expected in splits.items():
        found = choose(*map(ctypes.c_int64, (tiles, -(-batch * positions // 64), 264, int(megabytes * 1e6))))
        assert found == expected
    # A split has at least four steps, and the bytes of partial results are limited.
    assert choose(*map(ctypes.c_int64, (1, 7, 264, 100))) == 1
    assert choose(*map(ctypes.c_int64, (1, 1000, 264, 17 << 20))) == 1


def test_devices_without_the_instructions_or_the_shared_memory(configure: Any, device: Any) -> None:
    configure(ROUND_ROBIN)
    values = conv_values(SAMPLES[2], torch.bfloat16)
    for capability, shared_bytes in ((75, 64 << 10), (86, 99 << 10), (80, 163 << 10)):
        device(capability, 4, shared_bytes)
        assert max(errors(values, emulate("deform_conv2d", values)).values()) < 1e-2


def test_infinities_that_no_sample_reads_stay_out(configure: Any) -> None:
    configure(ROUND_ROBIN)
    for dtype, allow_tf32, _ in ARITHMETIC.values():
        values = conv_values(ConvSample("outside", channels=8, size=(4, 5), bias=False), dtype)
        values["input"][:] = float("inf")
        values["offset"][:] = 99.0
        output = emulate("deform_conv2d", values | {"allow_tf32": allow_tf32})["output"]
        assert not output.any()


def on_one_place(values: dict[str, Any], sample: ConvSample) -> dict[str, Any]:
    """The operands with offsets that bring all samples between the same four pixels."""
    axes = [
        torch.arange(out)[:, None] * stride - padding + torch.arange(kernel) * dilation
        for out, stride, padding, kernel, dilation in zip(
            sample.out_size, sample.stride, sample.padding, sample.kernel, sample.dilation
        )
    ]
    place = [torch.rand(values["mask"].shape[0], *sample.kernel, *sample.out_size) + least for least in (1, 2)]
    y = place[0] - axes[0].T[None, :, None, :, None]
    x = place[1] - axes[1].T[None, None, :, None, :]
    offset = torch.stack([y, x], 3).reshape(values["offset"].shape)
    return values | {"offset": offset.to(values["offset"].dtype)}


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("size", [(6, 7), (4, 4)])
def test_samples_that_all_read_the_same_pixels(
    size: tuple[int, int], capability: int, configure: Any, device: Any
) -> None:
    """More than a block keeps, listed by threads that come in one order or another: the same bits."""
    device(capability, 4, SHARED_BYTES)
    sample = ConvSample("one_place", channels=8, out_channels=8, size=size)
    values = on_one_place(conv_values(sample, torch.float32), sample)
    configure(ROUND_ROBIN)
    found = emulate("deform_conv2d", values)
    assert max(errors(values, found).values()) < 1e-5
    configure(GREEDY_WARP)
    assert torch.equal(emulate("deform_conv2d", values)["input"], found["input"])


@pytest.mark.unsanitized
@pytest.mark.parametrize(("file", "line"), barriers("deform_conv2d/sampling"))
def test_a_removed_barrier_of_lists_is_noticed(configure: Any, file: str, line: int) -> None:
    sample = ConvSample("one_place", channels=8, out_channels=8, size=(20, 20), batch=1, kernel=(1, 2), padding=(0, 1))
    values = on_one_place(conv_values(sample, torch.float32), sample)
    assert removal_is_noticed(configure, "deform_conv2d", values, file, line)


@pytest.mark.unsanitized
@pytest.mark.parametrize(("file", "line"), barriers("deform_conv2d/tensor_cores"))
def test_a_removed_barrier_is_noticed(configure: Any, device: Any, file: str, line: int) -> None:
    """The emulator finds each of the kernels' barriers missing, so it would find one that was forgotten."""
    for multiprocessors, sample in (
        (1, ConvSample("loops", channels=64, out_channels=40, deform_groups=2, size=(5, 11))),
        (30, ConvSample("splits", channels=64, out_channels=70, size=(6, 7))),
    ):
        device(90, multiprocessors, SHARED_BYTES)
        values = conv_values(sample, torch.bfloat16)
        last = values | {"input": values["input"].contiguous(memory_format=torch.channels_last)}
        if any(removal_is_noticed(configure, "deform_conv2d", each, file, line) for each in (values, last)):
            return
    pytest.fail(f"{file}:{line}: nothing needs this barrier, or the emulator does not see what does")

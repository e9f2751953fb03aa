# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA sources, entry points included, on the CPU: see emulate.h for what that proves and what it does not."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcn_d2.ops import reference
from tests.ops import checks
from tests.ops.checks import assert_same
from tests.ops.samples import (
    CONV_SAMPLES,
    EMPTY_BATCH,
    PSROI_SAMPLES,
    ROI_SAMPLES,
    ConvSample,
    RoiSample,
    by_name,
)

from .emulator import (
    GRADIENTS,
    HERE,
    PROJECT,
    SANITIZED,
    barriers,
    call,
    compile_library,
    emulate,
    removal_is_noticed,
)

TOLERANCE = checks.TOLERANCE | {torch.float16: 4e-3}

# The samples of all operators' tests, and further ones that cross the borders of the kernels' tiles and warps.
EMULATED_CONV_SAMPLES = [
    *(sample for sample in CONV_SAMPLES if sample.name != "many_positions"),
    EMPTY_BATCH,
    ConvSample("many_channels", channels=66, out_channels=67, size=(9, 8), kernel=(1, 2), padding=(0, 1)),
    ConvSample("wide_groups", channels=40, out_channels=2, groups=2, deform_groups=2, size=(4, 5), kernel=(2, 1)),
    ConvSample("no_outputs", out_channels=0),
    ConvSample("no_rows", size=(0, 3), kernel=(2, 2)),
]
POOLING_SAMPLES = [
    *(("deform_roi_pool", sample) for sample in ROI_SAMPLES),
    *(("deform_psroi_pool", sample) for sample in PSROI_SAMPLES),
]
for operator in ("deform_roi_pool", "deform_psroi_pool"):
    POOLING_SAMPLES += [
        (operator, RoiSample("more_channels_than_lanes", channels=35)),
        (operator, RoiSample("empty_map", size=(0, 4), rois=((0, 0.0, 0.0, 8.0, 8.0),), offset=False)),
        (operator, RoiSample("no_channels", channels=0)),
        (operator, RoiSample("far_larger_than_the_map", rois=((1, -150.0, -100.0, 250.0, 200.0),), spatial_scale=1.0)),
        (operator, RoiSample("no_area", rois=((0, 3.0, 4.0, 3.0, 20.0),))),
        (operator, RoiSample("vectors", channels=16)),
        (operator, RoiSample("several_passes", channels=260, output_size=(1, 2))),
        (operator, RoiSample("several_tiles_of_bins", output_size=(5, 7))),
    ]
# More samples along one axis than a kernel lists at a time.
POOLING_SAMPLES += [
    ("deform_roi_pool", RoiSample("several_runs", output_size=(2, 1), geometry={"sampling_ratio": 19})),
    ("deform_psroi_pool", RoiSample("several_runs", output_size=(2, 1), geometry={"sample_per_part": 19})),
    ("deform_psroi_pool", RoiSample("cells", channels=8, input_channels=32, geometry={"group_size": 2})),
]


def check(name: str, values: dict[str, Any], **need: bool) -> dict[str, Tensor]:
    """Compares an emulated operator with the reference."""
    actual = emulate(name, values, **need)
    grad, names = actual["grad"], GRADIENTS[name]
    needed = [need.get(f"need_{'offset' if n == 'mask' else n}", True) for n in names]
    expected = reference.gradients(
        lambda *leaves: call(reference, name, values | dict(zip(names, leaves))),
        [values.get(n) for n in names],
        grad,
        needed,
    )
    oracle = {"output": call(reference, name, values), "grad": grad} | dict(zip(names, expected))
    for key, value in oracle.items():
        assert (actual[key].dtype, actual[key].shape) == (value.dtype, value.shape), key
    assert_same(actual, oracle, TOLERANCE[grad.dtype])
    return actual


def conv_values(sample: ConvSample, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    values: dict[str, Any] = sample.tensors(dtype) | sample.geometry
    if values["offset"].numel() > 8:
        values["offset"].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -1e30])
    return values


def roi_values(sample: RoiSample, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    values = sample.tensors(dtype) | sample.arguments
    if values["offset"] is not None and values["offset"].numel() > 8:
        values["offset"].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    return values


def conv_sample(name: str) -> ConvSample:
    return next(sample for sample in EMULATED_CONV_SAMPLES if sample.name == name)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("sample", EMULATED_CONV_SAMPLES, ids=by_name)
def test_deform_conv2d(sample: ConvSample) -> None:
    check("deform_conv2d", conv_values(sample))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize(("operator", "sample"), [pytest.param(o, s, id=f"{o}-{s.name}") for o, s in POOLING_SAMPLES])
def test_roi_pooling(operator: str, sample: RoiSample) -> None:
    check(operator, roi_values(sample))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    check("deform_conv2d", conv_values(conv_sample("groups_across_deform_groups"), dtype))
    for channels in (3, 16):  # single values and vectors
        check("deform_roi_pool", roi_values(RoiSample("modulated", channels=channels), dtype))
        check("deform_psroi_pool", roi_values(RoiSample("modulated", channels=channels), dtype))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("needed", ["need_input", "need_offset", "need_weight"])
def test_computes_what_is_needed(needed: str) -> None:
    need = {name: name == needed for name in ("need_input", "need_offset", "need_weight")}
    check("deform_conv2d", conv_values(conv_sample("deform_groups")), **need)
    if needed != "need_weight":
        check("deform_roi_pool", roi_values(RoiSample("modulated")), **need)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("operator", ["deform_conv2d", "deform_roi_pool", "deform_psroi_pool"])
def test_memory_formats(operator: str) -> None:
    conv = operator == "deform_conv2d"
    values = conv_values(conv_sample("uneven")) if conv else roi_values(RoiSample("modulated"))
    values["grad"] = torch.randn_like(call(reference, operator, values))

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 1]

    def channels_last(tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    check(operator, {name: strided(t) if isinstance(t, Tensor) else t for name, t in values.items()})
    found = check(operator, {name: channels_last(t) if isinstance(t, Tensor) else t for name, t in values.items()})
    assert found["input"].is_contiguous(memory_format=torch.channels_last)
    assert found["output"].is_contiguous(memory_format=torch.channels_last) == conv
    assert not conv or found["weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
@pytest.mark.parametrize("index", [-1.0, 2.0, float("nan"), float("inf")])
def test_a_roi_outside_the_batch_gives_nan_and_no_gradient(operator: str, index: float) -> None:
    values = roi_values(RoiSample("modulated"))
    expected = emulate(operator, values)
    values["rois"][1, 0] = index
    found = emulate(operator, values)
    others = [0, 2]
    assert found["output"][1].isnan().all()
    assert torch.equal(found["output"][others], expected["output"][others])
    for name in ("offset", "mask"):
        assert (found[name][1] == 0).all()
        assert torch.equal(found[name][others], expected[name][others])
    assert (found["input"][1] != expected["input"][1]).any()
    assert torch.allclose(found["input"][0], expected["input"][0])


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
def test_a_roi_that_is_not_finite_gives_zero(operator: str) -> None:
    rois = ((0, 1.0, float("inf"), 9.0, 9.0), (1, 1.0, 1.0, float("nan"), 9.0), (1, -3e38, 1.0, 3e38, 2.0))
    found = emulate(operator, roi_values(RoiSample("not_finite", rois=rois, spatial_scale=1.0), torch.float32))
    assert all((found[name] == 0).all() for name in ("output", *GRADIENTS[operator]))


CROWDED = tuple((k % 2, 2.0 + k, 3.0 + k / 2, 30.0 + 3 * k, 40.0 - k) for k in range(9))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("operator", ["deform_roi_pool", "deform_psroi_pool"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_deterministic_pooling(operator: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The same bits in whatever order RoIs are added; without it, float32 shows that their order matters."""
    values = roi_values(RoiSample("crowded", channels=4, rois=CROWDED), dtype)
    values["input"] = values["input"].contiguous(memory_format=memory_format)
    values["grad"] = torch.randn(9, 4, 3, 2, dtype=torch.float64).to(dtype)
    turned = values | {name: values[name].flip(0) for name in ("rois", "offset", "mask", "grad")}
    found = check(operator, values, deterministic=True)
    again = emulate(operator, turned, deterministic=True)
    assert torch.equal(found["input"], again["input"])
    assert found["input"].is_contiguous(memory_format=memory_format)
    for name in ("offset", "mask"):
        assert torch.equal(found[name], again[name].flip(0))
    if dtype == torch.float32:
        assert not torch.equal(emulate(operator, values)["input"], emulate(operator, turned)["input"])


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-60, 2.0**60, 2.0**120])
def test_deterministic_pooling_of_small_and_large_gradients(factor: float) -> None:
    """The unit of the sums follows the gradients."""
    values = roi_values(RoiSample("crowded", channels=4, rois=CROWDED), torch.float32)
    values["grad"] = torch.randn(9, 4, 3, 2)
    plain = emulate("deform_roi_pool", values, deterministic=True)["input"]
    found = emulate("deform_roi_pool", values | {"grad": values["grad"] * factor}, deterministic=True)["input"]
    torch.testing.assert_close(found / factor, plain, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_deterministic_pooling_shows_gradients_that_are_not_finite(bad: float) -> None:
    """Gradient scalers look for them."""
    values = roi_values(RoiSample("modulated"), torch.float16)
    values["grad"] = torch.ones(3, 3, 3, 2, dtype=torch.float16)
    values["grad"][1, 1, 1, 1] = bad
    assert emulate("deform_roi_pool", values, deterministic=True)["input"].isnan().all()


@pytest.mark.usefixtures("schedule")
def test_entry_points_check_their_operands() -> None:
    values = conv_values(conv_sample("modulated"))
    with pytest.raises(RuntimeError, match="offset must have shape"):
        emulate("deform_conv2d", values | {"offset": values["offset"][..., 1:]})
    with pytest.raises(RuntimeError, match="grad must have shape"):
        emulate("deform_conv2d", values | {"grad": torch.zeros(2, 6, 7, 8, dtype=torch.float64)})
    for operator in ("deform_roi_pool", "deform_psroi_pool"):
        values = roi_values(RoiSample("modulated"))
        with pytest.raises(RuntimeError, match="mask must have shape"):
            emulate(operator, values | {"mask": values["mask"][1:]})
        with pytest.raises(RuntimeError, match="grad must have shape"):
            emulate(operator, values | {"grad": torch.zeros(3, 3, 3, 3, dtype=torch.float64)})


@pytest.mark.unsanitized
@pytest.mark.parametrize(("file", "line"), barriers("deform_conv2d/simt"))
def test_a_removed_barrier_is_noticed(configure: Any, file: str, line: int) -> None:
    """The emulator finds each of the kernels' barriers missing, so it would find one that was forgotten."""
    values = conv_values(conv_sample("many_channels"))
    assert removal_is_noticed(configure, "deform_conv2d", values, file, line)


@pytest.mark.unsanitized
@pytest.mark.parametrize(("file", "line"), barriers("memory_format.cuh") + barriers("roi_pool"))
def test_a_removed_barrier_of_pooling_is_noticed(configure: Any, file: str, line: int) -> None:
    """With maps of several tiles, and blocks that have several tiles of bins and passes over the channels."""
    rois = ((0, 2.0, 3.0, 30.0, 40.0), (5, 1.0, 1.0, 9.0, 9.0), (1, -12.0, 5.0, 21.5, 70.0))
    sample = RoiSample("barriers", channels=260, size=(13, 21), output_size=(5, 5), rois=rois)
    # Atomic additions come in another order where threads do, and one RoI names no image, which gives NaN.
    same = functools.partial(torch.allclose, equal_nan=True)
    assert removal_is_noticed(configure, "deform_roi_pool", roi_values(sample), file, line, same)


@pytest.mark.slow
@pytest.mark.unsanitized
@pytest.mark.skipif(SANITIZED in os.environ, reason="runs in this process")
def test_under_sanitizers(tmp_path: Path) -> None:
    """Repeats the tests of this file under the address and the undefined behaviour sanitizers."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    # The sanitizer must be loaded first, and next to it the C++ library whose functions it wraps.
    runtimes = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("the compiler has no address sanitizer")
    kinds = "address,bounds,bool,float-cast-overflow,integer-divide-by-zero,shift,signed-integer-overflow"
    library = compile_library(tmp_path / "emulated.so", f"-fsanitize={kinds}", "-fno-sanitize-recover=all")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until the end
        SANITIZED: str(library),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys"]
    result = subprocess.run(
        [*command, str(HERE), "-m", "not unsanitized"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]

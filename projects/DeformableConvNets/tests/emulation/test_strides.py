# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The CUDA entry points, emulated: strides as the fake kernels promise, and RoIs that name nothing or lie nowhere."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.ops.layouts import as_tuple, calls, describe, promised
from tests.ops.samples import STRIDE_SAMPLES, RoiSample, Sample

from .emulator import COMPILED, ROUND_ROBIN, emulate


@pytest.mark.parametrize(
    ("name", "sample"), [pytest.param(name, sample, id=f"{name}-{sample.name}") for name, sample in STRIDE_SAMPLES]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_have_the_promised_strides(configure: Any, name: str, sample: Sample, dtype: torch.dtype) -> None:
    configure(ROUND_ROBIN)
    for seed, layout in enumerate(["channels_last", "some_channels", "expanded", "odd_strides_of_ones", None]):
        for operator, arguments in calls(name, sample, dtype, "cpu", random.Random(seed), layout):
            own = operator._schema.name.removeprefix("dcn_d2::")
            emulated = getattr(torch.ops.dcn_d2_emulated, COMPILED.get(own, own)).default
            more = [False] if own in COMPILED else []  # allow_tf32
            found = [describe(result) for result in as_tuple(emulated(*arguments, *more))]
            assert found == promised(operator, arguments), f"{operator}, {layout}, seed {seed}"


@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_psroi_pool"])
def test_a_batch_index_between_two_images_gives_nan(configure: Any, name: str) -> None:
    configure(ROUND_ROBIN)
    sample = RoiSample("index", rois=((0, 1.0, 1.0, 20.0, 20.0), (0.5, 1.0, 1.0, 20.0, 20.0)))
    found = emulate(name, sample.tensors(torch.float32) | sample.arguments)
    assert torch.isfinite(found["output"][0]).all() and found["output"][1].isnan().all()


@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_psroi_pool"])
@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rois_that_are_not_finite_give_zero(configure: Any, name: str, place: int, bad: float) -> None:
    configure(ROUND_ROBIN)
    sample = RoiSample("wild", rois=((0, 2.3, 3.1, 40.7, 33.9), (1, 8.0, 7.5, 30.0, 28.25)))
    operands = sample.tensors(torch.float32)
    operands["rois"][1, place] = bad
    found = emulate(name, operands | sample.arguments)
    assert not any(found[key][1].any() for key in ("output", "offset", "mask", "input"))
    assert found["output"][0].all() and found["offset"][0].any()

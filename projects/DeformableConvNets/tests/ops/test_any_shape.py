# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Random sizes of every operator and path: hypothesis draws them, and looks for the smallest call that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .checks import assert_equals_reference
from .paths import GROUPED, TILED, Case
from .samples import ConvSample, RoiSample, on_a_grid, operands_of


class Draw:
    """Numbers and choices of one example."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def pair(self, low: int, high: int) -> tuple[int, int]:
        return self.number(low, high), self.number(low, high)

    def choice(self, *values: Any) -> Any:
        return self.data.draw(st.sampled_from(values))

    def yes(self) -> bool:
        return self.data.draw(st.booleans())


def check_small_convolution(draw: Draw) -> None:
    groups, deform_groups = draw.pair(1, 3)
    kernel, padding, dilation = draw.pair(1, 4), draw.pair(0, 3), draw.pair(1, 3)
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, padding)]
    sample = ConvSample(
        "any",
        batch=draw.number(0, 3),
        channels=groups * deform_groups * draw.number(1, 3),
        out_channels=groups * draw.number(1, 4),
        size=(least[0] + draw.number(0, 9), least[1] + draw.number(0, 9)),
        kernel=kernel,
        stride=draw.pair(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=deform_groups,
        mask=draw.yes(),
        bias=draw.yes(),
        spread=draw.choice(0.0, 1.0, 10.0),
    )
    assert_equals_reference("deform_conv2d", sample, operands_of("deform_conv2d", sample, seed=draw.number(0, 9)))


def check_wide_convolution(draw: Draw) -> None:
    """Channels and positions that leave rests of vectors, panels and tiles."""
    groups, deform_groups = draw.choice((1, 1), (1, 2), (2, 1), (3, 2), (4, 4), (8, 1))
    kernel = draw.choice((1, 1), (3, 3), (2, 1))
    sample = ConvSample(
        "any",
        batch=draw.number(1, 2),
        channels=groups * deform_groups * draw.number(1, 70 // (groups * deform_groups)),
        out_channels=groups * draw.number(1, 70 // groups),
        size=(draw.number(kernel[0], 20), draw.number(kernel[1], 20)),
        kernel=kernel,
        padding=(kernel[0] // 2, kernel[1] // 2),
        groups=groups,
        deform_groups=deform_groups,
        mask=draw.yes(),
    )
    operands = on_a_grid(sample.tensors(draw.choice(torch.float64, torch.float32)))
    memory_format = draw.choice(torch.contiguous_format, torch.channels_last)
    assert_equals_reference("deform_conv2d", sample, operands, memory_format=memory_format)


def check_groups(draw: Draw) -> None:
    group_channels, deform_groups = draw.choice(1, 2, 4, 8, 16, 32), draw.number(1, 3)
    groups = deform_groups * draw.number(1, 96 // (group_channels * deform_groups))
    sample = ConvSample(
        "any",
        batch=draw.number(0, 2),
        channels=group_channels * groups,
        out_channels=group_channels * groups,
        groups=groups,
        deform_groups=deform_groups,
        size=draw.pair(3, 17),
        stride=draw.pair(1, 2),
        mask=draw.yes(),
        bias=draw.yes(),
    )
    dtype = draw.choice(torch.float64, torch.float32)
    Case("deform_conv2d", GROUPED, sample, dtype, draw.choice(torch.contiguous_format, torch.channels_last)).check()


def check_tiles(draw: Draw) -> None:
    groups, deform_groups = draw.number(1, 2), draw.number(1, 3)
    sample = ConvSample(
        "any",
        batch=draw.number(1, 3),
        channels=groups * deform_groups * draw.number(1, 70 // (groups * deform_groups)),
        out_channels=groups * draw.number(1, 70 // groups),
        groups=groups,
        deform_groups=deform_groups,
        size=draw.pair(3, 19),
        kernel=draw.pair(1, 3),
        stride=draw.pair(1, 2),
        padding=(1, 1),
        mask=draw.yes(),
        bias=draw.yes(),
    )
    memory_format = draw.choice(torch.contiguous_format, torch.channels_last)
    Case("deform_conv2d", TILED, sample, torch.bfloat16, memory_format).check()


def rois_of(draw: Draw, batch: int, coordinate: st.SearchStrategy[float]) -> tuple[tuple[float, ...], ...]:
    return tuple(
        (draw.number(0, batch - 1), *(draw.data.draw(coordinate) for _ in range(4))) for _ in range(draw.number(0, 3))
    )


def check_deform_roi_pool(draw: Draw) -> None:
    batch = draw.number(1, 3)
    sample = RoiSample(
        "any",
        batch=batch,
        channels=draw.number(1, 20),
        size=draw.pair(1, 9),
        output_size=draw.pair(1, 4),
        spatial_scale=draw.choice(1.0, 0.5, 0.0625),
        geometry={"sampling_ratio": draw.number(0, 3), "gamma": draw.choice(0.0, 0.1, 1.0)},
        offset=draw.yes(),
        mask=draw.yes(),
        rois=rois_of(draw, batch, st.floats(-30, 60, width=16)),
    )
    assert_equals_reference("deform_roi_pool", sample, sample.tensors(seed=draw.number(0, 9)))


def check_deform_psroi_pool(draw: Draw) -> None:
    batch, group_size, classes = draw.number(1, 3), draw.number(1, 3), draw.number(1, 2)
    channels, part_size = classes * draw.number(1, 20), draw.pair(1, 4)
    sample = RoiSample(
        "any",
        batch=batch,
        channels=channels,
        input_channels=channels * group_size**2,
        size=draw.pair(1, 9),
        output_size=draw.pair(1, 4),
        spatial_scale=draw.choice(1.0, 0.5, 0.0625),
        offset_shape=(2 * classes, *part_size),
        geometry={
            "group_size": group_size,
            "part_size": part_size,
            "sample_per_part": draw.number(1, 5),
            "trans_std": draw.choice(0.0, 0.1, 1.0),
        },
        offset=draw.yes(),
        mask=draw.yes(),
        # Odd eighths: a sample never falls exactly on a bound of the map, where rounding decides whether it counts.
        rois=rois_of(draw, batch, st.integers(-120, 240).map(lambda n: (2 * n + 1) / 8)),
    )
    assert_equals_reference("deform_psroi_pool", sample, sample.tensors(seed=draw.number(0, 9)))


# How many examples each is worth.
CHECKS: list[tuple[Callable[[Draw], None], int]] = [
    (check_small_convolution, 60),
    (check_wide_convolution, 40),
    (check_groups, 40),
    (check_tiles, 30),
    (check_deform_roi_pool, 60),
    (check_deform_psroi_pool, 60),
]


@pytest.mark.parametrize(
    ("check", "examples"), [pytest.param(*each, id=each[0].__name__.removeprefix("check_")) for each in CHECKS]
)
def test_any_shape_equals_the_reference(check: Callable[[Draw], None], examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(data=st.data())
    def draw_and_check(data: st.DataObject) -> None:
        check(Draw(data))

    draw_and_check()

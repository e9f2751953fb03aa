# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The campaign of random operator calls: a small part of it, and that it notices operators which are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcn_d2.ops import reference
from dev.campaign import exact, operators
from tests.ops.checks import gradients
from tests.ops.samples import CONV_SAMPLES, PSROI_SAMPLES, ROI_SAMPLES, RoiSample, by_name


def test_the_operators_agree_with_another_implementation() -> None:
    summary = operators.run_cases(range(300))
    assert summary["findings"] == []
    (done,) = summary["results"].values()
    assert set(done) == set(operators.OPERATORS)
    assert sum(entry["cases"] for dtypes in done.values() for entry in dtypes.values()) == 300


def of_output(change: Callable[[Tensor], Tensor]) -> operators.Run:
    return lambda operator, arguments: tuple(map(change, operators.as_tuple(operator(*arguments))))


def one_value_off(result: Tensor) -> Tensor:
    """By 1 % of the largest value, or a little in float64, as a wrong border would be."""
    if not result.numel():
        return result
    changed = result.clone()
    at = tuple(size // 2 for size in result.shape)
    changed[at] += result.abs().max() * 0.1 + (1e-9 if result.dtype == torch.float64 else 0.1)
    return changed


BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a value": (one_value_off, " is "),
    "the strides": (lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t, "promised"),
    "the dtype": (lambda t: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32), "promised"),
    "the shape": (lambda t: t[..., :-1] if t.dim() == 4 and t.numel() else t, "promised"),
    "not a number": (lambda t: torch.full_like(t, torch.nan), " is nan"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_operator_is_noticed(broken: str) -> None:
    change, word = BROKEN[broken]
    summary = operators.run_cases(range(12), run=of_output(change))
    assert len(summary["findings"]) >= 6
    assert any(word in each["what"] for each in summary["findings"])


def test_an_operator_that_is_wrong_under_several_callers_is_noticed() -> None:
    calls = []

    def run(operator: Any, arguments: list[Any]) -> Any:
        calls.append(operator)
        results = operators.as_tuple(operator(*arguments))
        return tuple(t + 1 for t in results) if calls.count(operator) > 1 else results

    seed = next(seed for seed in range(200) if operators.Maker(seed, [1]).make().callers > 1)
    case = operators.check(operators.Maker(seed, [1]).make(), run)
    assert any("Python threads at once" in found for found in case.mismatches)


def test_an_error_is_reported_and_the_campaign_goes_on() -> None:
    def run(operator: Any, arguments: list[Any]) -> Any:
        raise RuntimeError("broken")

    summary = operators.run_cases(range(3), run=run)
    assert [each["what"] for each in summary["findings"]] == ["RuntimeError: broken"] * 3
    assert "--replay 1 " in summary["findings"][1]["replay"]


def test_a_case_follows_from_its_seed() -> None:
    first, second = (operators.Maker(7, [1, 2]).make() for _ in range(2))
    assert first.describe() == second.describe()
    for a, b in zip(first.values.values(), second.values.values()):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_command_line(project: Path, tmp_path: Path) -> None:
    output = tmp_path / "campaign.json"
    command = [sys.executable, str(project / "dev/campaign/operators.py"), "--capabilities", "default"]
    command += ["--operators", "deform_roi_pool", "--output", str(output)]
    result = subprocess.run([*command, "--cases", "8", "--seed", "3"], capture_output=True, text=True, check=True)
    assert "8 cases in" in result.stdout
    summary = json.loads(output.read_text())
    assert summary["cases"] == 8 and summary["findings"] == [] and set(summary["results"]) == {"default"}
    assert set(summary["results"]["default"]) == {"deform_roi_pool"}
    result = subprocess.run([*command, "--replay", "3000000001"], capture_output=True, text=True, check=True)
    assert "seed 3000000001: deform_roi_pool" in result.stdout


@pytest.mark.parametrize("sample", CONV_SAMPLES, ids=by_name)
def test_the_other_implementation_agrees_with_the_reference(sample: Any) -> None:
    """The two were written apart; where they differ, one of them is wrong."""
    operands = sample.tensors()
    wanted = gradients(
        lambda **tensors: reference.deform_conv2d(**{"bias": None, "mask": None} | tensors, **sample.geometry), operands
    )
    values = {name: t.numpy() for name, t in operands.items()}
    grad = torch.randn(wanted["output"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = exact.deform_conv2d(values | {"grad": grad.numpy()}, *sample.geometry.values())
    for name, expected in wanted.items():
        np.testing.assert_allclose(found[name][0], expected.numpy(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "sample"),
    [("deform_roi_pool", s) for s in ROI_SAMPLES] + [("deform_psroi_pool", s) for s in PSROI_SAMPLES],
)
def test_the_other_implementation_of_pooling_agrees_with_the_reference(name: str, sample: RoiSample) -> None:
    operands = sample.tensors()
    wanted = gradients(lambda **tensors: getattr(reference, name)(**tensors, **sample.arguments), operands)
    values = {key: t.numpy() for key, t in operands.items() if isinstance(t, Tensor)}
    grad = torch.randn(wanted["output"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    geometry = (
        {"gamma": 0.1, "sampling_ratio": 0}
        if name == "deform_roi_pool"
        else {"group_size": 1, "part_size": sample.output_size, "sample_per_part": 4, "trans_std": 0.1}
    )
    found = getattr(exact, name)(values | {"grad": grad.numpy()}, **geometry | sample.arguments, trusted=True)
    for key, expected in wanted.items():
        np.testing.assert_allclose(found[key][0], expected.numpy(), rtol=1e-10, atol=1e-10)

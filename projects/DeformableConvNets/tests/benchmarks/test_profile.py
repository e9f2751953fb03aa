# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""benchmarks/profile_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import layer, profile_cuda


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        (
            "void dcn::cuda::product_kernel<(dcn::cuda::Kind)1, 128, dcn::cuda::SampleGather<(dcn::cuda::Kind)1> >"
            "(dcn::cuda::ProductSizes, dcn::cuda::SampleGather<(dcn::cuda::Kind)1>, dcn::cuda::Unit const*)",
            "product_kernel<1, 128, SampleGather<1> >",
        ),
        ("Memset (Device)", "Memset "),
        ("sm90_xmma_fprop_" + "x" * 100, "sm90_xmma_fprop_" + "x" * 81 + "..."),
    ],
    ids=["ours", "copies", "long"],
)
def test_kernels_have_short_names(kernel: str, short: str) -> None:
    assert profile_cuda.short_name(kernel) == short


def test_profile_adds_up_what_a_call_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, call in profile_cuda.calls(layer.Shape("tiny", 32, 4, 5), "cpu", torch.float32, "forward").items():
        assert name in ("conv", "dcn_d2") and isinstance(call(), torch.Tensor)
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    class Event:
        def __init__(self, name: str, device: Any, microseconds: float) -> None:
            self.name, self.device_type, self.time_range = name, device, self
            self.elapsed_us = lambda: microseconds

    class Profiler:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def events(self) -> list[Event]:
            return [Event("void a(int)", cuda, 2.0), Event("b", cuda, 5.0), Event("void a(int)", cuda, 4.0)] * 3 + [
                Event("launch", cpu, 99.0)
            ]

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profiler())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = profile_cuda.kernel_times(lambda: None, repeats=3)
    assert found == {"a": {"microseconds": 6.0, "launches": 2.0}, "b": {"microseconds": 5.0, "launches": 1.0}}
    shape = {"name": "c3", "batch": 16}
    text = profile_cuda.describe({"shape": shape, "pass": "forward", "contestant": "dcn_d2", "kernels": found})
    assert "c3 batch 16 forward" in text and "11.0 us" in text and "6.0 us   2.0 x  a" in text

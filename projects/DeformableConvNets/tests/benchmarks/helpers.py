# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the tests of the benchmarks share: rows, runs, contestants that fail, and a stand-in for a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


def run(module: ModuleType, folder: Path, *arguments: str, **sizes: Any) -> list[dict[str, Any]]:
    """Runs a benchmark; returns its rows after checking what all of them must have."""
    name = module.__name__.rpartition(".")[2]
    path = folder / f"{name}_cpu.json"
    status = module.main(["--output", str(path), "--repeats", "2", "--threads", "1", *arguments], **sizes)
    document = json.loads(path.read_text())
    assert document["benchmark"] == name and document["device"] == "cpu" and document["complete"]
    assert not status and not any("failed" in row for row in document["rows"])
    assert document["environment"]["versions"]["torch"] and document["environment"]["commit"]
    for row in document["rows"]:
        for timing in row["milliseconds"].values():
            assert 0 < timing["low"] <= timing["median"] <= timing["high"] and timing["repeats"] == 2
    return document["rows"]


def conv_row(name: str, **changes: Any) -> dict[str, Any]:
    """A row of benchmarks/deform_conv2d.py; keys that are contestants change their milliseconds."""
    times = {"conv NHWC": 10.0, "conv NCHW": 20.0, "dcn_d2 NHWC": 11.0, "dcn_d2 NCHW": 30.0, "torchvision": 66.0}
    shape = {"name": name, "batch": 1, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    row: dict[str, Any] = {"pass": "forward", "dtype": "float32", "threads": 1}
    for key, value in changes.items():
        place = times if key.replace("_NHWC", " NHWC") in times else shape if key in shape else row
        place[key.replace("_NHWC", " NHWC")] = value
    return row | {"shape": shape, "milliseconds": {key: {"median": time} for key, time in times.items()}}


def cuda_row(name: str, batch: int, times: dict[str, float], **changes: Any) -> dict[str, Any]:
    shape = {"name": name, "batch": batch, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    row = {"pass": "forward", "dtype": "bfloat16", "threads": 1, "buffers": "hot"} | changes
    return row | {"shape": shape, "milliseconds": {key: {"median": time} for key, time in times.items()}}


HALVES = (torch.float16, torch.bfloat16)


DTYPES = (torch.float32, *HALVES)


# Wide enough that coordinates in float16 are far from the right ones.
WIDE: dict[str, Any] = {"name": "wide", "channels": 32, "height": 20, "width": 152}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).abs().max() / expected.abs().max())


def spoilt(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    """The function, whose result is a tenth too large."""
    return lambda *a, **k: function(*a, **k, **keywords) * 1.1


def wide_pooling(module: ModuleType, dtype: torch.dtype, sampling: int = 2) -> Any:
    return module.Pooling(module.Shape("p2", 200, 304, 4, 56, rois=64, channels=8), sampling, "cpu", dtype)


def measured(module: ModuleType, folder: Path, *arguments: str, **sizes: Any) -> tuple[int, list[dict[str, Any]]]:
    """Runs a benchmark in which something fails; returns its exit status and its rows."""
    path = folder / "rows.json"
    status = module.main(["--output", str(path), "--repeats", "2", "--threads", "1", *arguments], **sizes)
    document = json.loads(path.read_text())
    assert document["complete"] and not list(folder.glob("*.part"))
    return status, document["rows"]


def tiny_stages(module: ModuleType) -> list[Any]:
    return [module.Shape("small", 32, 4, 5), module.Shape("large", 64, 4, 5)]


def failing(at: Callable[..., bool], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises where `at` says so of its arguments."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if at(*arguments):
            raise RuntimeError("no kernel image\nis available")
        return function(*arguments, **keywords)

    return call


class FakeGpu:
    """Stands in for a GPU where there is none: kernels run on the CPU when they are launched; time passes here only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sleeps: list[int] = []
        properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "get_device_name": lambda: "Some GPU",
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "get_device_capability": lambda device=0: (9, 0),
            "get_device_properties": lambda device: properties,
            "synchronize": lambda: None,
            "_sleep": self.sleeps.append,
            "memory_allocated": lambda: 0,
            "max_memory_allocated": lambda: 3 << 20,
            "reset_peak_memory_stats": lambda: None,
            "Event": lambda enable_timing: FakeEvent(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


class FakeEvent:
    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.time - self.time) * 1e3

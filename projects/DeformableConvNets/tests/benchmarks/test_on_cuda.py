# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What happens on a GPU only, with a stand-in for one."""

from __future__ import annotations

import json
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import deform_conv2d, deform_roi_pool, detector, measure, on_cuda, peers

from ..slim import SLIM
from .helpers import FakeGpu, failing, measured, tiny_stages


def test_rotating_contestants_take_other_operands_at_each_call() -> None:
    convolution = deform_conv2d.Layer(deform_conv2d.Shape("tiny", 32, 4, 5), "cpu", torch.float32)
    other = convolution.in_other_memory()
    for name, tensor in convolution.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]) and tensor.data_ptr() != other.tensors()[name].data_ptr()
    calls = on_cuda.rotating([{"a": lambda n=n: n} for n in range(3)])
    assert [calls["a"]() for _ in range(5)] == [0, 1, 2, 0, 1]
    assert on_cuda.copies_needed(64 << 20) == 4 and on_cuda.copies_needed(1) == on_cuda.MOST_COPIES
    assert on_cuda.copies_needed(1 << 40) == 2


def test_the_deterministic_mode_is_on_for_the_call_only() -> None:

    def call() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    assert on_cuda.deterministic(call)() == (True, False)
    assert call() == (False, True)

    def refusing() -> None:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("has no deterministic implementation")

    assert on_cuda.has_deterministic_mode(call) and not on_cuda.has_deterministic_mode(refusing)


def test_tf32_and_rotated_buffers_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--dtype", "tf32"], "only GPUs have it"), (["--buffers", "rotated"], "only for")):
        with pytest.raises(SystemExit):
            deform_conv2d.main(arguments)
        assert message in capsys.readouterr().err


def test_the_whole_path_of_a_gpu(
    convolutions_on_fake_gpu: Any, deformops: list[Any], fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    module = convolutions_on_fake_gpu
    arguments = ["--device", "cuda", "--quick", "--dtype", "float16", "--buffers", "hot", "rotated"]
    status, rows = measured(module, tmp_path, *arguments, stages=tiny_stages(module)[:1])
    assert status == 0 and not any("failed" in row for row in rows)
    expected = [(n, p, b) for n in (2, 16) for p in ("forward", "forward+backward") for b in ("hot", "rotated")]
    assert [(row["shape"]["batch"], row["pass"], row["buffers"]) for row in rows] == expected
    names = [f"{name} {layout}" for name in ("conv", "dcn_d2", "deformops") for layout in ("NCHW", "NHWC")]
    names += ["torchvision", "autocast torchvision", "branch NHWC", "split branch NHWC"]
    for row in rows:
        wanted = {*names, *(["deterministic NHWC"] if row["pass"] != "forward" else [])}
        assert set(row["milliseconds"]) == set(row["issue_milliseconds"]) == wanted
    assert set(deformops) == {(None, (1, 1), (1, 1), (1, 1))}
    assert fake_gpu.sleeps
    environment = json.loads((tmp_path / "rows.json").read_text())["environment"]
    assert environment["device"] == "Some GPU" and environment["gpu"]["capability"] == "9.0"


def test_memory_on_a_gpu(
    convolutions_on_fake_gpu: Any, deformops: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = convolutions_on_fake_gpu
    monkeypatch.setattr(module.Layer, "theirs", failing(lambda *_: True, module.Layer.theirs))
    arguments = ["--device", "cuda", "--quick", "--memory", "--dtype", "float16"]
    status, rows = measured(module, tmp_path, *arguments, stages=tiny_stages(module)[:1])
    assert status == 0 and len(rows) == 4
    for row in rows:
        assert set(row["failed"]) == {"torchvision"} and "torchvision" not in row["peak_extra_mib"]
        assert 2 < row["peak_extra_mib"]["dcn_d2 NCHW"] <= 3 and row["peak_extra_mib"]["copies"] >= 0


def test_a_peer_without_time_left_is_not_tried_again(
    convolutions_on_fake_gpu: Any, deformops: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = convolutions_on_fake_gpu
    tried = []

    def slow(*arguments: Any) -> None:
        tried.append(arguments)
        time.sleep(30)

    monkeypatch.setattr(sys.modules["deformops.integrations.torchvision"], "deform_conv2d", slow)
    arguments = ["--device", "cuda", "--quick", "--peers", "deformops", "--peer-seconds", "0.1"]
    for kind in ([], ["--memory"]):
        tried.clear()
        status, rows = measured(module, tmp_path, *arguments, *kind, stages=tiny_stages(module)[:1])
        assert status == 0 and len(tried) == 1
        assert all(row["failed"] == {"deformops": "TimeoutError: not done after 0.1 s"} for row in rows)


def test_pooling_and_detectors_on_a_gpu(fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = deform_roi_pool.Pooling

    def pooling(shape: Any, sampling: int, device: str, dtype: torch.dtype) -> Any:
        return original(shape, sampling, "cpu", dtype)

    monkeypatch.setattr(deform_roi_pool, "Pooling", pooling)
    level = deform_roi_pool.Shape("tiny", 16, 20, 4, 24, rois=6, channels=8, bins=3)
    arguments = ["--device", "cuda", "--quick", "--dtype", "float16"]
    status, rows = measured(deform_roi_pool, tmp_path, *arguments, levels=[level])
    assert status == 0 and all(set(row["issue_milliseconds"]) == set(row["milliseconds"]) for row in rows)

    class Detector(detector.Detector):
        def __init__(self, size: Any, overrides: Any, device: str, dtype: torch.dtype) -> None:
            super().__init__(size, overrides, "cpu", dtype)

    monkeypatch.setattr(detector, "Detector", Detector)
    sizes: dict[str, Any] = {"size": (64, 96), "overrides": [*SLIM, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20]}
    for dtype, of_training in (("tf32", "float16"), ("bfloat16", "bfloat16")):
        status, rows = measured(detector, tmp_path, "--device", "cuda", "--dtype", dtype, **sizes)
        assert status == 0 and [row["dtype"] for row in rows] == [dtype, dtype, of_training]
        assert all(len(row["milliseconds"]) == 5 and "failed" not in row for row in rows)


def test_the_gpu_sleeps_until_a_call_is_issued(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"quick": 0.0, "slow": 0.004, "far too slow": 0.03}
    now = [0.0]  # a clock that a busy machine does not disturb
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], thread_time=lambda: now[0])
    monkeypatch.setattr(measure, "time", clock)
    calls = {name: lambda s=s: now.__setitem__(0, now[0] + s) for name, s in seconds.items()}
    found = measure.interleave(calls, "cuda", 2, {}, ahead=True)
    milliseconds = [cycles / measure.SLEEP_CYCLES for cycles in fake_gpu.sleeps]
    assert milliseconds == milliseconds[:3] * 2
    assert milliseconds[0] == 1.0 and 6 <= milliseconds[1] < 20 and milliseconds[2] == 20
    assert found["issue_milliseconds"]["slow"] >= 4
    fake_gpu.sleeps.clear()
    assert "issue_milliseconds" not in measure.interleave(calls, "cuda", 2, {}) and not fake_gpu.sleeps


def test_hot_calls_come_right_after_one_of_the_same(fake_gpu: FakeGpu) -> None:
    """In turns alone, what a call finds in the caches is what the other contestants have left there."""
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    measure.interleave(contestants, "cuda", 2, {}, hot=True)
    assert "".join(calls) == "aaabbb" + "aabb" * 2


def test_under_autocast_only_the_forward_pass_is() -> None:
    enabled, dtypes = [], []

    class Observed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            enabled.append(torch.is_autocast_enabled("cuda"))
            dtypes.append(torch.get_autocast_dtype("cuda"))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            enabled.append(torch.is_autocast_enabled("cuda"))
            return grad

    with pytest.MonkeyPatch.context() as monkeypatch:
        FakeGpu(monkeypatch)
        call = on_cuda.under_autocast(Observed.apply, torch.float16)
        measure.prepare(call, (torch.ones(3),), torch.ones(3), backward=True)()
        on_cuda.under_autocast(Observed.apply, torch.bfloat16)(torch.ones(3))
    assert enabled == [True, False, True] and dtypes == [torch.float16, torch.bfloat16]
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(
    ("dtype", "expected", "rounds"),
    [("float32", torch.float32, False), ("tf32", torch.float32, True), ("bfloat16", torch.bfloat16, False)],
)
def test_only_tf32_lets_products_round(dtype: str, expected: torch.dtype, rounds: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = cudnn.allow_tf32 = not rounds
    for tune in (True, False):
        assert on_cuda.set_precision(dtype, tune) == expected
        assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (rounds, rounds, tune)


def test_a_package_that_does_not_import_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deformops").mkdir()
    (tmp_path / "deformops/__init__.py").write_text("class Registry[T]: pass\nraise ValueError('of a newer torch')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers.deformops() is None and peers.deformops() is None
    assert re.fullmatch(r"deformops takes no part: (SyntaxError|ValueError): .*\n", capsys.readouterr().out)

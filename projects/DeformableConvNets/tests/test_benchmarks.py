# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs from end to end on a tiny shape, and the goals are judged as they are meant."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode

from dev import readme

from .slim import SLIM


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmarks set the number of threads and the precision of the process, which other tests use too."""
    before = torch.get_num_threads()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield
    torch.set_num_threads(before)
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = flags


@pytest.fixture
def benchmark_module(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark as `python benchmarks/<name>.py` does, with its folder first on the path."""
    monkeypatch.syspath_prepend(str(project / "benchmarks"))
    kept = [getattr(importlib.import_module("measure"), name) for name in ("commit", "_print_once")]
    for function in [*kept, importlib.import_module("on_cuda").deformops]:
        function.cache_clear()
    return importlib.import_module


def run(module: ModuleType, folder: Path, *arguments: str, **sizes: Any) -> list[dict[str, Any]]:
    """Runs a benchmark; returns its rows after checking what all of them must have."""
    path = folder / f"{module.__name__}_cpu.json"
    status = module.main(["--output", str(path), "--repeats", "2", "--threads", "1", *arguments], **sizes)
    document = json.loads(path.read_text())
    assert document["benchmark"] == module.__name__ and document["device"] == "cpu" and document["complete"]
    assert not status and not any("failed" in row for row in document["rows"])
    assert document["environment"]["versions"]["torch"] and document["environment"]["commit"]
    for row in document["rows"]:
        for timing in row["milliseconds"].values():
            assert 0 < timing["low"] <= timing["median"] <= timing["high"] and timing["repeats"] == 2
    return document["rows"]


def test_deform_conv2d_times_every_variation(benchmark_module: Any, tmp_path: Path) -> None:
    module = benchmark_module("deform_conv2d")
    rows = run(module, tmp_path, stages=[module.Shape("tiny", 32, 4, 5)])
    assert len(rows) == 6 * 2
    assert {row["shape"]["groups"] for row in rows} == {1, 32} and {row["shape"]["mask"] for row in rows} == {
        True,
        False,
    }
    contestants = {"conv NCHW", "conv NHWC", "dcn_d2 NCHW", "dcn_d2 NHWC", "torchvision"}
    assert all(contestants <= set(row["milliseconds"]) for row in rows)


def test_deform_conv2d_measures_memory_on_top_of_the_output(project: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    # In a process of its own: the allocator reads its variables when it starts, and has nothing in store then.
    path = tmp_path / "deform_conv2d_memory_cpu.json"
    arguments = ["--memory", "--quick", "--output", str(path)]
    code = f"import deform_conv2d as b; b.main({arguments}, stages=[b.Shape('tiny', 32, 64, 64)])"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(project / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    forward = next(row for row in rows if row["pass"] == "forward")["peak_extra_mib"]
    columns = 9 * 32 * 64 * 64 * 4 / 2**20
    # torchvision holds the column matrix of the layer, we never do; and outputs do not count.
    assert forward["torchvision"] > 0.9 * columns > forward["dcn_d2 NHWC"] + 1
    assert forward["torchvision"] < 1.5 * columns
    assert readme.performance(tmp_path).count("| tiny: 32 x 64 x 64 | forward") == 2


def test_deform_roi_pool_times_every_mode(benchmark_module: Any, tmp_path: Path) -> None:
    module = benchmark_module("deform_roi_pool")
    level = module.Shape("tiny", 16, 20, 4, 24, rois=6, channels=8, bins=3)
    rows = run(module, tmp_path, levels=[level])
    assert [(row["shape"]["sampling"], row["pass"]) for row in rows] == [
        (sampling, direction) for sampling in (0, 2, 4) for direction in ("forward", "forward+backward")
    ]
    for row in rows:
        modes = ["plain", "deformable", "modulated", *(["psroi"] if row["shape"]["sampling"] else [])]
        expected = {f"{mode} {layout}" for mode in modes for layout in ("NCHW", "NHWC")}
        assert set(row["milliseconds"]) == {"roi_align NCHW", *expected}
    fastest = [readme.fastest(rows[2], name) for name in ("roi_align", "plain", "deformable", "modulated", "psroi")]
    cells = readme.numbers(*fastest, fastest[0] / fastest[3])
    text = readme.performance(tmp_path)
    assert f"| tiny: 16 x 20 | forward | 1 | {' | '.join(cells)} |" in text
    assert text.count("| tiny") == 2  # only one sampling


def test_drawn_rois_lie_in_the_image_and_fit_the_level(benchmark_module: Any) -> None:
    module = benchmark_module("deform_roi_pool")
    rois = module.draw_rois(module.LEVELS[1], torch.Generator().manual_seed(0))
    assert rois.shape == (512, 5) and bool((rois[:, 0] == 0).all())
    assert bool((rois[:, 1:] >= 0).all()) and bool((rois[:, 3:] <= torch.tensor([1216, 800])).all())
    sides = rois[:, 3:] - rois[:, 1:3]
    assert 80 < float(sides.median()) < 130 and float(sides.max()) <= 224


def test_detector_runs_all_parts_and_really_swaps_the_operator(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("detector")
    calls = []

    def theirs(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return original(*arguments)

    original = module.torchvision.ops.deform_conv2d
    monkeypatch.setattr(module.torchvision.ops, "deform_conv2d", theirs)
    overrides = [*SLIM, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20]
    parts = ("--parts", "trunk", "inference", "training")
    rows = run(module, tmp_path, *parts, size=(64, 96), overrides=overrides)
    assert [row["pass"] for row in rows] == ["trunk", "inference", "training"]
    contestants = {f"{name} {layout}" for name in ("plain", "dcn_d2") for layout in ("NCHW", "NHWC")}
    assert all(set(row["milliseconds"]) == contestants | {"torchvision NCHW"} for row in rows)
    # 13 blocks, in the check of equality and in 1 + 2 runs of each part
    assert len(calls) == 13 * (1 + 3 * 3)
    plain, ours = (readme.fastest(rows[0], name) for name in ("plain", "dcn_d2"))
    cells = readme.numbers(plain, ours, ours / plain, readme.fastest(rows[0], "torchvision"))
    assert f"| trunk | 1 | {' | '.join(cells)} |" in readme.performance(tmp_path)


def test_detectors_offsets_have_the_wanted_spread(benchmark_module: Any) -> None:
    module = benchmark_module("detector")
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    models = module.build(SLIM, "cpu", images)
    spreads = []
    for block in models["dcn_d2"].modules():
        if isinstance(block, module.DeformBottleneckBlock):
            block.conv2_offset.register_forward_hook(lambda branch, inputs, output: spreads.append(float(output.std())))
    with torch.no_grad():
        models["dcn_d2"].backbone.bottom_up(images)
    assert len(spreads) == 13
    assert spreads == pytest.approx([module.OFFSET_SPREAD] * 13, rel=0.1)
    assert not any("conv2_offset" in name for name in models["plain"].state_dict())


def conv_row(name: str, **changes: Any) -> dict[str, Any]:
    """A row of benchmarks/deform_conv2d.py; keys that are contestants change their milliseconds."""
    times = {"conv NHWC": 10.0, "conv NCHW": 20.0, "dcn_d2 NHWC": 11.0, "dcn_d2 NCHW": 30.0, "torchvision": 66.0}
    shape = {"name": name, "batch": 1, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    row: dict[str, Any] = {"pass": "forward", "dtype": "float32", "threads": 1}
    for key, value in changes.items():
        place = times if key.replace("_NHWC", " NHWC") in times else shape if key in shape else row
        place[key.replace("_NHWC", " NHWC")] = value
    return row | {"shape": shape, "milliseconds": {key: {"median": time} for key, time in times.items()}}


@pytest.fixture
def judge(benchmark_module: Any) -> Any:
    """Returns a function that judges the goal with these words by rows: verdict and numbers."""
    goals = benchmark_module("goals")

    def verdict(words: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
        (goal,) = [goal for goal in goals.GOALS if goal.what == words]
        return goals.verdict(goal, rows)

    return verdict


EACH = "forward price, channels_last, 1 thread, each"
MEAN = "forward price, channels_last, 1 thread, geometric mean"


def test_a_goal_for_each_is_judged_by_the_worst_and_a_mean_by_the_mean(judge: Any) -> None:
    rows = [conv_row("c3", dcn_d2_NHWC=10.0), conv_row("c4"), conv_row("c5", dcn_d2_NHWC=12.0)]
    assert judge(EACH, rows) == ("no", "at most 1.15, measured 1.200 (c5 of c3, c4, c5)")
    assert judge(MEAN, rows) == ("yes", "at most 1.1, measured 1.097 (c3 1, c4 1.1, c5 1.2)")
    assert judge(EACH, rows[:2])[0] == "yes"


def test_a_price_is_over_the_plain_convolution_in_the_same_memory_format(judge: Any) -> None:
    assert judge("forward price, NCHW, 1 thread, each", [conv_row("c3")]) == ("no", "at most 1.2, measured 1.500 (c3)")


def test_a_speed_is_that_of_the_faster_memory_format(judge: Any) -> None:
    assert judge("forward over torchvision, 1 thread, each", [conv_row("c3")])[1] == "at least 3.2, measured 6.000 (c3)"


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 2},
        {"dtype": "bfloat16"},
        {"pass": "forward+backward"},
        {"mask": False},
        {"groups": 32},
        {"batch": 2},
    ],
    ids=str,
)
def test_rows_that_a_goal_is_not_about_do_not_count(judge: Any, changes: dict[str, Any]) -> None:
    assert judge(EACH, [conv_row("c3", **changes)]) == ("not measured", "at most 1.15")
    assert judge(EACH, [conv_row("c3", dcn_d2_NHWC=99.0, **changes), conv_row("c4")])[0] == "yes"


def test_a_contestant_that_did_not_take_part_is_not_measured(judge: Any) -> None:
    assert judge("forward over ONNX Runtime, 1 thread, each", [conv_row("c3")])[0] == "not measured"


@pytest.mark.parametrize(("ours", "answer"), [(5.7, "yes"), (6.0, "no")])
def test_scaling_is_compared_with_the_plain_convolutions(judge: Any, ours: float, answer: str) -> None:
    """The plain one becomes 2x as fast; ours 11 / 5.7 = 1.93x and 1.83x."""
    words = "forward, NHWC: gain from all threads over the plain convolution's"
    rows = [conv_row("c3"), conv_row("c3", threads=2, conv_NHWC=5.0, dcn_d2_NHWC=ours)]
    assert judge(words, rows) == (answer, f"at least 0.95, measured {11 / ours / 2:.3f} (c3)")
    assert judge(words, rows[:1])[0] == "not measured"


def test_extra_memory_may_be_none_at_all(judge: Any) -> None:
    shape = conv_row("c3")["shape"]
    words = "forward, NHWC: extra memory over the plain convolution's"
    row = {"shape": shape, "pass": "forward", "peak_extra_mib": {"conv NHWC": 0.0, "dcn_d2 NHWC": 0.0}}
    assert judge(words, [row])[0] == "yes"
    row["peak_extra_mib"]["dcn_d2 NHWC"] = 0.1
    assert judge(words, [row])[0] == "no"


def test_check_reports_files_of_all_benchmarks(
    benchmark_module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"device": "Some CPU", "commit": "abc", "date": "2026-01-02"}
    roi = {"pass": "forward", "dtype": "float32", "threads": 1}
    roi["shape"] = {"name": "p2", "sampling": 2, "rois": 512, "channels": 256, "bins": 7}
    roi["milliseconds"] = {"roi_align NCHW": {"median": 24.0}, "modulated NHWC": {"median": 2.0}}
    documents = {"deform_conv2d": [conv_row("c3")], "deform_roi_pool": [roi], "detector": []}
    paths = []
    for name, rows in documents.items():
        paths.append(str(tmp_path / f"{name}.json"))
        document = {"benchmark": name, "device": "cpu", "environment": environment, "rows": rows}
        Path(paths[-1]).write_text(json.dumps(document))
    for name in documents:
        benchmark_module(name).main(["--check", *paths])
        text = capsys.readouterr().out
        assert "deform_conv2d.json: Some CPU, commit abc, 2026-01-02" in text
        assert f"yes          {EACH}: at most 1.15, measured 1.100 (c3)" in text
        assert "forward over roi_align, NHWC, sampling 2, 1 thread, each: at least 12, measured 12.000 (p2)" in text
        assert "0 yes, 0 no, 4 not measured" in text.splitlines()[-1]


def test_every_goal_is_about_contestants_that_exist(benchmark_module: Any) -> None:
    goals = benchmark_module("goals")
    assert len({goal.what for goal in goals.GOALS}) == len(goals.GOALS)
    layouts = [" NCHW", " NHWC", ""]
    known = {
        "deform_conv2d": [f"{name}{x}" for name in ("conv", "dcn_d2") for x in layouts]
        + ["torchvision", "onnxruntime"],
        "deform_roi_pool": [f"{name}{x}" for name in ("roi_align", "modulated") for x in layouts],
        "detector": [f"{name}{x}" for name in ("plain", "dcn_d2") for x in layouts],
    }
    known["deform_conv2d_memory"] = known["deform_conv2d"]
    for goal in goals.GOALS:
        assert set(goal.quotient) <= set(known[goal.benchmark]), goal
        assert (goal.at_most < float("inf")) != (goal.at_least > 0), goal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--repeats", "1"], "at least 2, got 1"), (["--device", "cuda"], "no GPU is visible")],
)
def test_options_that_cannot_work_are_refused(
    benchmark_module: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        benchmark_module("deform_roi_pool").main(arguments)
    assert message in capsys.readouterr().err


def cuda_row(name: str, batch: int, times: dict[str, float], **changes: Any) -> dict[str, Any]:
    shape = {"name": name, "batch": batch, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    row = {"pass": "forward", "dtype": "bfloat16", "threads": 1, "buffers": "hot"} | changes
    return row | {"shape": shape, "milliseconds": {key: {"median": time} for key, time in times.items()}}


def test_goals_on_a_gpu_are_judged_by_all_its_files_together(
    benchmark_module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"conv NCHW": 2.0, "conv NHWC": 1.0, "dcn_d2 NCHW": 9.0, "dcn_d2 NHWC": 1.2, "autocast torchvision": 18.0}
    rows = [cuda_row("c3", 2, times), cuda_row("c3", 16, times | {"dcn_d2 NHWC": 1.5})]
    rows.append(cuda_row("c3", 1, times | {"dcn_d2 NHWC": 99.0}))  # no goal is about one image
    rows.append(cuda_row("c3", 2, times | {"dcn_d2 NHWC": 99.0}, buffers="rotated"))
    slow = cuda_row("c3", 2, {"conv NHWC": 1.0, "dcn_d2 NHWC": 1.3, "torchvision": 3.0}, dtype="float32")
    environment = {"device": "Some GPU", "commit": "abc", "date": "2026-01-02"}
    paths = []
    for dtype, found in (("bfloat16", rows), ("float32", [slow])):
        paths.append(str(tmp_path / f"deform_conv2d_cuda_{dtype}.json"))
        document = {"benchmark": "deform_conv2d", "device": "cuda", "environment": environment, "rows": found}
        Path(paths[-1]).write_text(json.dumps(document))
    benchmark_module("deform_conv2d").main(["--check", *paths])
    text = capsys.readouterr().out
    price = "bfloat16 forward price, channels_last, hot: at most 1.4, measured 1.342 (c3 batch 2 1.2, c3 batch 16 1.5)"
    assert f"yes          CUDA, {price}" in text
    assert "no           CUDA, bfloat16 forward price, channels_last, rotated: at most 1.4, measured 99" in text
    assert "no           CUDA, float32 forward price, channels_last, hot: at most 1, measured 1.300" in text
    assert "yes          CUDA, bfloat16 forward over autocast torchvision, hot: at least 10, measured 13.4" in text
    assert "not measured CUDA, tf32 forward price" in text
    assert "deform_roi_pool" not in text


def test_every_goal_on_a_gpu_is_about_contestants_that_exist(benchmark_module: Any) -> None:
    goals = benchmark_module("goals_cuda").GOALS
    assert len({goal.what for goal in goals}) == len(goals)
    layouts = [" NCHW", " NHWC", ""]
    known = {
        "deform_conv2d": [f"{name}{x}" for name in ("conv", "dcn_d2", "deformops") for x in layouts]
        + ["torchvision", "autocast torchvision", "deterministic NHWC"],
        "deform_roi_pool": [f"{name}{x}" for name in ("roi_align", "modulated", "deterministic") for x in layouts],
        "detector": ["plain", "dcn_d2"],
        "deform_conv2d_memory": ["dcn_d2 NCHW", "copies"],
    }
    for goal in goals:
        assert set(goal.quotient) <= set(known[goal.benchmark]), goal
        assert (goal.at_most < float("inf")) != (goal.at_least > 0), goal


def test_rotating_contestants_take_other_operands_at_each_call(benchmark_module: Any) -> None:
    module, on_cuda = benchmark_module("deform_conv2d"), benchmark_module("on_cuda")
    layer = module.Layer(module.Shape("tiny", 32, 4, 5), "cpu", torch.float32)
    other = layer.in_other_memory()
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]) and tensor.data_ptr() != other.tensors()[name].data_ptr()
    calls = on_cuda.rotating([{"a": lambda n=n: n} for n in range(3)])
    assert [calls["a"]() for _ in range(5)] == [0, 1, 2, 0, 1]
    assert on_cuda.copies_needed(64 << 20) == 4 and on_cuda.copies_needed(1) == on_cuda.MOST_COPIES
    assert on_cuda.copies_needed(1 << 40) == 2


def test_the_deterministic_mode_is_on_for_the_call_only(benchmark_module: Any) -> None:
    on_cuda = benchmark_module("on_cuda")

    def call() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    assert on_cuda.deterministic(call)() == (True, False)
    assert call() == (False, True)

    def refusing() -> None:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("has no deterministic implementation")

    assert on_cuda.has_deterministic_mode(call) and not on_cuda.has_deterministic_mode(refusing)


def test_tf32_and_rotated_buffers_need_a_gpu(benchmark_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--dtype", "tf32"], "only GPUs have it"), (["--buffers", "rotated"], "only for")):
        with pytest.raises(SystemExit):
            benchmark_module("deform_conv2d").main(arguments)
        assert message in capsys.readouterr().err


def test_results_say_whether_the_tree_was_clean(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark_module("measure")
    monkeypatch.delenv("DCN_COMMIT", raising=False)
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "benchmarks" / "measure.py"))

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def changes() -> Any:
        measure.commit.cache_clear()
        return measure.environment("cpu")["uncommitted_changes"]

    for name in ("source.py", "results/old.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert changes() is False
    (tmp_path / "results/old.json").write_text("2")
    assert changes() is False
    (tmp_path / "source.py").write_text("2")
    assert changes() is True


@pytest.mark.parametrize("what", ["no git", "no repository"])
def test_without_git_the_commit_is_unknown(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    measure = benchmark_module("measure")
    monkeypatch.delenv("DCN_COMMIT", raising=False)
    if what == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        monkeypatch.setattr(measure, "__file__", str(tmp_path / "benchmarks" / "measure.py"))
    environment = measure.environment("cpu")
    assert environment["commit"] == "unknown" and environment["uncommitted_changes"] is None
    document = {"environment": environment, "rows": [{"dtype": "float32"}]}
    assert "commit unknown, 2" in readme.caption(tmp_path / "x.json", document)  # the date follows


@pytest.mark.parametrize(
    ("named", "changes"), [("abc123def456", False), ("abc123def456 with changes", True)], ids=("clean", "changed")
)
def test_a_variable_names_the_commit_before_git_is_asked(
    benchmark_module: Any, monkeypatch: pytest.MonkeyPatch, named: str, changes: bool
) -> None:
    measure = benchmark_module("measure")
    monkeypatch.setenv("DCN_COMMIT", named)
    monkeypatch.setattr(measure.subprocess, "run", None)
    environment = measure.environment("cpu")
    assert (environment["commit"], environment["uncommitted_changes"]) == ("abc123def456", changes)


def test_git_is_asked_once(benchmark_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = benchmark_module("measure")
    monkeypatch.delenv("DCN_COMMIT", raising=False)
    commands = []

    def ran(command: list[str], **_: Any) -> Any:
        commands.append(command[1])
        return SimpleNamespace(stdout="abc\n")

    monkeypatch.setattr(measure.subprocess, "run", ran)
    assert measure.environment("cpu")["commit"] == measure.environment("cpu")["commit"] == "abc"
    assert commands == ["rev-parse", "status"]


HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
# Wide enough that coordinates in float16 are far from the right ones.
WIDE: dict[str, Any] = {"name": "wide", "channels": 32, "height": 20, "width": 152}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).abs().max() / expected.abs().max())


def test_torchvision_computes_bfloat16_in_float32_on_a_gpu_too(
    benchmark_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("deform_conv2d")
    layer = module.Layer(module.Shape("tiny", 32, 4, 5), "cpu", torch.bfloat16)
    dtypes = set()

    def operator(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        dtypes.update(t.dtype for t in (x, offset, weight, rest[-1]))
        return x

    monkeypatch.setattr(torchvision.ops, "deform_conv2d", operator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        names = ("input", "weight", "offset", "mask")
        tensors = [torch.empty(getattr(layer, name).shape, device="cuda", dtype=torch.bfloat16) for name in names]
        output = layer.theirs(*tensors)
    assert dtypes == {torch.float32} and output.dtype == torch.bfloat16 and output.device.type == "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions_are_compared_with_torchvision_in_float32(benchmark_module: Any, dtype: torch.dtype) -> None:
    module = benchmark_module("deform_conv2d")
    layer = module.Layer(module.Shape(**WIDE), "cpu", dtype)
    for backward in (False, True):
        failed: dict[str, str] = {}
        module.check_equal(layer, module.TOLERANCES[str(dtype).removeprefix("torch.")], failed, backward)
        assert not failed
    if dtype == torch.float16:  # what torchvision computes in it would be no measure
        theirs = layer.contestants(False)["torchvision"]()
        assert relative_error(theirs, layer.reference(False)[0]) > 0.03


def test_the_reference_does_not_round_to_tf32(benchmark_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, on_cuda = benchmark_module("deform_conv2d"), benchmark_module("on_cuda")
    on_cuda.set_precision("tf32")
    allowed = []

    def operator(x: torch.Tensor, *_: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.matmul.allow_tf32)
        return x

    monkeypatch.setattr(torchvision.ops, "deform_conv2d", operator)
    module.Layer(module.Shape("tiny", 32, 4, 5), "cpu", torch.float32).reference(False)
    assert allowed == [False] and torch.backends.cuda.matmul.allow_tf32


def spoilt(function: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    """The function, whose result is a tenth too large."""
    return lambda *a, **k: function(*a, **k, **keywords) * 1.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_convolutions_are_found(
    benchmark_module: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    module = benchmark_module("deform_conv2d")
    monkeypatch.setattr(module, "deform_conv2d", spoilt(module.deform_conv2d))
    layer = module.Layer(module.Shape(**WIDE), "cpu", dtype)
    for backward, words in ((False, "its output differs"), (True, "its input's gradient differs")):
        failed: dict[str, str] = {}
        module.check_equal(layer, module.TOLERANCES[str(dtype).removeprefix("torch.")], failed, backward)
        assert set(failed) == {"dcn_d2 NCHW", "dcn_d2 NHWC"}
        assert failed["dcn_d2 NHWC"].startswith(words) and re.search(r"by 0\.(1|09)", failed["dcn_d2 NHWC"])


@pytest.mark.parametrize("name", ["weight", "offset", "mask"])
def test_wrong_gradients_are_found(benchmark_module: Any, name: str) -> None:
    module = benchmark_module("deform_conv2d")
    names = ["input", "weight", "offset", "mask"]
    expected = [torch.randn(100) for _ in names]
    actual = [e * (1.1 if n == name else 1) for n, e in zip(names, expected)]
    assert f"its {name}'s gradient differs" in module._difference(actual, expected, 0.02, branch=False)
    assert not module._difference(expected, expected, 0.0, branch=False)
    assert not module._difference([*expected[:2], torch.zeros(9)], expected, 0.0, branch=True)


def wide_pooling(module: ModuleType, dtype: torch.dtype, sampling: int = 2) -> Any:
    return module.Pooling(module.Shape("p2", 200, 304, 4, 56, rois=64, channels=8), sampling, "cpu", dtype)


@pytest.mark.parametrize("sampling", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_is_compared_with_roi_align_in_float32(
    benchmark_module: Any, dtype: torch.dtype, sampling: int
) -> None:
    module = benchmark_module("deform_roi_pool")
    pooling = wide_pooling(module, dtype, sampling)
    assert module.check_equal(pooling) == {}
    if dtype == torch.float16:  # the one that is timed is in float16, and would be no measure
        timed = pooling.contestants(backward=False)["roi_align NCHW"]()
        assert timed.dtype == dtype and relative_error(timed, pooling.roi_align(pooling.input, torch.float32)) > 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_pooling_is_found(benchmark_module: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    module = benchmark_module("deform_roi_pool")
    right = module.deform_roi_pool

    def wrong_in_channels_last(x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        return right(x, *arguments, **keywords) * (1 if x.is_contiguous() else 1.1)

    monkeypatch.setattr(module, "deform_roi_pool", wrong_in_channels_last)
    assert set(module.check_equal(wide_pooling(module, dtype))) == {f"{m} NHWC" for m in module.MODES[:3]}
    monkeypatch.setattr(module, "deform_roi_pool", spoilt(right))
    assert set(module.check_equal(wide_pooling(module, dtype))) == {"plain NCHW", "plain NHWC", "modulated NCHW"}


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


def test_a_peer_that_raises_costs_only_its_own_numbers(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark_module("deform_conv2d")
    monkeypatch.setattr(module.Layer, "theirs", failing(lambda layer, *_: True, module.Layer.theirs))
    status, rows = measured(module, tmp_path, "--quick", stages=tiny_stages(module))
    assert status == 0 and len(rows) == 4
    for row in rows:
        assert row["failed"] == {"torchvision": "RuntimeError: no kernel image"}
        assert {"dcn_d2 NHWC", "conv NHWC"} <= set(row["milliseconds"]) and "torchvision" not in row["milliseconds"]
    text = capsys.readouterr().out
    assert text.count("torchvision drops out: RuntimeError: no kernel image\n") == 1
    assert text.count("  failed: torchvision\n") == 4


def test_a_peer_that_cannot_be_made_ready_drops_out(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("deform_conv2d")
    monkeypatch.setattr(module.Layer, "_onnx_runtime", failing(lambda layer: True, module.Layer._onnx_runtime))
    status, rows = measured(module, tmp_path, "--quick", stages=tiny_stages(module)[:1])
    assert status == 0 and [set(row.get("failed", ())) for row in rows] == [{"onnxruntime"}] * 2


def test_a_peer_whose_values_are_wrong_drops_out(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("deform_conv2d")
    wrong = spoilt(lambda layer: torch.ones(1, 32, 4, 5))
    monkeypatch.setattr(module.Layer, "_onnx_runtime", lambda layer: lambda: [wrong(layer).numpy()])
    status, rows = measured(module, tmp_path, "--quick", stages=tiny_stages(module)[:1])
    assert status == 0 and re.match(r"its output differs from .* by \d", rows[0]["failed"]["onnxruntime"])
    assert "onnxruntime" not in rows[0]["milliseconds"]


def test_who_raises_while_it_is_timed_drops_out(benchmark_module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measure = benchmark_module("measure")
    calls = iter(range(9))
    contestants = {"a": lambda: sum(range(9)), "b": lambda: 1 // (next(calls) - 2), "c": lambda: 1 // 0, "d x": list}
    failed = {"d": "too slow"}
    found = measure.interleave(contestants, "cpu", 4, failed)
    assert list(found) == ["milliseconds"] and list(found["milliseconds"]) == ["a"]
    assert set(failed) == {"b", "c", "d"} and failed["c"].startswith("ZeroDivisionError: ")
    assert "c drops out: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["conv", "dcn_d2", "operands"])
def test_if_one_of_ours_fails_the_other_shapes_go_on_and_the_status_says_so(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    module = benchmark_module("deform_conv2d")
    if what == "conv":
        monkeypatch.setattr(module.F, "conv2d", failing(lambda x, *_: x.shape[1] == 32, module.F.conv2d))
    elif what == "dcn_d2":
        monkeypatch.setattr(module, "deform_conv2d", failing(lambda x, *_: x.shape[1] == 32, module.deform_conv2d))
    else:
        monkeypatch.setattr(module, "Layer", failing(lambda shape, *_: shape.channels == 32, module.Layer))
    status, rows = measured(module, tmp_path, "--quick", stages=tiny_stages(module))
    assert status == 1 and len(rows) == 4
    names = {"operands"} if what == "operands" else {f"{what} NCHW", f"{what} NHWC"}
    assert all(set(row["failed"]) == names and not names & set(row["milliseconds"]) for row in rows[:2])
    assert all("failed" not in row and "dcn_d2 NHWC" in row["milliseconds"] for row in rows[2:])
    assert what == "operands" or all("torchvision" in row["milliseconds"] for row in rows)


def test_without_a_reference_numbers_are_kept_and_the_status_says_so(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("deform_conv2d")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    status, rows = measured(module, tmp_path, "--quick", "--peers", "none", stages=tiny_stages(module)[:1])
    assert status == 1
    for row in rows:
        assert set(row["failed"]) == {"reference"} and "dcn_d2 NHWC" in row["milliseconds"]


def test_pooling_that_fails_costs_only_its_own_numbers(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("deform_roi_pool")
    levels = [module.Shape("tiny", 16, 20, 4, 24, rois=6, channels=channels, bins=3) for channels in (8, 4)]
    peer = failing(lambda pooling, x, dtype=None: dtype is None, module.Pooling.roi_align)
    monkeypatch.setattr(module.Pooling, "roi_align", peer)
    status, rows = measured(module, tmp_path, "--quick", levels=levels)
    assert status == 0 and all(set(row["failed"]) == {"roi_align NCHW"} for row in rows)
    assert all("modulated NHWC" in row["milliseconds"] for row in rows)
    monkeypatch.undo()
    monkeypatch.setattr(module, "deform_psroi_pool", failing(lambda x, *_: x.shape[1] == 8, module.deform_psroi_pool))
    status, rows = measured(module, tmp_path, "--quick", levels=levels)
    ours = [set(row.get("failed", ())) for row in rows]
    assert status == 1 and ours == [{"psroi NCHW", "psroi NHWC"}] * 2 + [set()] * 2
    assert all("modulated NHWC" in row["milliseconds"] for row in rows)


def test_detectors_that_fail_cost_only_their_own_numbers(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("detector")
    theirs = failing(lambda *_: True, module._torchvision_by_branch)
    monkeypatch.setattr(module, "_torchvision_by_branch", theirs)
    sizes: dict[str, Any] = {"size": (64, 96), "overrides": SLIM}
    status, (row,) = measured(module, tmp_path, "--parts", "trunk", **sizes)
    assert status == 0 and set(row["failed"]) == {"torchvision NCHW"} and len(row["milliseconds"]) == 4
    monkeypatch.undo()
    original = module.deform_conv.modulated_deform_conv2d
    monkeypatch.setattr(module.deform_conv, "modulated_deform_conv2d", spoilt(original))
    status, (row,) = measured(module, tmp_path, "--parts", "trunk", **sizes)
    assert status == 1 and set(row["failed"]) == {"dcn_d2 NCHW", "dcn_d2 NHWC"}
    assert set(row["milliseconds"]) == {"plain NCHW", "plain NHWC", "torchvision NCHW"}


def test_a_detector_that_pools_fewer_boxes_is_not_compared(
    benchmark_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("detector")
    detector = module.Detector((64, 96), SLIM, "cpu", torch.float32)
    assert module.check_equal(detector, module.TOLERANCES["float32"]) == {}
    generator = detector.models["plain NHWC"].proposal_generator
    generator.register_forward_hook(lambda _, inputs, output: ([output[0][0][:1]], output[1]))
    failed = module.check_equal(detector, module.TOLERANCES["float32"])
    assert list(failed) == ["plain NHWC"] and failed["plain NHWC"].startswith("pools 1 boxes, another model ")


def test_a_peer_that_takes_too_long_drops_out_of_all_rows(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark_module("measure")
    failed: dict[str, str] = {}
    assert measure.attempt(failed, "deformops NCHW", time.sleep, 30, seconds=0.05) is None
    assert failed == {"deformops": "TimeoutError: not done after 0.05 s"} == measure.too_slow(failed)
    assert measure.dropped(failed, "deformops NHWC") and not measure.dropped(failed, "dcn_d2 NHWC")
    assert measure.attempt(failed, "quick", lambda: 7, seconds=5) == 7 and "quick" not in failed
    assert measure.attempt(failed, "dcn_d2 NHWC", time.sleep, 0.1) is None and "dcn_d2 NHWC" not in failed


def test_rows_are_written_as_they_are_measured(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, measure = benchmark_module("deform_conv2d"), benchmark_module("measure")
    rows = iter(range(3))

    def cut_off(*_: Any, **__: Any) -> dict[str, Any]:
        if next(rows) == 2:
            raise KeyboardInterrupt
        return {"milliseconds": {}}

    monkeypatch.setattr(measure, "interleave", cut_off)
    path = tmp_path / "new" / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        module.main(["--output", str(path), "--threads", "1", "--quick"], stages=tiny_stages(module))
    document = json.loads(path.read_text())
    assert len(document["rows"]) == 2 and document["complete"] is False and document["environment"]["commit"]
    assert "written" not in capsys.readouterr().out

    results = measure.Results(path, "deform_conv2d", "cpu")
    monkeypatch.setattr(Path, "write_text", lambda path, text: path.open("w").write(text[:9]) and 1 // 0)
    with pytest.raises(ZeroDivisionError):
        results.finish()
    assert json.loads(path.read_text()) == document


def test_all_benchmarks_write_rows_as_they_are_measured(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark_module("measure")
    complete = []
    replace = os.replace

    def observed(source: Path, target: Path) -> None:
        complete.append(json.loads(Path(source).read_text())["complete"])
        replace(source, target)

    monkeypatch.setattr(measure.os, "replace", observed)
    roi_pool, detector = benchmark_module("deform_roi_pool"), benchmark_module("detector")
    run(roi_pool, tmp_path, "--quick", levels=[roi_pool.Shape("t", 16, 20, 4, 24, rois=6, channels=8, bins=3)])
    assert complete == [False, False, True]
    complete.clear()
    run(detector, tmp_path, "--parts", "trunk", size=(64, 96), overrides=SLIM)
    assert complete == [False, True]


def test_peers_can_be_left_out(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark_module("deform_conv2d")
    dtypes = []
    original = torchvision.ops.deform_conv2d

    def observed(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        dtypes.append(x.dtype)
        return original(x, *arguments)

    monkeypatch.setattr(torchvision.ops, "deform_conv2d", observed)
    stages = tiny_stages(module)[:1]
    rows = run(module, tmp_path, "--quick", "--peers", "none", "--dtype", "float16", stages=stages)
    ours = {f"{name} {layout}" for name in ("conv", "dcn_d2") for layout in ("NCHW", "NHWC")}
    assert all(set(row["milliseconds"]) == ours for row in rows)
    assert dtypes == [torch.float32] * 2  # the comparison, forward and backward
    rows = run(module, tmp_path, "--quick", "--peers", "torchvision", "deformops", stages=stages)
    assert all(set(row["milliseconds"]) == {*ours, "torchvision"} for row in rows)
    with pytest.raises(SystemExit):
        module.main(["--peers", "none", "torchvision"])
    assert "all or none or some names" in capsys.readouterr().err


class FakeGpu:
    """Stands in for a GPU where there is none: kernels run on the CPU when they are launched; time passes here only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sleeps: list[int] = []
        properties = SimpleNamespace(multi_processor_count=132)
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


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


@pytest.fixture
def convolutions_on_fake_gpu(benchmark_module: Any, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark of convolutions with all that is done on a GPU, but tensors on the CPU."""
    module = benchmark_module("deform_conv2d")

    class Layer(module.Layer):
        def __init__(self, shape: Any, device: str, dtype: torch.dtype) -> None:
            super().__init__(shape, "cpu", dtype)
            self.on_gpu = device == "cuda"

    monkeypatch.setattr(module, "Layer", Layer)
    return module


@pytest.fixture
def deformops(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the package deformops; returns the arguments of its calls but for the tensors."""
    calls = []

    def deform_conv2d(
        input: Any, offset: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, mask: Any
    ) -> torch.Tensor:
        calls.append((bias, stride, padding, dilation))
        return torchvision.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    module = SimpleNamespace(deform_conv2d=deform_conv2d)
    for name in ("deformops", "deformops.integrations"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deformops.integrations.torchvision", module)
    return calls


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


def test_pooling_and_detectors_on_a_gpu(
    benchmark_module: Any, fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark_module("deform_roi_pool")
    original = module.Pooling

    def pooling(shape: Any, sampling: int, device: str, dtype: torch.dtype) -> Any:
        return original(shape, sampling, "cpu", dtype)

    monkeypatch.setattr(module, "Pooling", pooling)
    level = module.Shape("tiny", 16, 20, 4, 24, rois=6, channels=8, bins=3)
    arguments = ["--device", "cuda", "--quick", "--dtype", "float16"]
    status, rows = measured(module, tmp_path, *arguments, levels=[level])
    assert status == 0 and all(set(row["issue_milliseconds"]) == set(row["milliseconds"]) for row in rows)

    module = benchmark_module("detector")

    class Detector(module.Detector):
        def __init__(self, size: Any, overrides: Any, device: str, dtype: torch.dtype) -> None:
            super().__init__(size, overrides, "cpu", dtype)

    monkeypatch.setattr(module, "Detector", Detector)
    sizes: dict[str, Any] = {"size": (64, 96), "overrides": [*SLIM, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20]}
    for dtype, of_training in (("tf32", "float16"), ("bfloat16", "bfloat16")):
        status, rows = measured(module, tmp_path, "--device", "cuda", "--dtype", dtype, **sizes)
        assert status == 0 and [row["dtype"] for row in rows] == [dtype, dtype, of_training]
        assert all(len(row["milliseconds"]) == 5 and "failed" not in row for row in rows)


def test_the_gpu_sleeps_until_a_call_is_issued(
    benchmark_module: Any, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark_module("measure")
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


def test_hot_calls_come_right_after_one_of_the_same(benchmark_module: Any, fake_gpu: FakeGpu) -> None:
    """In turns alone, what a call finds in the caches is what the other contestants have left there."""
    measure = benchmark_module("measure")
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "ab"}
    measure.interleave(contestants, "cuda", 2, {}, hot=True)
    assert "".join(calls) == "aaabbb" + "aabb" * 2


def test_under_autocast_only_the_forward_pass_is(benchmark_module: Any) -> None:
    on_cuda, measure = benchmark_module("on_cuda"), benchmark_module("measure")
    enabled = []

    class Observed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            enabled.append(torch.is_autocast_enabled("cuda"))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            enabled.append(torch.is_autocast_enabled("cuda"))
            return grad

    with pytest.MonkeyPatch.context() as monkeypatch:
        FakeGpu(monkeypatch)
        call = on_cuda.under_autocast(Observed.apply, torch.float16)
        measure.prepare(call, (torch.ones(3),), torch.ones(3), backward=True)()
    assert enabled == [True, False]


def test_a_package_that_does_not_import_takes_no_part(
    benchmark_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_cuda = benchmark_module("on_cuda")
    (tmp_path / "deformops").mkdir()
    (tmp_path / "deformops/__init__.py").write_text("class Registry[T]: pass\nraise ValueError('of a newer torch')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert on_cuda.deformops() is None and on_cuda.deformops() is None
    assert re.fullmatch(r"deformops takes no part: (SyntaxError|ValueError): .*\n", capsys.readouterr().out)


def test_results_name_the_gpu_and_what_drives_it(
    benchmark_module: Any, fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = benchmark_module("measure")
    monkeypatch.setattr(measure.metadata, "version", lambda name: f"{name}-1")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    environment = measure.environment("cuda")
    names = ("torch", "torchvision", "onnxruntime", "deformops", "triton")
    assert environment["versions"] == {name: f"{name}-1" for name in names}
    assert environment["gpu"].pop("driver") == "580.1"
    assert environment["gpu"] == {"capability": "9.0", "multiprocessors": 132, "cuda": "13.0", "cudnn": 91900}
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1 // 0)
    assert set(measure.environment("cuda")["gpu"]) == {"capability", "multiprocessors", "cuda"}
    assert "gpu" not in measure.environment("cpu")


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(0.03123, "31.2 us"), (0.9999, "1000 us"), (1.0, "1 ms"), (12.345, "12.3 ms"), (61234.5, "61234 ms"), (None, "-")],
)
def test_durations_have_three_digits(benchmark_module: Any, milliseconds: float | None, words: str) -> None:
    assert benchmark_module("measure").duration(milliseconds) == words


def test_short_times_are_printed_with_enough_digits(convolutions_on_fake_gpu: Any, benchmark_module: Any) -> None:
    times = {"conv NHWC": 0.01234, "dcn_d2 NHWC": 0.03456, "torchvision": 1.0}
    row = cuda_row("c3", 2, times)
    line = convolutions_on_fake_gpu.describe(row)
    assert "conv  12.3 us  dcn_d2  34.6 us  price  2.80  speed: 28.94x torchvision" in line
    line = convolutions_on_fake_gpu.describe(row | {"milliseconds": {}})
    assert "conv        -  dcn_d2        -  price     -  speed: -" in line
    row = {"shape": {"name": "p2", "sampling": 2}, "pass": "forward", "threads": 1, "milliseconds": {}}
    assert "roi_align        -" in benchmark_module("deform_roi_pool").describe(row)
    row["milliseconds"] = {"roi_align NCHW": {"median": 0.5}, "plain NHWC": {"median": 0.05}}
    assert "roi_align   500 us  plain 50 us (10.0x)" in benchmark_module("deform_roi_pool").describe(row)


@pytest.mark.parametrize(
    ("failed", "answer"),
    [
        ({"dcn_d2 NHWC": "RuntimeError"}, "not measured"),
        ({"conv NHWC": "RuntimeError"}, "not measured"),
        ({"operands": "OutOfMemoryError"}, "not measured"),
        ({"torchvision": "RuntimeError"}, "yes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_goal_is_not_met_where_one_of_its_contestants_failed(judge: Any, failed: dict[str, str], answer: str) -> None:
    rows = [conv_row("c3"), conv_row("c4") | {"failed": failed}]
    if answer == "not measured":
        rows[1]["milliseconds"] = {}
    found, words = judge(MEAN, rows)
    assert found == answer and (answer == "yes" or words == f"at most 1.1; failed: {next(iter(failed))} at c4")


def test_check_says_that_a_file_is_not_complete(
    benchmark_module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"device": "Some device", "commit": "abc", "date": "2026-01-02"}
    for device in ("cpu", "cuda"):
        document = {"benchmark": "detector", "device": device, "environment": environment, "rows": []}
        path = tmp_path / f"{device}.json"
        path.write_text(json.dumps(document | {"complete": False}))
        benchmark_module("detector").main(["--check", str(path)])
        assert f"{device}.json: Some device, commit abc, 2026-01-02, not complete\n" in capsys.readouterr().out


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
def test_kernels_have_short_names(benchmark_module: Any, kernel: str, short: str) -> None:
    assert benchmark_module("profile_cuda").short_name(kernel) == short


def test_profile_adds_up_what_a_call_launches(benchmark_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark_module("profile_cuda")
    for name, call in module.calls(
        module.deform_conv2d.Shape("tiny", 32, 4, 5), "cpu", torch.float32, "forward"
    ).items():
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
    found = module.kernel_times(lambda: None, repeats=3)
    assert found == {"a": {"microseconds": 6.0, "launches": 2.0}, "b": {"microseconds": 5.0, "launches": 1.0}}
    shape = {"name": "c3", "batch": 16}
    text = module.describe({"shape": shape, "pass": "forward", "contestant": "dcn_d2", "kernels": found})
    assert "c3 batch 16 forward" in text and "11.0 us" in text and "6.0 us   2.0 x  a" in text

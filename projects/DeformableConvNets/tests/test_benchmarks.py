# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs from end to end on a tiny shape, and the goals are judged as they are meant."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dev import readme

from .slim import SLIM


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmarks set the number of threads of the process, which other tests use too."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def benchmark_module(project: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark as `python benchmarks/<name>.py` does, with its folder first on the path."""
    monkeypatch.syspath_prepend(str(project / "benchmarks"))
    return importlib.import_module


def run(module: ModuleType, folder: Path, *arguments: str, **sizes: Any) -> list[dict[str, Any]]:
    """Runs a benchmark; returns its rows after checking what all of them must have."""
    path = folder / f"{module.__name__}_cpu.json"
    module.main(["--output", str(path), "--repeats", "2", "--threads", "1", *arguments], **sizes)
    document = json.loads(path.read_text())
    assert document["benchmark"] == module.__name__ and document["device"] == "cpu"
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
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "benchmarks" / "measure.py"))

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("source.py", "results/old.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert not measure.environment("cpu")["uncommitted_changes"]
    (tmp_path / "results/old.json").write_text("2")
    assert not measure.environment("cpu")["uncommitted_changes"]
    (tmp_path / "source.py").write_text("2")
    assert measure.environment("cpu")["uncommitted_changes"]

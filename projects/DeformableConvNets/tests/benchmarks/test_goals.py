# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Goals are judged as they are meant, and `--check` reports them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import deform_conv2d, deform_roi_pool, detector, goals, goals_cpu, goals_cuda, profile_cuda, rows

from .helpers import conv_row, cuda_row


def check(benchmark: ModuleType, *paths: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `--check` of a benchmark says of result files."""
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--check", *paths])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def judge() -> Any:
    """Returns a function that judges the goal with these words by rows: verdict and numbers."""

    def verdict(words: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
        (goal,) = [goal for goal in goals_cpu.GOALS if goal.what == words]
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


def test_check_reports_files_of_all_benchmarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"device": "Some CPU", "commit": "abc", "date": "2026-01-02"}
    roi = {"pass": "forward", "dtype": "float32", "threads": 1}
    roi["shape"] = {"name": "p2", "sampling": 2, "rois": 512, "channels": 256, "bins": 7}
    roi["milliseconds"] = {"roi_align NCHW": {"median": 24.0}, "modulated NHWC": {"median": 2.0}}
    documents = {"deform_conv2d": [conv_row("c3")], "deform_roi_pool": [roi], "detector": []}
    paths = []
    for name, found in documents.items():
        paths.append(str(tmp_path / f"{name}.json"))
        document = {"benchmark": name, "device": "cpu", "environment": environment, "rows": found}
        Path(paths[-1]).write_text(json.dumps(document))
    for benchmark in (deform_conv2d, deform_roi_pool, detector, profile_cuda):
        text = check(benchmark, *paths, capsys=capsys)
        assert "deform_conv2d.json: Some CPU, commit abc, 2026-01-02" in text
        assert f"yes          {EACH}: at most 1.15, measured 1.100 (c3)" in text
        assert "forward over roi_align, NHWC, sampling 2, 1 thread, each: at least 12, measured 12.000 (p2)" in text
        assert "0 yes, 0 no, 4 not measured" in text.splitlines()[-1]


def test_every_goal_is_about_contestants_that_exist() -> None:
    assert len({goal.what for goal in goals_cpu.GOALS}) == len(goals_cpu.GOALS)
    layouts = [" NCHW", " NHWC", ""]
    known = {
        "deform_conv2d": [f"{name}{x}" for name in ("conv", "dcn_d2") for x in layouts]
        + ["torchvision", "onnxruntime", "openvino"],
        "deform_roi_pool": [f"{name}{x}" for name in ("roi_align", "modulated") for x in layouts],
        "detector": [f"{name}{x}" for name in ("plain", "dcn_d2") for x in layouts],
    }
    known["deform_conv2d_memory"] = known["deform_conv2d"]
    known["predict"] = ["one by one", "many"]
    for goal in goals_cpu.GOALS:
        assert set(goal.quotient) <= set(known[goal.benchmark]), goal
        assert (goal.at_most < float("inf")) != (goal.at_least > 0), goal


def test_goals_on_a_gpu_are_judged_by_all_its_files_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    text = check(deform_conv2d, *paths, capsys=capsys)
    price = "bfloat16 forward price, channels_last, hot: at most 1.4, measured 1.342 (c3 batch 2 1.2, c3 batch 16 1.5)"
    assert f"yes          CUDA, {price}" in text
    assert "no           CUDA, bfloat16 forward price, channels_last, rotated: at most 1.4, measured 99" in text
    assert "no           CUDA, float32 forward price, channels_last, hot: at most 1, measured 1.300" in text
    assert "yes          CUDA, bfloat16 forward over autocast torchvision, hot: at least 10, measured 13.4" in text
    assert "not measured CUDA, tf32 forward price" in text
    assert "deform_roi_pool" not in text


def test_every_goal_on_a_gpu_is_about_contestants_that_exist() -> None:
    goals = goals_cuda.GOALS
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


def test_check_says_that_a_file_is_not_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"device": "Some device", "commit": "abc", "date": "2026-01-02"}
    for device in ("cpu", "cuda"):
        document = {"benchmark": "detector", "device": device, "environment": environment, "rows": []}
        path = tmp_path / f"{device}.json"
        path.write_text(json.dumps(document | {"complete": False}))
        text = check(detector, str(path), capsys=capsys)
        assert f"{device}.json: Some device, commit abc, 2026-01-02, not complete\n" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("milliseconds: 3", "is not a result file: it holds no JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[1, 2]", "is not a result file: it has no benchmark, device, environment, rows"),
        (
            '{"benchmark": "layer", "device": 3, "environment": "", "rows": []}',
            "is not a result file: it has no usable device, environment",
        ),
        (
            '{"benchmark": "layer", "device": "cpu", "environment": {}, "rows": [1]}',
            "is not a result file: it has no usable rows",
        ),
        (
            '{"benchmark": "detector", "device": "cpu", "rows": [{"threads": 1}], '
            '"environment": {"device": "a CPU", "commit": "abc", "date": "2026-01-02"}}',
            "cannot be judged: a part of it has no 'milliseconds', as a benchmark's rows have",
        ),
        ('{"device": "cpu", "rows": []}', "is not a result file: it has no benchmark, environment"),
    ],
    ids=["missing", "no JSON", "a list", "wrong types", "rows that are numbers", "rows without times", "another file"],
)
def test_check_of_another_file_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        detector.main(["--check", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f": --check: {path} {message}")


def test_a_name_without_a_memory_format_means_the_better_one_of_the_same_implementation() -> None:
    milliseconds = {"conv NCHW": {"median": 3.0}, "conv NHWC": {"median": 2.0}, "convolution": {"median": 1.0}}
    assert rows.fastest({"milliseconds": milliseconds}, "conv") == 2.0
    assert rows.lowest(milliseconds, "conv NCHW") == 3.0 and rows.lowest(milliseconds, "autocast") is None
    assert rows.lowest({"dcn_d2 NCHW": 0.0, "dcn_d2 NHWC": 4.0}, "dcn_d2") == 0.0  # mebibytes


def test_goals_are_judged_without_torch() -> None:
    """The report of a run on a GPU reads them, also where nothing is installed."""
    code = "import sys; from benchmarks import goals; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(rows.__file__).parents[1], check=True)

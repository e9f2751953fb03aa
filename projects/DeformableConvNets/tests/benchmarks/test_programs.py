# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Every benchmark runs from end to end on a tiny shape."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.optim import SGD

from benchmarks import deform_conv2d, deform_roi_pool, detector, training_precision
from dev import readme

from ..slim import SLIM, slim_config
from .helpers import run


def test_deform_conv2d_times_every_variation(tmp_path: Path) -> None:
    rows = run(deform_conv2d, tmp_path, stages=[deform_conv2d.Shape("tiny", 32, 4, 5)])
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
    code = f"from benchmarks import deform_conv2d as b; b.main({arguments}, stages=[b.Shape('tiny', 32, 64, 64)])"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    forward = next(row for row in rows if row["pass"] == "forward")["peak_extra_mib"]
    columns = 9 * 32 * 64 * 64 * 4 / 2**20
    # torchvision holds the column matrix of the layer, we never do; and outputs do not count.
    assert forward["torchvision"] > 0.9 * columns > forward["dcn_d2 NHWC"] + 1
    assert forward["torchvision"] < 1.5 * columns
    assert readme.performance(tmp_path).count("| tiny: 32 x 64 x 64 | forward") == 2


def test_deform_roi_pool_times_every_mode(tmp_path: Path) -> None:
    level = deform_roi_pool.Shape("tiny", 16, 20, 4, 24, rois=6, channels=8, bins=3)
    rows = run(deform_roi_pool, tmp_path, levels=[level])
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


def test_drawn_rois_lie_in_the_image_and_fit_the_level() -> None:
    rois = deform_roi_pool.draw_rois(deform_roi_pool.LEVELS[1], torch.Generator().manual_seed(0))
    assert rois.shape == (512, 5) and bool((rois[:, 0] == 0).all())
    assert bool((rois[:, 1:] >= 0).all()) and bool((rois[:, 3:] <= torch.tensor([1216, 800])).all())
    sides = rois[:, 3:] - rois[:, 1:3]
    assert 80 < float(sides.median()) < 130 and float(sides.max()) <= 224


def test_detector_runs_all_parts_and_really_swaps_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def theirs(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return original(*arguments)

    original = detector.torchvision.ops.deform_conv2d
    monkeypatch.setattr(detector.torchvision.ops, "deform_conv2d", theirs)
    overrides = [*SLIM, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20]
    parts = ("--parts", "trunk", "inference", "training")
    rows = run(detector, tmp_path, *parts, size=(64, 96), overrides=overrides)
    assert [row["pass"] for row in rows] == ["trunk", "inference", "training"]
    contestants = {f"{name} {layout}" for name in ("plain", "dcn_d2") for layout in ("NCHW", "NHWC")}
    assert all(set(row["milliseconds"]) == contestants | {"torchvision NCHW"} for row in rows)
    # 13 blocks, in the check of equality and in 1 + 2 runs of each part
    assert len(calls) == 13 * (1 + 3 * 3)
    plain, ours = (readme.fastest(rows[0], name) for name in ("plain", "dcn_d2"))
    cells = readme.numbers(plain, ours, ours / plain, readme.fastest(rows[0], "torchvision"))
    assert f"| trunk | 1 | {' | '.join(cells)} |" in readme.performance(tmp_path)


def test_training_precision_times_an_iteration_of_the_trainer_in_each_type(tmp_path: Path) -> None:
    shape = {"name": "tiny", "height": 64, "width": 96, "batch": 1}
    calls = training_precision.contestants(shape, slim_config())
    kinds = {}
    for name, call in calls.items():
        with mock.patch.object(SGD, "step", autospec=True, side_effect=SGD.step) as step:
            seen = []
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(output.dtype) if type(module) is Conv2d else None
            )
            call()
            handle.remove()
        assert step.call_count == 1
        kinds[name] = set(seen)
    assert kinds == {"float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    rows = run(training_precision, tmp_path, chosen=[(shape, slim_config())])
    assert all(set(row["milliseconds"]) == {"float32", "bfloat16"} for row in rows)


def test_detectors_offsets_have_the_wanted_spread() -> None:
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    models = detector.build(SLIM, "cpu", images)
    spreads = []
    for block in models["dcn_d2"].modules():
        if isinstance(block, detector.DeformBottleneckBlock):
            block.conv2_offset.register_forward_hook(lambda branch, inputs, output: spreads.append(float(output.std())))
    with torch.no_grad():
        models["dcn_d2"].backbone.bottom_up(images)
    assert len(spreads) == 13
    assert spreads == pytest.approx([detector.OFFSET_SPREAD] * 13, rel=0.1)
    assert not any("conv2_offset" in name for name in models["plain"].state_dict())


def test_no_benchmark_imports_itself_through_another(project: Path) -> None:
    names = {path.stem for path in (project / "benchmarks").glob("*.py")}
    imports: dict[str, set[str]] = {}
    for name in names:
        imports[name] = set()
        for node in ast.walk(ast.parse((project / f"benchmarks/{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
                imports[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                imports[name].add(str(node.module).split(".")[1])
    assert {"goal", "goals_cpu", "goals_cuda", "rows"} <= imports["goals"] <= names
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "name", ["deform_conv2d", "deform_roi_pool", "detector", "profile_cuda", "runtimes", "training_precision"]
)
@pytest.mark.parametrize("how", ["module", "file"])
def test_it_runs_as_a_module_and_as_a_file(project: Path, tmp_path: Path, name: str, how: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = ["-m", f"benchmarks.{name}"] if how == "module" else [str(project / f"benchmarks/{name}.py")]
    folder = project if how == "module" else tmp_path
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"python -m benchmarks.{name}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--repeats", "1"], "at least 2, got 1"), (["--device", "cuda"], "no GPU is visible")],
)
def test_options_that_cannot_work_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        deform_roi_pool.main(arguments)
    assert message in capsys.readouterr().err

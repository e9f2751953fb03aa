# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""train_net.py --check-data, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcn_d2.command_line.train import parse_arguments

EXAMPLE = "examples/nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"


def run(project: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("DETECTRON2_DATASETS", None)
    command = [sys.executable, str(project / "train_net.py"), "--check-data", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_good_data_end_with_0_and_leave_a_report(project: Path, tmp_path: Path) -> None:
    done = run(project, tmp_path, "--config-file", str(project / EXAMPLE), "OUTPUT_DIR", "out")
    assert done.returncode == 0, done.stderr
    assert "nothing found" in done.stdout and "objects of categories: nucleus 251" in done.stdout
    names = {"report.txt", "report.json", "samples-nuclei_train.png", "samples-nuclei_val.png"}
    assert {path.name for path in (tmp_path / "out" / "data-check").iterdir()} == names
    assert os.listdir(tmp_path / "out") == ["data-check"]


def test_errors_end_with_1(project: Path, tmp_path: Path) -> None:
    opts = ("OUTPUT_DIR", "out", "DATASETS.TRAIN", "('coco_2017_train',)", "MODEL.ROI_HEADS.NUM_CLASSES", "1")
    done = run(project, tmp_path, "--quick", "--config-file", str(project / EXAMPLE), *opts)
    assert done.returncode == 1
    assert "coco_2017_train: not-there" in done.stdout and "DETECTRON2_DATASETS" in done.stdout
    assert "nuclei_val" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--quick", "--config-file", "x"], "--quick goes with --check-data"),
        (["--check-workers", "2", "--config-file", "x"], "--check-workers goes with --check-data"),
        (["--check-processes", "--config-file", "x"], "--check-processes goes with --check-data"),
        (["--check-data", "--check-workers", "0", "--config-file", "x"], "--check-workers must be at least 1"),
        (["--check-data", "--resume", "--config-file", "x"], "leave out --resume"),
        (["--check-data", "--eval-only", "--config-file", "x"], "leave out --eval-only"),
        (["--check-data", "--overwrite", "--config-file", "x"], "leave out --overwrite"),
        (["--check-data", "--published", "--config-file", "x"], "leave out --published"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert told in " ".join(capsys.readouterr().err.split())

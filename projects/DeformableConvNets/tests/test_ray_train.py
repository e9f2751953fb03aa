# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""examples/ray_train.py with two workers on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .engine.tiny import tiny_config

pytest.importorskip("ray.train.torch", reason='needs Ray Train: pip install "ray[train]"')
PROJECT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_two_workers_of_ray_train_together(tmp_path: Path) -> None:
    keys = ["SOLVER.IMS_PER_BATCH", 2, "DATASETS.TEST", ("nuclei_val",), "INPUT.MIN_SIZE_TEST", 64]
    (tmp_path / "tiny.yaml").write_text(tiny_config(tmp_path / "out", *keys).dump())
    command = [sys.executable, str(PROJECT / "examples" / "ray_train.py"), "--workers", "2"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "HOME": str(tmp_path)}
    environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "--config-file", "tiny.yaml"],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert torch.load(tmp_path / "out" / "model_final.pth")["iteration"] == 3
    assert (tmp_path / "out" / "log.txt.rank1").exists(), "two processes of one job, and not two jobs"
    assert "bbox/AP" in json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])

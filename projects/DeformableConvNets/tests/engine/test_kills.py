# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the campaign finds processes in /proc")
def test_killed_training_goes_on_without_loss(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(PROJECT / "dev" / "campaign" / "kills.py"), "--kills", "5"]
    command += ["--seed", "1", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "summary.json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failures"] == [] and summary["counts"]["kills"] == 5
    assert summary["counts"]["iterations"] > 0 and summary["counts"]["long runs"] > 0

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""train_net.py --slurm: with submitit's local executor as users would, and what sbatch gets."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import train_net
from dcn_d2.command_line.cluster import KEYS, without_slurm
from dcn_d2.engine import slurm

from .test_torchrun import PROJECT, logged, starts
from .tiny import tiny_config

submitit: Any = pytest.importorskip("submitit", reason="--slurm needs submitit: pip install submitit")


def command(folder: Path, *slurm_keys: str, keys: tuple = ()) -> list[str]:
    """The arguments of a job in `folder`."""
    (folder / "tiny.yaml").write_text(tiny_config(folder / "out", "SOLVER.IMS_PER_BATCH", 2).dump())
    return ["--slurm", *slurm_keys, "--config-file", "tiny.yaml", *map(str, keys)]


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(") ")[2].split()[1]) == parent:
                found.append(int(path.name))
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the test finds processes in /proc")
def test_job_is_requeued_and_finishes(tmp_path: Path) -> None:
    keys = ("SOLVER.MAX_ITER", 60, "SOLVER.CHECKPOINT_PERIOD", 10)
    arguments = command(tmp_path, "local=1", "gpus=2", "hours=1", keys=keys)
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    script = str(PROJECT / "train_net.py")
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    job = int(re.search(r"^job (\d+): 1 machine\(s\) with 2 process\(es\) each$", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
    try:
        out, deadline = tmp_path / "out", time.monotonic() + 400
        while not (out / "model_0000009.pth").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in children(job):  # as Slurm does before the time limit, and before it preempts a job
            os.kill(process, signal.SIGUSR2)
        results = [out / "slurm" / f"{job}_{task}_result.pkl" for task in (0, 1)]
        while not all(path.exists() for path in results) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in [*children(job), job]:
            os.kill(process, signal.SIGKILL)
    log = (out / "slurm" / f"{job}_0_log.out").read_text()
    stopped = int(re.search(r"stopped at iteration (\d+)", log)[1])  # type: ignore[index]
    assert starts(tmp_path) == [0, stopped + 1], "no iteration is lost"
    assert torch.load(out / "model_final.pth")["iteration"] == 59 and "Requeued job" in log
    found = logged(tmp_path)
    assert found == sorted(set(found)) and {19, 39, 59} <= set(found)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, in which sbatch keeps the script and says that it is job 4711."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/sbatch.sh\necho Submitted batch job 4711\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return programs


def test_sbatch_gets_what_was_asked_for(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = "partition=gpu nodes=2 gpus=1 hours=1.5 cpus=4 mem=32 account=lab name=nuclei qos=long constraint=h100"
    train_net.run(command(tmp_path, *words.split(), "grace=60"))
    said = capsys.readouterr().out
    assert "job 4711: 2 machine(s) with 1 process(es) each" in said and "cancel: scancel 4711" in said
    assert f"follow: tail -F {tmp_path}/out/slurm/4711_0_log.out" in said
    script = (tmp_path / "sbatch.sh").read_text()
    for flag in (
        *("--partition=gpu", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=90", "--cpus-per-task=4"),
        *("--mem=32768M", "--account=lab", "--job-name=nuclei", "--qos=long", "--constraint=h100", "--requeue"),
        "--signal=USR2@60",
    ):
        assert f"#SBATCH {flag}\n" in script
    assert f"\ncd {tmp_path}\nexport PYTHONPATH={PROJECT}" in script
    assert f" {sys.executable} -u -m submitit.core._submit {tmp_path}/out/slurm\n" in script
    job = submitit.SlurmJob(tmp_path / "out" / "slurm", "4711").submission().function
    assert job.argv == ["--config-file", "tiny.yaml"] and job.script == str(PROJECT / "train_net.py")
    assert job.checkpoint().function == job


def test_refusal_of_sbatch_is_told(cluster: Path, tmp_path: Path) -> None:
    (cluster / "sbatch").write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2\nexit 1\n")
    with pytest.raises(SystemExit, match="train_net.py: --slurm: sbatch refused the job: sbatch: error: invalid part"):
        train_net.run(command(tmp_path, "hours=1"))


def test_what_cannot_work_is_refused_before_it_waits_in_the_queue(cluster: Path, tmp_path: Path) -> None:
    for keys, message in (
        (("DATASETS.TRAIN", "('nothing',)"), "there is no data set 'nothing'"),
        (("SOLVER.IMS_PER_BATCH", 12), "SOLVER.IMS_PER_BATCH is 12, but must be a multiple of .* 16"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_net.run(command(tmp_path, "hours=1", "nodes=2", "gpus=8", keys=keys))
    assert not (tmp_path / "sbatch.sh").exists()


def test_without_slurm_or_submitit_there_is_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="there is no sbatch on this machine.*--slurm local=1"):
        train_net.run(command(tmp_path, "hours=1"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit, match="--slurm needs submitit: pip install submitit"):
        train_net.run(command(tmp_path, "hours=1"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["partiton=gpu", "hours=1"], "no key partiton: did you mean partition"),
        (["zzz=1"], "no key zzz: it has partition, nodes"),
        (["gpus=8", "nodes=2"], "needs hours=H"),
        (["hours=soon"], "hours=soon: hours must be a number of at least 0.01"),
        (["hours=nan"], "hours must be a number"),
        (["hours=1", "nodes=0"], "nodes must be a whole number of at least 1"),
        (["hours=1", "hours=2"], "has hours twice"),
        (["hours=1", "partition="], "partition must be a text"),
        (["hours=1", "OUTPUT_DIR", "out"], "takes KEY=VALUE, got OUTPUT_DIR; write it before other options"),
        (["hours=1", "local=1", "nodes=2"], "local=1 is a job on this machine alone"),
        (["hours=1", "--num-gpus", "1"], "--slurm starts the processes: leave out --num-gpus"),
    ],
)
def test_mistakes_in_keys_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train_net.parse_arguments(["--config-file", "a.yaml", "--slurm", *words])
    assert message in capsys.readouterr().err


def test_keys_have_defaults_and_leave_the_other_arguments() -> None:
    argv = ["--resume", "--slurm", "hours=2", "gpus=4", "--config-file", "a=b.yaml", "OUTPUT_DIR", "c=d"]
    keys = train_net.parse_arguments(argv).slurm
    assert keys.keys() == KEYS.keys() and (keys["hours"], keys["gpus"], keys["nodes"], keys["mem"]) == (2.0, 4, 1, None)
    assert without_slurm(argv) == ["--resume", *argv[4:]]
    assert train_net.parse_arguments(["--config-file", "a.yaml"]).slurm is None

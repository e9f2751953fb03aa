# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""train_net.py under torchrun, as users start it."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine.launch import _find_free_port
from torch import distributed as dist

from dcn_d2.engine.places import Place
from dcn_d2.engine.restart import FileMark, StoreMark, find_mark, go_on_after_restart
from dcn_d2.engine.torchrun import run_in_group

from .tiny import tiny_config

PROJECT = Path(__file__).resolve().parents[2]
KEYS = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 5, "INPUT.MIN_SIZE_TEST", 64]


def start(folder: Path, *arguments: object, restarts: int = 0, processes: int = 2) -> subprocess.Popen:
    """Starts train_net.py in two processes; config.yaml and output are in `folder`."""
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    (folder / "tiny.yaml").write_text(tiny_config(folder / "out", *KEYS).dump())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", restarts]
    command += ["--nproc-per-node", processes, PROJECT / "train_net.py", *arguments]
    at = command.index(PROJECT / "train_net.py") + 1
    if processes == 1:
        command = [sys.executable, *command[at - 1 :]]
        at = 2
    flags = [word for word in command[at:] if str(word).startswith("--")]
    keys = [word for word in command[at:] if word not in flags]
    command = [*command[:at], *flags, "--config-file", "tiny.yaml", *keys]
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [str(word) for word in command], cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen, folder: Path, code: int = 0) -> str:
    try:
        process.wait(timeout=400)
    finally:
        process.kill()
    text = (folder / "output.txt").read_text()
    assert process.returncode == code, text[-4000:]
    return text


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process of torchrun that has a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(") ")[2].split()[1])
            if parent == process.pid and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"there is no process of rank {rank}")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def logged(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "out" / "metrics.json").read_text().splitlines()]


def starts(folder: Path) -> list[int]:
    found = re.findall(r"Starting training from iteration (\d+)", (folder / "out" / "log.txt").read_text())
    return [int(number) for number in found]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the test finds processes in /proc")
def test_job_goes_on_after_one_of_its_processes_was_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "SOLVER.MAX_ITER", 60, restarts=1)
    wait_for(tmp_path / "out" / "model_0000009.pth", process)
    os.kill(worker(process, 1), signal.SIGKILL)
    finish(process, tmp_path)
    first, second = starts(tmp_path)
    checkpoints = sorted(int(path.stem[6:]) for path in (tmp_path / "out").glob("model_0*.pth"))
    assert first == 0 and second - 1 in checkpoints and second >= 10, "it goes on from the last checkpoint"
    found = logged(tmp_path)
    assert found == sorted(set(found)) and {19, 39, 59} <= set(found)
    assert torch.load(tmp_path / "out" / "model_final.pth")["iteration"] == 59

    evaluated = {}
    for processes in (2, 1):  # with the same results
        arguments = ["--eval-only", "MODEL.WEIGHTS", "out/model_final.pth", "OUTPUT_DIR", f"eval{processes}"]
        more = start(tmp_path, *arguments, "DATASETS.TEST", "('nuclei_val',)", processes=processes)
        finish(more, tmp_path)
        where = tmp_path / f"eval{processes}" / "inference" / "nuclei_val" / "coco_instances_results.json"
        evaluated[processes] = sorted(json.loads(where.read_text()), key=lambda entry: json.dumps(entry))
    assert evaluated[1] == evaluated[2] and evaluated[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the test finds processes in /proc")
def test_sigterm_to_torchrun_leaves_one_checkpoint_and_resume_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "SOLVER.MAX_ITER", 400, "SOLVER.CHECKPOINT_PERIOD", 200, restarts=3)
    wait_for(tmp_path / "out" / "log.txt", process)
    while not starts(tmp_path) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    process.terminate()
    finish(process, tmp_path, code=1)  # torchrun's own
    (checkpoint,) = (tmp_path / "out").glob("model_*.pth")
    done = torch.load(checkpoint)["iteration"]
    assert f"stopped at iteration {done}, go on with --resume" in (tmp_path / "out" / "log.txt").read_text()
    finish(start(tmp_path, "--resume", "SOLVER.MAX_ITER", done + 3), tmp_path)
    assert starts(tmp_path) == [0, done + 1]


def join(rank: int, port: int, refused: bool, report: Any) -> None:
    """One of two processes, which read a job, or refuse it."""
    place = Place("torchrun", rank, 2, rank, 2, "127.0.0.1", port)

    def read() -> str:
        if refused:
            raise SystemExit("train_net.py: no such file")
        return f"read by {rank}"

    def fail(value: str) -> None:
        raise SystemExit(f"train_net.py: {value}, failed")

    try:
        run_in_group(place, read, fail)
    except SystemExit as error:
        report.put((rank, error.code))
    report.close()
    report.join_thread()
    os._exit(0)


@pytest.mark.parametrize("refused, message", [(True, "no such file"), (False, "read by 0, failed")])
def test_one_process_tells_why_the_job_ends(
    refused: bool, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dcn_d2.engine.torchrun.PATIENCE", 0.1)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    context = multiprocessing.get_context("fork")
    reports, port = context.Queue(), _find_free_port()
    processes = [context.Process(target=join, args=(rank, port, refused, reports)) for rank in (0, 1)]
    for process in processes:
        process.start()
    codes = dict(reports.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert sorted(map(str, codes.values())) == ["1", f"train_net.py: {message}"]
    assert refused is False or codes[1] == 1
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == f"train_net.py: {message}"


def test_mark_in_torchruns_store_outlives_its_processes() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    mark = find_mark(environ)
    assert isinstance(mark, StoreMark) and not mark.is_set()
    mark.set()
    assert find_mark(environ).is_set()  # type: ignore[union-attr]
    assert find_mark({}) is None and find_mark({"TORCHELASTIC_USE_AGENT_STORE": "False"}) is None


@pytest.mark.parametrize(
    "begun, arguments, expected",
    [
        (False, {"overwrite": True}, (False, True)),  # killed before it could remove the earlier run
        (False, {}, (False, False)),  # an earlier run of another job keeps its protection
        (True, {"overwrite": True}, (True, False)),
        (True, {}, (True, False)),
        (True, {"eval_only": True}, (False, False)),
    ],
)
def test_restart_goes_on_with_its_own_run_only(
    begun: bool, arguments: dict[str, Any], expected: tuple[bool, bool], tmp_path: Path
) -> None:
    mark = FileMark(str(tmp_path / "begun"))
    if begun:
        mark.set()
    args = Namespace(**{"resume": False, "overwrite": False, "eval_only": False} | arguments)
    go_on_after_restart(args, mark)
    assert (args.resume, args.overwrite) == expected
    go_on_after_restart(args, None)
    assert (args.resume, args.overwrite) == expected

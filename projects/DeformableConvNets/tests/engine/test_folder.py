# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dcn_d2.engine import folder

from ..slim import slim_config

PROJECT = Path(__file__).resolve().parents[2]
# Locks a folder, starts a process that lives on when this one is killed, and waits.
HOLD = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from dcn_d2.engine import folder
folder.lock_folder(sys.argv[2])
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that has locked tmp_path, and the process that it forked."""
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(PROJECT), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    os.kill(child, 9)


def test_two_runs_at_once_in_a_folder_are_refused(holder: Any, tmp_path: Path) -> None:
    process, _ = holder
    for check in (folder.lock_folder, folder.check_unlocked):
        with pytest.raises(
            BlockingIOError, match=f"another run trains there now .process {process.pid} on .*another OUT"
        ):
            check(str(tmp_path))


def test_lock_of_a_killed_run_does_not_block(holder: Any, tmp_path: Path) -> None:
    process, child = holder
    process.kill()
    process.wait()
    os.kill(child, 0)  # one of its workers is still there
    folder.lock_folder(str(tmp_path))
    folder.unlock_folder(str(tmp_path))


def test_one_process_may_train_again(tmp_path: Path) -> None:
    where = str(tmp_path)
    folder.lock_folder(where)
    folder.lock_folder(where)
    folder.unlock_folder(where)
    folder.check_unlocked(where)  # its own, and still held
    assert os.path.realpath(where) in folder._held
    folder.unlock_folder(where)
    assert os.path.realpath(where) not in folder._held
    folder.unlock_folder(where)


def test_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "lockf", fail)
    folder.lock_folder(str(tmp_path))
    assert "cannot be locked" in caplog.text


def test_addresses_are_left_to_detectron2() -> None:
    for function in (folder.lock_folder, folder.check_unlocked, folder.check_free, folder.check_writable):
        function("s3://bucket/run")


@pytest.mark.parametrize(
    "files, found",
    [
        ({}, ""),
        ({"config.yaml": "", "metrics.json": "", "best.pth": "x"}, ""),
        ({"metrics.json": "{}"}, "metrics.json"),
        ({"model_0000009.pth": "x", "model_final.pth": "x"}, "2 checkpoint(s), the last one model_final.pth"),
    ],
)
def test_what_an_earlier_run_left(files: dict[str, str], found: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert folder.describe_earlier_run(str(tmp_path)) == found
    if found:
        with pytest.raises(FileExistsError, match="--resume"):
            folder.check_free(str(tmp_path))
    else:
        folder.check_free(str(tmp_path))


def line(iteration: int, **others: float) -> str:
    return json.dumps({"iteration": iteration, **others})


@pytest.mark.parametrize(
    "text, iteration, kept",
    [
        ("", 5, []),
        ("\n".join([line(19), line(39), ""]), 40, [19, 39]),
        ("\n".join([line(19), line(39), line(59), ""]), 40, [19, 39]),
        ("\n".join([line(19), line(39), ""]), 0, []),
        ("\n".join([line(19), '{"iteration": 3']), 40, [19]),  # cut off by a kill
        ("\n".join([line(19), line(39), line(29), line(39), ""]), 30, [19, 29]),  # of a version that did not cut
        ("\n".join([line(19), line(40), line(39), ""]), 40, [19, 39]),  # an error, and not a signal, ended iteration 40
    ],
)
def test_metrics_are_cut_where_training_goes_on(text: str, iteration: int, kept: list[int], tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with path.open("a") as file:  # as Detectron2's writer, which is there before
        folder.cut_metrics(str(tmp_path), iteration)
        file.write(line(iteration) + "\n")
    found = [json.loads(entry)["iteration"] for entry in path.read_text().splitlines()]
    assert found == [*kept, iteration]


def test_last_evaluation_stays_when_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("\n".join([line(1, total_loss=2.0), line(3, total_loss=1.0), line(4, AP=9.0), ""]))
    folder.cut_metrics(str(tmp_path), 4)
    entries = [json.loads(entry) for entry in path.read_text().splitlines()]
    assert entries == [{"iteration": 1, "total_loss": 2.0}, {"iteration": 3, "total_loss": 1.0, "AP": 9.0}]


def test_evaluations_stay_in_their_order_when_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("\n".join([line(19, total_loss=2.0), line(9, AP=8.0), line(20, AP=9.0), ""]))
    folder.cut_metrics(str(tmp_path), 20)
    found = [json.loads(entry) for entry in path.read_text().splitlines()]
    assert [(entry["iteration"], entry["AP"]) for entry in found] == [(9, 8.0), (19, 9.0)]


def test_lock_is_quick(tmp_path: Path) -> None:
    began = time.perf_counter()
    folder.lock_folder(str(tmp_path))
    folder.unlock_folder(str(tmp_path))
    assert time.perf_counter() - began < 1


def test_line_that_a_kill_has_cut_does_not_take_the_later_ones_with_it(tmp_path: Path) -> None:
    lines = ['{"iteration": 0}', '{"iterat', '{"iteration": 2}', '{"iteration": 3}', '{"iteration": 4}', '{"iter']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    folder.cut_metrics(str(tmp_path), 4)
    assert (tmp_path / "metrics.json").read_text().splitlines() == [lines[0], *lines[2:4]]


@pytest.mark.parametrize("text", ["_BASE_: a.yaml\n", "# mine\nMODEL: {}\nSOLVER: {}\nVERSION: 2\n", "a\tb: [", "7"])
def test_config_written_by_hand_is_not_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FileExistsError, match="config.yaml that was not written by a run.*another OUTPUT_DIR"):
        folder.check_free(str(tmp_path))


def test_config_of_a_run_that_ended_early_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(slim_config().dump())
    folder.check_free(str(tmp_path))


@pytest.mark.parametrize(
    "weights", ["{}/model_final.pth", "mmdet://{}/../{name}/model_0000003.pth", "{}/model_final.pth?x"]
)
def test_overwriting_removed_the_weights_to_start_from(weights: str, tmp_path: Path) -> None:
    weights = weights.format(tmp_path, name=tmp_path.name)
    with pytest.raises(FileExistsError, match="would remove .*MODEL.WEIGHTS names this file"):
        folder.check_keeps(str(tmp_path), weights)
    for other in ("", f"{tmp_path}/r50.pth", f"{tmp_path}/sub/model_final.pth", "http://a/model_final.pth"):
        folder.check_keeps(str(tmp_path), other)

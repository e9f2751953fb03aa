# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from detectron2.utils import comm

from dcn_d2.engine import processes
from dcn_d2.engine.processes import ProcessFailedError, launch, repeat_until_called


def note(folder: str) -> None:
    comm.synchronize()
    Path(folder, f"{comm.get_rank()}").write_text(str(comm.get_world_size()))


def leave(code: object) -> None:
    if comm.get_rank() == 1:
        sys.exit(code)  # type: ignore[arg-type]
    time.sleep(60)


def raise_error() -> None:
    if comm.get_rank() == 1:
        raise ZeroDivisionError("by 0")
    time.sleep(60)


def kill_itself() -> None:
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait(folder: str) -> None:
    note(folder)
    try:
        time.sleep(60)
    except SystemExit:
        Path(folder, f"told{comm.get_rank()}").touch()
        raise


def wait_for_signal(folder: str) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    wait(folder)


# "fork" is quick, and all that these functions need.
FORK = {"start_method": "fork"}


def test_processes_form_a_job(tmp_path: Path) -> None:
    launch(note, 2, dist_url="auto", args=(str(tmp_path),))  # as it is used, with new processes
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2", "1": "2"}


def test_exit_of_one_process_is_the_jobs(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="train_net.py: no such file"):
        launch(leave, 2, args=("train_net.py: no such file",), **FORK)  # type: ignore[arg-type]
    assert "no such file" not in capfd.readouterr().err, "whoever meets the SystemExit prints it, once"


def test_error_of_one_process_ends_the_others_and_is_told() -> None:
    began = time.monotonic()
    with pytest.raises(ProcessFailedError, match="process 1 of 2 failed: Traceback.*\n(.*\n)*ZeroDivisionError: by 0"):
        launch(raise_error, 2, **FORK)  # type: ignore[arg-type]
    assert time.monotonic() - began < 20


def test_killed_process_is_told() -> None:
    with pytest.raises(ProcessFailedError, match="process 1 of 2 failed: it was ended by SIGKILL .was the memory full"):
        launch(kill_itself, 2, **FORK)  # type: ignore[arg-type]


def test_signal_reaches_the_processes(tmp_path: Path) -> None:
    def kill() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=kill).start()
    with pytest.raises(SystemExit) as left:
        launch(wait_for_signal, 2, args=(str(tmp_path),))
    assert left.value.code == 143
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "told0", "told1"}
    assert signal.getsignal(signal.SIGTERM) is handler


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent has ended")
def test_killed_launcher_leaves_no_orphans(tmp_path: Path) -> None:
    launcher = os.fork()
    if not launcher:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell script
        try:
            launch(write_pid_and_wait, 2, args=(str(tmp_path),), start_method="fork")
        finally:
            os._exit(1)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    time.sleep(0.2)
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert all(is_alive(pid) for pid in pids)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)


def write_pid_and_wait(folder: str) -> None:
    Path(folder, str(comm.get_rank())).write_text(str(os.getpid()))
    time.sleep(60)


def test_waiting_for_another_machine_is_told(capfd: pytest.CaptureFixture) -> None:
    done = repeat_until_called("process 1 of 2 waits", every=0.05)
    time.sleep(0.3)
    done()
    said = capfd.readouterr().err
    assert 2 <= said.count("process 1 of 2 waits (0 s)\n") <= 6
    time.sleep(0.2)
    assert not capfd.readouterr().err


def test_process_without_its_partner_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    real = processes.repeat_until_called
    monkeypatch.setattr(processes, "repeat_until_called", lambda text: real(text, every=0.1))
    with pytest.raises(ProcessFailedError):
        launch(
            note,
            1,
            num_machines=2,
            machine_rank=1,
            dist_url=f"tcp://127.0.0.1:{processes._find_free_port()}",
            timeout=processes.timedelta(seconds=2),
            **FORK,  # type: ignore[arg-type]
        )
    assert "process 1 of 2 waits for the others at tcp://127.0.0.1:" in (said := capfd.readouterr().err)
    assert "--machine-rank 0 running" in said

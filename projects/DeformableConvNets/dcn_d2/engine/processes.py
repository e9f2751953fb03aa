# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Starts the processes of a training job as Detectron2's `launch` does, and ends them with it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from detectron2.engine.launch import DEFAULT_TIMEOUT, _distributed_worker, _find_free_port

from .stopping import SIGNALS, SignalCounter

# Seconds after a process has failed: then the others are told to end, and later they are killed.
OWN_END = 2.0
GRACE = 30.0
STOPPED = [128 + number for number in SIGNALS]


class ProcessFailedError(RuntimeError):
    """A process of the job raised an error, which the message holds, or was killed."""


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
    *,
    start_method: str = "spawn",
) -> None:
    """Runs `main_func(*args)` in all processes of a job; see `detectron2.engine.launch`.

    It differs from Detectron2's in this:

    - SIGTERM, SIGINT and SIGHUP are passed on to the processes, which may then write a checkpoint. This process waits
      for them; a second signal ends them at once.
    - The processes also end when this process is killed.
    - While they wait for other machines, a line every 30 seconds says so.
    - If a process raises `SystemExit`, so does this function.

    Args:
        main_func: runs in each process.
        num_gpus_per_machine: number of processes on this machine.
        num_machines: number of machines.
        machine_rank: number of this one.
        dist_url: where the processes meet; "auto" for a single machine.
        args: arguments of `main_func`.
        timeout: of each communication between processes.
        start_method: of `multiprocessing`. "fork" is quicker; it works on CPU, from a process with a single thread.

    Raises:
        ProcessFailedError: A process failed, and the others were ended.
        SystemExit: A process raised it, or a signal ended all of them.
    """
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if dist_url in (None, "auto"):
        if num_machines > 1:
            raise ValueError("several machines need a dist_url: tcp://FIRST_MACHINE:PORT")
        dist_url = f"tcp://127.0.0.1:{_find_free_port()}"
    context: Any = multiprocessing.get_context(start_method)
    job = (main_func, world_size, num_gpus_per_machine, machine_rank, dist_url, args, timeout)
    processes, reports = [], []
    for rank in range(num_gpus_per_machine):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(rank, os.getpid(), writer, job), name=f"rank {rank} of this machine"
        )
        process.start()
        writer.close()
        processes.append(process)
        reports.append(reader)

    def forward(number: int) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    with SignalCounter(forward, lambda number: forward(signal.SIGKILL)) as received:
        failed = _wait(processes, reports, received)
    if failed and isinstance(failed[1], SystemExit) and isinstance(failed[1].code, str):
        raise failed[1]
    if received.signal:
        sys.exit(128 + received.signal if failed else 0)
    if failed:
        rank, report = failed
        code = processes[rank].exitcode or 0
        if isinstance(report, SystemExit):
            raise report
        if report is None and code < 0:
            hint = " (was the memory full?)" if code == -signal.SIGKILL else ""
            report = f"it was ended by {signal.Signals(-code).name}{hint}"
        name = f"process {machine_rank * num_gpus_per_machine + rank} of {world_size}"
        raise ProcessFailedError(f"{name} failed: {report or f'exit code {code}'}")


def _wait(processes: list, reports: list, received: SignalCounter) -> tuple[int, Any] | None:
    """Waits until all processes have ended; returns number and report of the first that failed."""
    failed: tuple[int, Any] | None = None
    said: dict[int, Any] = {}
    since = float("inf")
    told = False
    while alive := [process for process in processes if process.is_alive()]:
        # Reports are read at once: a long one would fill the pipe, and its writer could not end.
        open_reports = [reader for rank, reader in enumerate(reports) if rank not in said]
        multiprocessing.connection.wait([*(process.sentinel for process in alive), *open_reports], timeout=0.5)
        failed = _collect(processes, reports, said, failed)
        if not failed or received.signal:
            continue
        since = min(since, time.monotonic())
        # After a signal, the other processes may still write the checkpoint. After an error, they mostly fail in the
        # same way, and get some time to write their own log.
        stopped = isinstance(failed[1], SystemExit) and failed[1].code in STOPPED
        waited = time.monotonic() - since
        if waited > OWN_END and not stopped and not told:
            told = True
            for process in alive:
                process.terminate()
        if waited > GRACE:
            for process in alive:
                process.kill()
    return _collect(processes, reports, said, failed)


def _collect(processes: list, reports: list, said: dict[int, Any], failed: Any) -> tuple[int, Any] | None:
    for rank, reader in enumerate(reports):
        if rank not in said and reader.poll():
            try:
                said[rank] = reader.recv()
            except EOFError:
                said[rank] = None
            if said[rank] is not None and failed is None:
                failed = (rank, said[rank])
    for rank, process in enumerate(processes):
        if failed is None and process.exitcode:
            failed = (rank, said.get(rank))
    return failed


def _run(local_rank: int, parent: int, report: Any, job: tuple) -> None:
    """One process: joins the job, runs it, and tells the launcher how it failed."""
    end_with_parent(parent)
    for number in SIGNALS:  # a forked process has the launcher's handlers
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    main_func, world_size, on_this_machine, machine_rank, dist_url, args, timeout = job
    try:
        if local_rank == 0:
            text = f"process {machine_rank * on_this_machine} of {world_size} waits for the others at {dist_url}"
            if machine_rank:
                text += "; is train_net.py with --machine-rank 0 running, and can this machine reach it there?"
            else:
                text += "; is it running on all machines?"
            main_func = _Joined(main_func, repeat_until_called(text))
        _distributed_worker(local_rank, main_func, world_size, on_this_machine, machine_rank, dist_url, args, timeout)
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):  # printed once, by the launcher
            _tell(report, SystemExit(code))
            sys.exit(1)
        if code:
            _tell(report, SystemExit(code))
        raise
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except Exception:
        _tell(report, traceback.format_exc())
        sys.exit(1)
    finally:
        report.close()


def _tell(report: Any, what: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the launcher was killed
        report.send(what)


class _Joined:
    """Ends the lines about waiting, and then calls `main_func`."""

    def __init__(self, main_func: Callable[..., Any], stop_waiting: Callable[[], None]) -> None:
        self.main_func, self.stop_waiting = main_func, stop_waiting

    def __call__(self, *args: Any) -> Any:
        self.stop_waiting()
        return self.main_func(*args)


def end_with_parent(parent: int) -> None:
    """Makes the kernel send SIGTERM to this process when its parent ends or is killed.

    PyTorch's own processes ask for SIGINT, but background jobs of shell scripts ignore that.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended already
        os._exit(128 + signal.SIGTERM)


def repeat_until_called(text: str, every: float = 30.0) -> Callable[[], None]:
    """Prints `text` and the time since this call every `every` seconds, until the returned function is called."""
    done = threading.Event()
    began = time.monotonic()

    def repeat() -> None:
        while not done.wait(every):
            print(f"{text} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)

    threading.Thread(target=repeat, daemon=True).start()
    return done.set

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Joins the processes that another program has started: torchrun, srun, mpirun, submitit or Ray."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed as dist

from ..command_line.cluster import PATIENCE
from .places import Place, find_place
from .processes import end_with_parent, repeat_until_called


def check_agrees(given: Mapping[str, Any], place: Place) -> None:
    """Refuses arguments that contradict the program that has started the processes.

    Args:
        given: those of --num-gpus, --num-machines, --machine-rank and --dist-url that the command line has.
        place: of this process.

    Raises:
        ValueError: The message names the argument.
    """
    told = {"num_gpus": place.local_size, "num_machines": place.machines, "machine_rank": place.machine}
    for name, value in told.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"--{name.replace('_', '-')} is {given[name]}, but {place.launcher} has started {place.local_size} "
                f"process(es) on each of {place.machines} machine(s), and this is machine {place.machine}: leave it out"
            )
    if given.get("dist_url", "auto") not in ("auto", "env://", place.url):
        raise ValueError(
            f"--dist-url is {given['dist_url']}, but the processes that {place.launcher} has started meet at "
            f"{place.url} (MASTER_ADDR and MASTER_PORT): leave it out"
        )


def check_joined(environ: Mapping[str, str] = os.environ) -> None:
    """Refuses a process that is one of several and has not joined them: each would be a training of its own.

    Raises:
        ValueError: The message says how to join.
    """
    if dist.is_initialized():
        return
    place = find_place(environ)
    if place and place.world_size > 1:
        raise ValueError(
            f"{place.launcher} has started {place.world_size} processes, but this program has not joined them, and "
            "each would train by itself, all into one OUTPUT_DIR: build and use the trainer inside of "
            "`with dcn_d2.engine.joined(dcn_d2.engine.find_place()):`, or start train_net.py"
        )


@contextlib.contextmanager
def joined(place: Place | None, timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[None]:
    """A context in which this process belongs to the others, as in those that `launch` starts.

    If the program that has started them has connected them already, as Ray does, they stay connected afterwards.

    Args:
        place: what `find_place` gives; None for a single process, which joins nothing.
        timeout: of each communication between processes.
    """
    if place is None or comm._LOCAL_PROCESS_GROUP is not None:
        yield
        return
    ours = not dist.is_initialized()
    if ours:
        _join(place, timeout)
    comm.create_local_process_group(place.local_size)
    comm.synchronize()
    finished = False
    try:
        yield
        comm.synchronize()  # rank 0 may be the one through which the others talk: it ends last
        finished = True
    except SystemExit:
        finished = True
        raise
    finally:
        if ours and finished:  # after another error, a process may be missing, and would be waited for
            _leave()


def _join(place: Place, timeout: timedelta) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())  # torchrun's processes would outlive it, and hold OUTPUT_DIR's lock
    os.environ.update(place.variables())
    if torch.cuda.is_available():
        torch.cuda.set_device(_device(place, torch.cuda.device_count()))
    waits = f"process {place.rank} of {place.world_size} waits for the others at {place.url}; are all of them running?"
    stop_waiting = repeat_until_called(waits) if place.local_rank == 0 else lambda: None
    try:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = _store_of_this_start(place, timeout)
        if store is None:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    finally:
        stop_waiting()


def _store_of_this_start(place: Place, timeout: timedelta) -> dist.Store | None:
    """Gives torchrun's store, in which the processes find each other, without what an earlier start has left in it.

    With env://, PyTorch 2.14 reads the addresses of processes that have ended, if it is quicker than the new ones, and
    waits for them until the timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(place.address, place.port, place.world_size, is_master=False, timeout=timeout)
    start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {place.world_size} processes"
    return dist.PrefixStore(f"dcn_d2/{start}", store)


def _device(place: Place, gpus: int) -> int:
    """The GPU of a process, among those that it sees."""
    if place.local_size <= gpus:
        return place.local_rank
    # srun and --virtual-local-rank may show each process its own GPU alone, as number 0.
    if gpus == 1 and place.own_gpu:
        return 0
    raise ValueError(
        f"{place.launcher} has started {place.local_size} processes on this machine, but it has {gpus} GPU(s): start "
        "one process for each GPU"
    )


def _leave() -> None:
    """Undoes joining: Detectron2 keeps groups for the whole life of a process."""
    comm._get_global_gloo_group.cache_clear()
    comm.create_local_process_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()


class _Outcome(NamedTuple):
    """What the first process of a machine has read: a value, or the exit code or message with which the job ends."""

    value: Any = None
    code: Any = None


def run_in_group(place: Place, read: Callable[[], Any], main: Callable[[Any], Any]) -> Any:
    """Runs a job in this process, which is one of several.

    Args:
        place: of this process.
        read: reads and checks what the job needs; it runs once on each machine, and what it gives is handed over by
            pickle. `SystemExit` refuses the job.
        main: runs in each process, with what `read` has given on its machine.

    Raises:
        SystemExit: A process refused the job, or failed. One process alone tells why; all end with code 1.
    """
    with joined(place):
        found = _read(read) if place.local_rank == 0 else _Outcome()
        gathered: list[tuple[_Outcome, str]] = comm.all_gather((found, uuid.uuid4().hex))
        refusals = [outcome.code for outcome, _ in gathered if outcome.code is not None]
        if refusals:
            end(refusals[0], tells=place.rank == 0)
        job = gathered[0][1]
        try:
            return main(gathered[place.rank - place.local_rank][0].value)
        except SystemExit as error:
            if isinstance(error.code, str):
                end(error.code, tells=_is_first(job))
            raise


def end(code: Any, tells: bool) -> NoReturn:
    """Ends a process of the job.

    Args:
        code: exit code, or a message, with which all processes end.
        tells: whether this process ends with the message; the others are silent.
    """
    if isinstance(code, str) and not tells:
        time.sleep(PATIENCE)  # launchers end all processes when the first one has failed
        code = 1
    elif isinstance(code, str) and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):  # for torchrun's summary
        details = {"py_callstack": code, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": code, "extraInfo": details}}))
    raise SystemExit(code)


def _read(read: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=read())
    except SystemExit as error:
        return _Outcome(code=error.code or 0)


def _is_first(job: str) -> bool:
    """Whether no other process of the job has asked this yet: mostly all fail in the same way."""
    try:
        return dist.distributed_c10d._get_default_store().add(f"dcn_d2/{job}", 1) == 1
    except (RuntimeError, ValueError):  # the process that holds the store has ended
        return True

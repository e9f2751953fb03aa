# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""OUTPUT_DIR: it can be written, no other process trains there, and a run does not destroy an earlier one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from detectron2.config import CfgNode

from ..checkpoint.resuming import BEST
from ..files import is_local

logger = logging.getLogger(__name__)

LOCK = ".lock"
# What a run writes and --overwrite removes; metrics.json is emptied. Other files belong to the user.
_CHECKPOINT = re.compile(r"model_(\d{7,}|final)\.pth")
BEST_RECORD = "best_metric.json"  # the values by which model_best.pth was chosen
_RECORDS = re.compile(
    rf"last_checkpoint|{BEST}\.pth|{re.escape(BEST_RECORD)}|events\.out\.tfevents\..*|runs\.json|tracking\.json"
)
_OVERWRITE = "--overwrite (in Python: resume_or_load(resume=False, overwrite=True))"

# Locks of this process: folder -> open file, and how often it was locked. They are POSIX record locks, which belong to
# the process and not to the file. So the workers of a killed run, which live some seconds longer, do not hold them, and
# a notebook may train again in its folder.
_held: dict[str, tuple[IO[str], int]] = {}


def find_checkpoints(folder: str) -> list[str]:
    """Gives the names of the checkpoints of an earlier run in `folder`, the last one at the end."""
    path = Path(folder)
    if not is_local(folder) or not path.is_dir():
        return []
    return sorted(file.name for file in path.iterdir() if _CHECKPOINT.fullmatch(file.name))


def describe_earlier_run(folder: str) -> str:
    """Says what an earlier run left in `folder`; "" if there was none."""
    if checkpoints := find_checkpoints(folder):
        return f"{len(checkpoints)} checkpoint(s), the last one {checkpoints[-1]}"
    if is_local(folder) and Path(folder, f"{BEST}.pth").is_file():
        return f"{BEST}.pth"
    metrics = Path(folder) / "metrics.json"
    return "metrics.json" if is_local(folder) and metrics.is_file() and metrics.stat().st_size else ""


def check_start(cfg: CfgNode, resume: bool, overwrite: bool) -> None:
    """Refuses an OUTPUT_DIR in which this run would lose something of an earlier one.

    Args:
        cfg: of this run.
        resume: it goes on with the run in the folder, if there is one.
        overwrite: if it does not resume, it removes the run in the folder.

    Raises:
        FileExistsError: The message says how to go on.
    """
    folder = cfg.OUTPUT_DIR
    if not resume:
        if overwrite:
            check_keeps(folder, cfg.MODEL.WEIGHTS)
        else:
            check_free(folder)
    elif not describe_earlier_run(folder):
        check_config_is_ours(folder)
    elif not find_checkpoints(folder):
        _check_had_no_checkpoint(folder, min(cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER))


def _check_had_no_checkpoint(folder: str, first: int) -> None:
    """Refuses to resume a run whose checkpoints were taken away: it would silently begin at iteration 0.

    Args:
        folder: it holds metrics.json or model_best.pth, and no checkpoint.
        first: after so many iterations there is a checkpoint. A run that was killed before may begin again.
    """
    path = Path(folder, "metrics.json")
    done = max((number for number, _ in _read_metrics(path)[0]), default=-1) + 1 if path.is_file() else 0
    if done >= first:
        raise FileExistsError(
            f"OUTPUT_DIR {folder} holds metrics.json of a run of {done} iterations, but no checkpoint to go on from, "
            f"although there should be one after {first}. Put the checkpoints back, name another OUTPUT_DIR, or throw "
            f"the earlier run away by {_OVERWRITE}"
        )


def check_free(folder: str) -> None:
    """Refuses a folder in which a run that should not be continued has left something.

    Raises:
        FileExistsError: The message says how to go on.
    """
    if found := describe_earlier_run(folder):
        raise FileExistsError(
            f"OUTPUT_DIR {folder} holds an earlier run ({found}). Go on with it by --resume "
            "(in Python: resume_or_load(resume=True)), name another OUTPUT_DIR, or throw the earlier run away by "
            f"{_OVERWRITE}"
        )
    check_config_is_ours(folder)


def check_config_is_ours(folder: str) -> None:
    """Refuses a folder whose config.yaml was written by hand: the run would replace it.

    A config.yaml that a run has written is complete and sorted, and has no comments.

    Raises:
        FileExistsError: The message says how to go on.
    """
    path = Path(folder) / "config.yaml"
    if not is_local(folder) or not path.is_file():
        return
    text = path.read_text(errors="replace")
    try:
        if (
            not text
            or {"MODEL", "SOLVER", "VERSION"} <= (values := yaml.safe_load(text)).keys()
            and yaml.safe_dump(values) == text
        ):
            return
    except (yaml.YAMLError, AttributeError, ValueError, RecursionError):
        pass  # a run would not write this
    raise FileExistsError(
        f"OUTPUT_DIR {folder} holds a config.yaml that was not written by a run, and this run's would replace it: "
        "give it another name, or name another OUTPUT_DIR"
    )


def check_keeps(folder: str, weights: str) -> None:
    """Refuses to remove an earlier run if the new one starts from its weights.

    Args:
        folder: its checkpoints would be removed.
        weights: MODEL.WEIGHTS of the new run.
    """
    file = Path(re.sub(r"^mmdet:(//)?", "", weights).partition("?")[0])
    removed = _CHECKPOINT.fullmatch(file.name) or _RECORDS.fullmatch(file.name)
    if is_local(folder) and removed and file.parent.resolve() == Path(folder).resolve():
        raise FileExistsError(
            f"--overwrite (overwrite=True) would remove {file}, but MODEL.WEIGHTS names this file: move it out "
            f"of OUTPUT_DIR {folder} first, or name another OUTPUT_DIR"
        )


def check_writable(folder: str) -> None:
    """Makes `folder` if needed, and tries to write a file into it: the first checkpoint may come hours later."""
    if not is_local(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise OSError(error.errno, f"OUTPUT_DIR {folder} cannot be written: {error.strerror}") from error


def lock_folder(folder: str) -> None:
    """Takes `folder` for this process, until `unlock_folder` or the end of the process, however it ends.

    Raises:
        BlockingIOError: Another process trains there.
    """
    if not is_local(folder):
        return
    key = os.path.realpath(folder)
    if key in _held:
        _held[key] = (_held[key][0], _held[key][1] + 1)
        return
    check_writable(folder)
    file = open(os.path.join(folder, LOCK), "a+")  # noqa: SIM115  it stays open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(
                error.errno, f"OUTPUT_DIR {folder}: another run trains there now ({owner}); name another OUTPUT_DIR"
            ) from None
        logger.warning(
            f"OUTPUT_DIR {folder} cannot be locked ({error}): make sure yourself that no other run writes there"
        )
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[key] = (file, 1)


def unlock_folder(folder: str) -> None:
    """Undoes one `lock_folder`. The file of the lock stays: removing it would race with the next run."""
    key = os.path.realpath(folder)
    file, count = _held.pop(key, (None, 0))
    if file and count > 1:
        _held[key] = (file, count - 1)
    elif file:
        file.close()


def check_unlocked(folder: str) -> None:
    """Does what `lock_folder` does, without keeping the lock and without making the folder."""
    if is_local(folder) and os.path.realpath(folder) not in _held and os.path.exists(os.path.join(folder, LOCK)):
        lock_folder(folder)
        unlock_folder(folder)


def remove_earlier_run(folder: str) -> None:
    """Removes checkpoints and metrics of an earlier run, so that they are not taken for those of the new one."""
    if not is_local(folder):
        return
    removed = []
    for file in Path(folder).iterdir():
        if _CHECKPOINT.fullmatch(file.name) or _RECORDS.fullmatch(file.name):
            file.unlink()
            removed.append(file.name)
        elif file.name == "metrics.json" and file.stat().st_size:
            os.truncate(file, 0)  # it stays, because it is open for appending
            removed.append(file.name)
    if removed:
        logger.warning(f"OUTPUT_DIR {folder}: removed of an earlier run: {', '.join(sorted(removed))}")


def _read_metrics(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
    """Gives iteration and values of each line of metrics.json, and whether a kill has cut off a line."""
    entries, cut = [], False
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            entries.append((int(entry["iteration"]), entry))
        except (ValueError, TypeError, KeyError):
            cut = True
    return entries, cut


def cut_metrics(folder: str, iteration: int) -> None:
    """Removes from metrics.json the iterations that will be run again, so that it holds each iteration once.

    Detectron2 records the evaluation after the last iteration under the number of the next one. If training goes on
    from there, its values are added to the line of the last iteration. Detectron2 writes an evaluation after losses of
    later iterations; the lines that stay are put in their order.

    Args:
        folder: with metrics.json.
        iteration: the first one that will be run.
    """
    path = Path(folder) / "metrics.json"
    if not is_local(folder) or not path.is_file():
        return
    kept: dict[int, dict[str, Any]] = {}
    entries, changed = _read_metrics(path)
    for number, entry in entries:
        if number == iteration and "total_loss" not in entry and number - 1 in kept:
            kept[number - 1] = entry | kept[number - 1]
            changed = True
        elif number < iteration and number not in kept:  # a failed iteration comes before the last whole one
            kept[number] = entry
        else:
            changed = True
    if not changed:
        return
    # The file is changed in place: Detectron2's writer has it open for appending.
    with path.open("r+") as file:
        file.write("".join(json.dumps(kept[number], sort_keys=True) + "\n" for number in sorted(kept)))
        file.truncate()
    logger.info(f"{path} is cut at iteration {iteration}, from which training goes on")


def warn_of_little_space(
    folder: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoints: int, averaged: bool = False
) -> None:
    """Warns if the disk has no room for the checkpoints that a run is going to write.

    Args:
        folder: the checkpoints go there.
        model: a checkpoint holds its parameters and buffers.
        optimizer: a checkpoint also holds its state, one or two numbers for each parameter.
        checkpoints: how many the run will write.
        averaged: a checkpoint also holds an average of the model's weights.
    """
    if not is_local(folder):
        return
    entries = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in entries)
    size *= 2 if averaged else 1
    moments = 2 if "betas" in optimizer.defaults else 1 if optimizer.defaults.get("momentum") else 0
    size += moments * sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    free = shutil.disk_usage(folder).free
    if free < size * checkpoints:
        logger.warning(
            f"OUTPUT_DIR {folder} has {free / 1e6:,.0f} MB free; this run is going to write {checkpoints} "
            f"checkpoint(s) of about {size / 1e6:,.0f} MB (SOLVER.CHECKPOINT_PERIOD says how many)"
        )

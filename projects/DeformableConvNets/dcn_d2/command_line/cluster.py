# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of train_net.py for jobs of several processes: --slurm, and those that another launcher replaces."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

PATIENCE = 3.0  # seconds that a process without a message waits before it ends
PLACES = ("num_gpus", "num_machines", "machine_rank", "dist_url")  # what a launcher decides


class Key(NamedTuple):
    """A key of --slurm."""

    read: Callable[[str], Any]
    least: float | None
    meaning: str
    default: Any = None


KEYS = {
    "partition": Key(str, None, "partition of the cluster"),
    "nodes": Key(int, 1, "machines", 1),
    "gpus": Key(int, 0, "GPUs, and so processes, of each machine; 0: one process without a GPU", 1),
    "hours": Key(float, 0.01, "time limit of the job; when it comes near, the job writes a checkpoint and is requeued"),
    "cpus": Key(int, 1, "cores for each process"),
    "mem": Key(float, 0.1, "gigabytes of memory of each machine"),
    "account": Key(str, None, "account that pays"),
    "qos": Key(str, None, "quality of service"),
    "constraint": Key(str, None, "features that the machines must have"),
    "name": Key(str, None, "name of the job", "dcn_d2"),
    "requeue": Key(int, 0, "how often the job may be requeued at its time limit", 100),
    "grace": Key(int, 1, "seconds before the time limit at which it stops: for an iteration and a checkpoint", 120),
    "local": Key(int, 0, "1: run the job on this machine, without Slurm", 0),
}


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --slurm."""
    keys = "; ".join(f"{name}: {key.meaning}" for name, key in KEYS.items())
    parser.add_argument(
        "--slurm",
        nargs="+",
        metavar="KEY=VALUE",
        help=f"check the config here, and submit a job to Slurm, which goes on by itself until it is finished. {keys}",
    )


def check_cluster(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Reads the keys of --slurm: `args.slurm` becomes a dictionary with all of KEYS, or None."""
    if args.slurm is None:
        return
    if "--slurm" not in argv:
        parser.error("write --slurm KEY=VALUE in full, with a space after --slurm")
    if given := sorted(given_places(argv, parser)):
        parser.error(f"--slurm starts the processes: leave out --{given[0].replace('_', '-')}")
    found: dict[str, Any] = {}
    for word in args.slurm:
        name, equals, text = word.partition("=")
        if not equals:
            parser.error(
                f"--slurm takes KEY=VALUE, got {word}; write it before other options, --config-file for example"
            )
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(KEYS)}"
            parser.error(f"--slurm has no key {name}: {hint}")
        if name in found:
            parser.error(f"--slurm has {name} twice")
        found[name] = _read(parser, name, text)
    if "hours" not in found:
        parser.error("--slurm needs hours=H, the time limit of the job; it is requeued until training is finished")
    if found.get("local") and found.get("nodes", 1) > 1:
        parser.error(f"--slurm local=1 is a job on this machine alone, got nodes={found['nodes']}")
    args.slurm = {name: found.get(name, key.default) for name, key in KEYS.items()}


def _read(parser: argparse.ArgumentParser, name: str, text: str) -> Any:
    key = KEYS[name]
    kind = {int: "a whole number", float: "a number"}.get(key.read, "a text")  # type: ignore[call-overload]
    try:
        value = key.read(text)
    except ValueError:
        value = None
    if not text or value is None or (key.least is not None and not key.least <= value < 1e6):
        least = f" of at least {key.least:g}" if key.least is not None else ""
        parser.error(f"--slurm {name}={text}: {name} must be {kind}{least} ({key.meaning})")
    return value


def given_places(argv: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Gives those of --num-gpus, --num-machines, --machine-rank and --dist-url that a command line has."""
    defaults = [(action, action.default) for action in parser._actions]
    try:
        for action, _ in defaults:
            action.default = argparse.SUPPRESS
        given = vars(parser.parse_args(list(argv)))
    finally:
        for action, default in defaults:
            action.default = default
    return {name: given[name] for name in PLACES if name in given}


def without_slurm(argv: Sequence[str]) -> list[str]:
    """Gives a command line without --slurm and its keys."""
    start = list(argv).index("--slurm")
    end = start + 1
    while end < len(argv) and "=" in argv[end] and not argv[end].startswith("-"):
        end += 1
    return [*argv[:start], *argv[end:]]


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process tells what is wrong with a command line: one of those that a launcher has started here."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return next((environ[name] for name in names if name in environ), "0") in ("", "0")


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """A context in which only one process of a machine writes to the console."""
    if speaks():
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit:
        time.sleep(PATIENCE)  # launchers end all processes when the first one has failed
        raise

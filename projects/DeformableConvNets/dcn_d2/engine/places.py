# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Where a process stands among those that torchrun, srun, mpirun or another program has started."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

WAY_OUT = (
    "Start torchrun, or one process on each machine: train_net.py --num-gpus N starts the rest itself, and "
    "--num-machines, --machine-rank and --dist-url connect machines"
)


@dataclass(frozen=True)
class Place:
    """The place of a process. Processes are numbered machine by machine, equally many on each.

    Args:
        launcher: what has started the processes, for messages.
        rank: number of this process.
        world_size: number of all processes.
        local_rank: number of this process on its machine.
        local_size: number of processes on each machine.
        address: machine at which the processes meet.
        port: of this address.
        own_gpu: each process may see its own GPU alone.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    own_gpu: bool = False

    @property
    def machines(self) -> int:
        """Number of machines."""
        return self.world_size // self.local_size

    @property
    def machine(self) -> int:
        """Number of this machine."""
        return self.rank // self.local_size

    @property
    def url(self) -> str:
        """Where the processes meet."""
        return f"tcp://{self.address}:{self.port}"

    def variables(self) -> dict[str, str]:
        """The environment variables from which PyTorch reads a place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_place(environ: Mapping[str, str] = os.environ, num_machines: int = 1, connected: bool = False) -> Place | None:
    """Reads the place of this process from the environment.

    Args:
        environ: the environment's variables.
        num_machines: of the command line. If there are several, a launcher other than torchrun may have started one
            process on each machine, and this process starts the others itself.
        connected: the processes are connected already, and be it a single one.

    Returns:
        The place; None for a process that is the only one, or that starts the others.

    Raises:
        ValueError: There are several processes, and they cannot find each other. The message names the variables.
    """
    by_torchrun = "LOCAL_RANK" in environ or "TORCHELASTIC_RUN_ID" in environ
    if connected or (_count(environ, "WORLD_SIZE") > 1 and (num_machines == 1 or by_torchrun)):
        return _from_variables(environ)
    if num_machines > 1:
        return None
    if _count(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return _from_mpi(environ)
    # The script of a batch job runs once, and has SLURM_NTASKS as well; a step, which srun starts, runs often.
    in_step = "SLURM_STEP_ID" in environ or environ.get("SLURM_PROCID", "0") != "0"
    if in_step and _count(environ, _slurm_name(environ, "NUM_TASKS", "SLURM_NTASKS")) > 1:
        return _from_slurm(environ)
    return None


def _count(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    return int(value) if value.isdecimal() else 1


def _slurm_name(environ: Mapping[str, str], of_step: str, of_job: str) -> str:
    return f"SLURM_STEP_{of_step}" if f"SLURM_STEP_{of_step}" in environ else of_job


def _needs(launcher: str, environ: Mapping[str, str], *names: str) -> list[str]:
    """Gives the values of variables that must be there."""
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise ValueError(
            f"{launcher}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so that they "
            f"cannot find each other, and each would train by itself, all into one OUTPUT_DIR. {WAY_OUT}"
        )
    return [environ[name] for name in names]


def _from_variables(environ: Mapping[str, str]) -> Place:
    """Reads what torchrun sets, and submitit, Ray and SkyPilot's examples as well."""
    size = _count(environ, "WORLD_SIZE")
    name = "torchrun" if "LOCAL_RANK" in environ or "TORCHELASTIC_RUN_ID" in environ else "a launcher"
    name = "the SLURM job" if "SUBMITIT_EXECUTOR" in environ else name
    found = {key: environ[key] for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if key in environ}
    if len(found) < 2 and "SLURM_LOCALID" in environ:
        found = {"LOCAL_RANK": environ["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(_tasks_on_each_node(name, environ))}
    elif len(found) < 2 and "OMPI_COMM_WORLD_LOCAL_RANK" in environ:
        keys = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
        found = dict(
            zip(("LOCAL_RANK", "LOCAL_WORLD_SIZE"), _needs(f"mpirun has started {size} processes", environ, *keys))
        )
    text = f"{name} has started {size} processes (WORLD_SIZE)"
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    rank, local_rank, local_size, address, port = _needs(text, {**environ, **found}, *names)
    virtual = name == "torchrun" and local_rank == "0"  # --virtual-local-rank calls each process's GPU number 0
    local = int(rank) % int(local_size) if virtual else int(local_rank)
    place = Place(name, int(rank), size, local, int(local_size), address, int(port), virtual or name != "torchrun")
    return _checked(place)


def _from_mpi(environ: Mapping[str, str]) -> Place:
    size = _count(environ, "OMPI_COMM_WORLD_SIZE")
    keys = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "MASTER_ADDR")
    rank, local_rank, local_size, address = _needs(f"mpirun has started {size} processes", environ, *keys)
    port = _count({"port": environ.get("MASTER_PORT", "29500")}, "port")
    return _checked(Place("mpirun", int(rank), size, int(local_rank), int(local_size), address, port, True))


def _from_slurm(environ: Mapping[str, str]) -> Place:
    size = _count(environ, _slurm_name(environ, "NUM_TASKS", "SLURM_NTASKS"))
    name = f"srun has started {size} tasks (SLURM_NTASKS)"
    each = _tasks_on_each_node(name, environ)
    node, local, job = _needs(name, environ, "SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID")
    # Detectron2 numbers processes machine by machine; srun may deal tasks out to the nodes like cards.
    rank = int(node) * each + int(local)
    address = environ.get("MASTER_ADDR") or _first_node(environ)
    # The same for all tasks of a step, and most likely another one for each step.
    step = _count(environ, "SLURM_STEP_ID") if environ.get("SLURM_STEP_ID", "").isdecimal() else 0
    port = _count(environ, "MASTER_PORT") if "MASTER_PORT" in environ else 15000 + (16 * int(job) + step) % 15000
    if not address or "arbitrary" in environ.get("SLURM_DISTRIBUTION", ""):
        _needs(name, {}, "MASTER_ADDR")
    return _checked(Place("srun", rank, size, int(local), each, address, port, True))


def _tasks_on_each_node(started: str, environ: Mapping[str, str]) -> int:
    """Reads Slurm's "2(x3)", two tasks on each of three nodes."""
    key = _slurm_name(environ, "TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    (text,) = _needs(started, environ, key)
    if not (found := re.fullmatch(r"(\d+)(\(x\d+\))?", text)):
        raise ValueError(
            f"{started}, on the nodes {text} ({key}): each node must have equally many, --ntasks-per-node N does that"
        )
    return int(found[1])


def _first_node(environ: Mapping[str, str]) -> str:
    """Gives the first of Slurm's list of nodes: node07 for "node[07-09,12],other3"; "" if it is of another form."""
    text = environ.get(_slurm_name(environ, "NODELIST", "SLURM_JOB_NODELIST"), "")
    found = re.match(r"([\w.-]+)(?:\[(\d+)[^\]]*\]([\w.-]*))?(?:,|$)", text)
    return "".join(part for part in found.groups() if part) if found else ""


def _checked(place: Place) -> Place:
    """Refuses places that Detectron2 cannot number machine by machine."""
    if place.world_size % place.local_size or place.rank % place.local_size != place.local_rank:
        raise ValueError(
            f"{place.launcher} has started {place.world_size} processes; number {place.rank} is number "
            f"{place.local_rank} of {place.local_size} on its machine. Detectron2 needs equally many on each machine, "
            "numbered machine by machine (mpirun: --map-by slot; srun: --distribution=block)"
        )
    return place

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Jobs of Slurm, through submitit: submitted, stopped before the time limit with a checkpoint, requeued, finished."""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..files import is_local
from . import checks
from .restart import FileMark
from .stopping import REQUEUE, TrainingStopped

# Seconds that a stopped process waits for Slurm to end it: one that ends by itself may count as finished, and is then
# not requeued after a preemption.
HOLD = 600.0


@dataclass
class TrainingJob:
    """What each process of a job calls; submitit pickles it.

    Args:
        script: path of train_net.py.
        argv: its arguments.
        mark: file that is there after training has begun.
    """

    script: str
    argv: list[str]
    mark: str

    def __call__(self) -> None:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        environment = JobEnvironment()
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if environment.num_nodes == 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # the name of a machine is not always known to itself
        sys.path.insert(0, str(Path(self.script).parent))
        sys.argv = [self.script, *self.argv]
        try:
            importlib.import_module(Path(self.script).stem).run(self.argv, mark=FileMark(self.mark))
        except TrainingStopped as stopped:
            if stopped.signal == REQUEUE and environment.global_rank == 0:
                requeue: Any = signal.getsignal(REQUEUE)  # submitit's: it calls `checkpoint`, and ends this process
                requeue(REQUEUE, None)
            if environment.cluster != "local":
                time.sleep(HOLD)  # a signal to requeue still comes through
            raise

    def checkpoint(self) -> Any:
        """Gives what submitit runs after requeuing: the same, as the mark says whether there is a run to go on with."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_slurm(cfg: CfgNode, keys: Mapping[str, Any]) -> None:
    """Refuses a job that could not be submitted, or that is sure to fail when it starts.

    Args:
        cfg: of the run.
        keys: of --slurm.

    Raises:
        ValueError, ImportError: The message says what to do.
    """
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ImportError("--slurm needs submitit: pip install submitit") from None
    if not keys["local"] and (missing := [name for name in ("sbatch", "srun") if not shutil.which(name)]):
        raise ValueError(
            f"--slurm: there is no {missing[0]} on this machine. Submit on a login node of the cluster, or run the job "
            "here with --slurm local=1"
        )
    if not is_local(cfg.OUTPUT_DIR):
        raise ValueError(f"--slurm needs an OUTPUT_DIR that is a folder all machines see, got {cfg.OUTPUT_DIR!r}")
    checks.check_batch_size(cfg, processes=keys["nodes"] * max(1, keys["gpus"]))


def submit(script: str, argv: list[str], cfg: CfgNode, keys: Mapping[str, Any]) -> str:
    """Submits a job that runs train_net.py in each of its processes.

    Args:
        script: path of train_net.py.
        argv: its arguments without --slurm.
        cfg: of the run; the job's files go to OUTPUT_DIR/slurm.
        keys: of --slurm.

    Returns:
        What the user should know: the job's number, its log, how to follow and how to cancel it.
    """
    import submitit
    from submitit.helpers import clean_env

    where = Path(cfg.OUTPUT_DIR).absolute() / "slurm"
    where.mkdir(parents=True, exist_ok=True)
    script = str(Path(script).resolve())
    job = TrainingJob(script, argv, str(where / f"{uuid.uuid4().hex[:12]}.begun"))
    kind: Any = submitit.LocalExecutor if keys["local"] else submitit.SlurmExecutor
    executor = kind(where, max_num_timeout=keys["requeue"])
    path = os.pathsep.join(filter(None, [str(Path(script).parent), os.environ.get("PYTHONPATH")]))
    executor.update_parameters(**_parameters(keys, path))
    try:
        with clean_env(), submitit.helpers.environment_variables(PYTHONPATH=path), contextlib.ExitStack() as stack:
            if keys["local"]:
                stack.enter_context(_output_to(where / "local.log"))
            submitted: Any = executor.submit(job)
    except (RuntimeError, subprocess.CalledProcessError) as error:  # sbatch refuses the job, and has said why
        raise ValueError(
            f"--slurm: sbatch refused the job: {' '.join(str(error).split()) or 'without a reason'}"
        ) from None
    return _describe(submitted, where, keys)


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """A context whose new processes write to a file: a local job outlives this process, and must not hold its pipes."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with file.open("a") as opened:
        for number in (1, 2):
            os.dup2(opened.fileno(), number)
    try:
        yield
    finally:
        for number, old in zip((1, 2), kept):
            os.dup2(old, number)
            os.close(old)


def _parameters(keys: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What submitit's executors call the keys of --slurm."""
    minutes, tasks = max(1, round(60 * keys["hours"])), max(1, keys["gpus"])
    parameters: dict[str, Any] = {"signal_delay_s": keys["grace"], "stderr_to_stdout": True}
    if keys["local"]:
        return parameters | {"timeout_min": minutes, "tasks_per_node": tasks, "gpus_per_node": keys["gpus"]}
    parameters |= {name: keys[name] for name in ("nodes", "partition", "account", "qos", "constraint") if keys[name]}
    parameters |= {"time": minutes, "ntasks_per_node": tasks, "job_name": keys["name"]}
    if keys["gpus"]:
        parameters["gpus_per_node"] = keys["gpus"]
    if keys["cpus"]:
        parameters["cpus_per_task"] = keys["cpus"]
    if keys["mem"]:
        parameters["mem"] = f"{round(1024 * keys['mem'])}M"
    # sbatch passes the environment on and starts here, unless the cluster has set it up otherwise.
    parameters["setup"] = [f"cd {shlex.quote(os.getcwd())}", f"export PYTHONPATH={shlex.quote(path)}"]
    parameters["additional_parameters"] = {"requeue": True}
    return parameters


def _describe(job: Any, where: Path, keys: Mapping[str, Any]) -> str:
    cancel = f"kill {job.job_id}    (stops with a checkpoint)" if keys["local"] else f"scancel {job.job_id}"
    lines = [
        f"job {job.job_id}: {keys['nodes']} machine(s) with {max(1, keys['gpus'])} process(es) each",
        f"files:  {where}",
        f"follow: tail -F {shlex.quote(str(job.paths.stdout))}",
        f"cancel: {cancel}",
    ]
    unused = [name for name in ("partition", "account", "qos", "constraint", "cpus", "mem") if keys[name] is not None]
    if keys["local"] and unused:
        lines.append(f"local=1 does without {', '.join(unused)}")
    return "\n".join(lines)

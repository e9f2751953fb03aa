#!/usr/bin/env python3
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Kills training at random moments, resumes it, and checks that nothing is lost without need.

A tiny detector trains with train_net.py, in one process or in two, with a checkpoint every few iterations. Every other
run also accumulates gradients, averages its weights, evaluates every few iterations and keeps the best model. It gets
SIGKILL, SIGTERM or SIGINT, at a random moment from start-up on, and goes on with --resume, until it has done all its
iterations; then the next run begins. Some of the kills wait until a file is being written. Checked after each kill:

- the exit code, and that no process is left;
- every checkpoint is whole, and holds the iteration that its name says;
- the next start goes on from the newest one; after SIGTERM and SIGINT no finished iteration is missing;
- metrics.json holds each iteration once;
- a checkpoint of a run that averages its weights holds both, and model_best.pth is whole, is never replaced by a worse
  one, and is of the best evaluation in best_metric.json;
- now and then: a second run in the same folder is refused, while the first one runs and after it.

At last a disk gets full: the last whole checkpoint stays, and training goes on from it when there is room.

This process imports PyTorch and Detectron2 once, and forks for each start. The same --seed gives the same kills; how
far a run has come by then depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before PyTorch is imported
PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

import torch  # noqa: E402
from detectron2.engine import HookBase  # noqa: E402

import train_net  # noqa: E402
from dcn_d2 import engine  # noqa: E402

CONFIG = PROJECT / "examples" / "nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"
ITERATIONS = 60
TINY = """
MODEL.DEVICE cpu MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 4
MODEL.RESNETS.DEFORM_ON_PER_STAGE [False,False,False,True] MODEL.FPN.OUT_CHANNELS 8 MODEL.ROI_BOX_HEAD.FC_DIM 8
MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 8
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0 DATASETS.TEST ()
SOLVER.IMS_PER_BATCH 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0 SOLVER.CHECKPOINT_PERIOD 3 SEED 1
""".split()

# What the configs of every other run have besides.
EVAL_PERIOD = 5
LONG = f"""
DATASETS.TEST ("nuclei_val",) TEST.EVAL_PERIOD {EVAL_PERIOD} TEST.LOSS True TEST.BEST_METRIC validation_loss
TEST.PATIENCE 1000 SOLVER.EMA.ENABLED True SOLVER.EMA.DECAY 0.9 SOLVER.ACCUMULATE_BATCHES 2
""".split()

# Memory that this process shares with the training: the iteration at which it started, and the last finished one.
SHARED = mmap.mmap(-1, 8)


def shared() -> tuple[int, int]:
    """Gives the iteration at which training started, and the last one that it finished; -1 for none yet."""
    start, done = struct.unpack("ii", SHARED[:8])
    return start, done


class Progress(HookBase):
    """Tells the campaign how far training is."""

    def before_train(self) -> None:
        SHARED[:8] = struct.pack("ii", self.trainer.start_iter, -1)

    def after_step(self) -> None:
        SHARED[4:8] = struct.pack("i", self.trainer.iter)


def start(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Starts train_net.py in a session of its own; returns the number of its process."""
    SHARED[:8] = struct.pack("ii", -1, -1)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        prepare()
        build_hooks = engine.DCNTrainer.build_hooks
        engine.DCNTrainer.build_hooks = lambda self: [Progress(), *build_hooks(self)]  # type: ignore[method-assign]
        engine.launch = functools.partial(engine.launch, start_method="fork")
        train_net.run(arguments)
        code = 0
    except SystemExit as left:
        code = left.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def session(pid: int) -> list[int]:
    """Gives the living processes of a session of the operating system."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.read_text().rpartition(") ")[2].split()[:4]
            if int(own) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait(pid: int, seconds: float = 90.0) -> int | None:
    """Waits for a process; returns its exit code (negative: the signal that ended it), None if it does not end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def looks(path: Path) -> tuple[int, int]:
    """Gives values that change when a file is written again."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def checkpoints(folder: Path, damaged: Mapping[Path, tuple[int, int]]) -> dict[str, int]:
    """Gives the checkpoints of a folder and their iterations; raises an error if one is not whole.

    Args:
        folder: of a run.
        damaged: files that this campaign has cut, and their state then; they are skipped until they are written again.
    """
    found = {}
    for path in folder.glob("model_*.pth"):
        if path.name == "model_best.pth" or damaged.get(path) == looks(path):
            continue
        checkpoint = torch.load(path, weights_only=True)
        iteration = checkpoint["iteration"]
        if average := checkpoint["trainer"]["hooks"].get("WeightAverage"):
            assert average["trained"].keys() == checkpoint["model"].keys(), f"{path} lacks weights that were trained"
            assert average["n_averaged"] == iteration + 2, f"{path}: its average holds {average['n_averaged']} models"
        assert path.stem in (f"model_{iteration:07d}", "model_final"), f"{path} holds iteration {iteration}"
        found[path.name] = iteration
    return found


def damage(folder: Path, damaged: dict[Path, tuple[int, int]], randomly: random.Random) -> str:
    """Damages a folder as a crash of the machine may do, notes in `damaged` which file it cut, and says what it did."""
    newest = max(checkpoints(folder, damaged).items(), key=lambda item: item[1])[0]
    kind = randomly.choice(["no last_checkpoint", "empty last_checkpoint", "newest cut"])
    if kind == "no last_checkpoint":
        (folder / "last_checkpoint").unlink(missing_ok=True)
    elif kind == "empty last_checkpoint":
        (folder / "last_checkpoint").write_text("")
    else:
        path = folder / newest
        os.truncate(path, path.stat().st_size * 2 // 3)
        damaged[path] = looks(path)
    return kind


class Campaign:
    """One series of kills. `failures` says what was wrong, and `summary` what was done."""

    def __init__(self, seed: int, work: Path, damages: bool) -> None:
        self.random = random.Random(seed)
        self.seed, self.work, self.damages = seed, work, damages
        self.failures: list[str] = []
        self.count: Counter[str] = Counter()
        self.run_number = 0
        self.began = time.monotonic()
        self.next_run()

    def next_run(self) -> None:
        """Begins in a fresh folder."""
        self.run_number += 1
        self.folder = self.work / f"run{self.run_number}"
        self.log = self.work / f"run{self.run_number}.txt"
        self.newest = -1  # iteration of the newest checkpoint
        self.best = float("inf")  # validation loss of the best model
        self.is_long = self.random.random() < 0.5
        self.count["long runs"] += self.is_long
        self.damaged: dict[Path, tuple[int, int]] = {}

    def arguments(self, processes: int, *others: str) -> list[str]:
        flags = [*others, "--num-gpus", str(processes), "--config-file", str(CONFIG)]
        return [
            *flags,
            *TINY,
            *(LONG if self.is_long else []),
            "OUTPUT_DIR",
            str(self.folder),
            "SOLVER.MAX_ITER",
            str(ITERATIONS),
        ]

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.failures.append(f"kill {self.count['kills']}, run {self.run_number}: {what}")
            print(f"FAILED {self.failures[-1]}", flush=True)

    def kill(self) -> None:
        """Starts or resumes the run, kills it at a random moment, and checks what is left."""
        self.count["kills"] += 1
        processes = self.random.choice([1, 1, 2])
        number = self.random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        to_group = self.random.random() < 0.5 if number != signal.SIGKILL else self.random.random() < 0.2
        worker = processes == 2 and number == signal.SIGKILL and not to_group and self.random.random() < 0.5
        # Half of the kills fall into the start, which takes about a second, or shortly after it.
        in_training = self.random.random() < 0.7
        delay = self.random.uniform(0.0, 1.5)
        in_writing = in_training and self.random.random() < 0.3
        second_run = self.random.random() < 0.15
        pid = start(self.arguments(processes, "--resume"), self.log)
        code: int | None = None
        while in_training and shared()[1] < 0:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.005)
        if code is None and second_run and in_training:
            self.second_run(while_running=True)
        if code is None:
            if in_writing:
                self.count["kills while a file was written"] += self.wait_for_writing(pid)
            else:
                time.sleep(delay)
            before = shared()[1]
            target = pid
            if worker and (others := [process for process in session(pid) if process != pid]):
                target = self.random.choice(others)
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if to_group else os.kill)(target, number)
            code = wait(pid)
            self.check(code is not None, f"still runs 90 s after {number.name}")
            if code is None:
                os.killpg(pid, signal.SIGKILL)
                code = wait(pid)
        else:
            before = shared()[1]
        where = "group" if to_group else "worker" if worker else "process"
        kind = f"{number.name} to the {where} of {processes}"
        self.count[kind] += 1
        began, done = shared()
        # Before training a signal ends the process in the usual way.
        allowed = {0, 128 + number} if before >= 0 and number != signal.SIGKILL else {0, -number, 128 + number}
        # A killed worker makes the launcher fail; Python's KeyboardInterrupt may be taken for an error during start-up.
        allowed |= {1} if worker or (number == signal.SIGINT and began < 0) else set()
        self.check(code in allowed, f"exit code {code} after {kind}")
        deadline = time.monotonic() + 30
        while (left := session(pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.check(not left, f"processes {left} are left after {kind}")
        for process in left:
            os.kill(process, signal.SIGKILL)
        self.check_folder(kind, began, before if number != signal.SIGKILL else -1)
        self.count["iterations"] += max(0, done + 1 - began) if began >= 0 else 0
        if self.newest >= ITERATIONS - 1:
            self.finish()
        elif second_run and not in_training and self.newest >= 0:
            self.second_run(while_running=False)
        elif self.damages and self.newest >= 6 and self.random.random() < 0.2:
            self.count[damage(self.folder, self.damaged, self.random)] += 1
            self.newest = max(checkpoints(self.folder, self.damaged).values())

    def wait_for_writing(self, pid: int, seconds: float = 5.0) -> bool:
        """Waits until a checkpoint or record is being written in the folder, and a random fraction of a moment more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
            if any(name.endswith(".part") for name in os.listdir(self.folder)):
                time.sleep(self.random.choice([0.0, 0.001, 0.005]))
                return True
        return False

    def check_folder(self, kind: str, began: int, finished: int) -> None:
        """Checks checkpoints and metrics after a kill.

        Args:
            kind: for messages.
            began: the iteration at which training started; -1: it did not.
            finished: an iteration that must not be lost; -1: none.
        """
        if not self.folder.is_dir():
            return
        if began >= 0 and self.newest >= 0:
            self.check(began == self.newest + 1, f"went on from {began}, the newest checkpoint was of {self.newest}")
        try:
            found = checkpoints(self.folder, self.damaged)
        except Exception as error:
            self.check(False, f"checkpoint not whole after {kind}: {error}")
            return
        newest = max(found.values(), default=-1)
        self.check(newest >= max(self.newest, finished), f"newest checkpoint {newest} after {kind} at {finished}")
        self.newest = newest
        self.check_metrics(kind)
        if self.is_long:
            self.check_best(kind)

    def check_metrics(self, kind: str) -> None:
        path = self.folder / "metrics.json"
        lines = path.read_text().splitlines() if path.is_file() else []
        with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
            json.loads(lines[-1]) if lines else None
        numbers = [json.loads(line)["iteration"] for line in lines[:-1]]
        with contextlib.suppress(ValueError):
            numbers += [json.loads(line)["iteration"] for line in lines[-1:]]
        self.check(len(numbers) == len(set(numbers)), f"metrics.json holds iterations {numbers} after {kind}")

    def check_best(self, kind: str) -> None:
        """Checks the best model and the record of evaluations."""
        path, record = self.folder / "model_best.pth", self.folder / "best_metric.json"
        evaluations = dict(json.loads(record.read_text())["evaluations"]) if record.is_file() else {}
        odd = [i for i in evaluations if (i + 1) % EVAL_PERIOD and i != ITERATIONS - 1]
        self.check(not odd, f"{record.name} holds evaluations of the iterations {odd} after {kind}")
        if not path.is_file():
            self.check(not evaluations, f"there were evaluations, but no best model after {kind}")
            return
        try:
            checkpoint = torch.load(path, weights_only=True)
            best = checkpoint["best"]["value"]
        except Exception as error:
            self.check(False, f"{path.name} not whole after {kind}: {error}")
            return
        self.check(best <= self.best, f"the best model had {self.best}, and has {best} after {kind}")
        self.check(best <= min(evaluations.values(), default=best), f"{best} of {evaluations} is kept after {kind}")
        self.count["best models"] += best < self.best
        self.best = best

    def second_run(self, while_running: bool) -> None:
        """Tries to start another run in the folder."""
        log = self.work / "second.txt"
        log.unlink(missing_ok=True)
        state = SHARED[:8]
        pid = start(self.arguments(1, *(["--resume"] if while_running else [])), log)
        SHARED[:8] = state
        code = wait(pid)
        said = "another run trains there now" if while_running else "holds an earlier run"
        running = "Starting training" not in log.read_text()
        self.count["second runs refused"] += 1
        self.check(code == 1 and said in log.read_text() and running, f"a second run ended with {code}: see {log}")

    def finish(self) -> None:
        """Checks a run that has done all its iterations, and begins the next one."""
        self.count["finished runs"] += 1
        if not self.failures:
            shutil.rmtree(self.folder)
        self.next_run()

    def fill_disk(self) -> None:
        """Trains where only some checkpoints have room, then where there is more."""
        self.next_run()
        self.is_long = False
        with small_disk(self.folder) as (prepare, grow, how):
            self.count[f"disk full ({how})"] += 1
            if how == "limit of a file's size":  # some checkpoints must be there before
                pid = start([*self.arguments(1), "SOLVER.MAX_ITER", "4"], self.log)
                self.check(wait(pid) == 0, "training before the disk is full")
            pid = start(self.arguments(1, "--resume"), self.log, prepare)
            code = wait(pid)
            text = self.log.read_text()
            self.check(code == 1, f"exit code {code} on a full disk")
            self.check("Traceback" not in text, f"a traceback for a full disk: see {self.log}")
            try:
                found = checkpoints(self.folder, self.damaged)
            except Exception as error:
                self.check(False, f"checkpoint not whole on a full disk: {error}")
                return
            self.check(bool(found), "no checkpoint is left on a full disk")
            grow()
            pid = start(self.arguments(1, "--resume"), self.log)
            code = wait(pid, 180)
            self.check(code == 0, f"exit code {code} of the run after there was room again")
            began, done = shared()
            self.check(began == max(found.values()) + 1, f"went on from {began}, the checkpoints were {found}")
            self.check(done == ITERATIONS - 1, f"ended at {done}")

    def summary(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.began, 1),
            "counts": dict(sorted(self.count.items())),
            "failures": self.failures,
        }


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Callable[[], None], Callable[[], Any], str]]:
    """A folder with little space: a file system in memory where mounting is allowed, else a limit of a file's size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0:
        try:
            grow = ["mount", "-o", "remount,size=200m", str(folder)]
            yield (lambda: None), functools.partial(subprocess.check_call, grow), "tmpfs"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

    yield limit, (lambda: None), "limit of a file's size"


def main() -> int:
    """Runs the campaign; the exit code is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description="Kill training at random moments, resume it, and check what is left.")
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how often (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="I", help="of the kinds and moments of the kills")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for runs and logs; kept (default: a new one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the summary there, as JSON")
    parser.add_argument("--no-disk", action="store_true", help="leave out the full disk")
    parser.add_argument(
        "--damage", action="store_true", help="also damage folders between starts, as a crash of the machine may"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = args.work or Path(tempfile.mkdtemp(prefix="kills-"))
    work.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(args.seed, work, args.damage)
    while campaign.count["kills"] < args.kills:
        campaign.kill()
        if campaign.count["kills"] % 10 == 0:
            print(f"{campaign.count['kills']} kills, {len(campaign.failures)} failures", flush=True)
    if not args.no_disk:
        campaign.fill_disk()
    summary = campaign.summary()
    print(json.dumps(summary, indent=2))
    if args.output:
        args.output.write_text(json.dumps(summary, indent=2) + "\n")
    if campaign.failures:
        print(f"logs and folders are in {work}")
    elif not args.work:
        shutil.rmtree(work)
    return bool(campaign.failures)


if __name__ == "__main__":
    sys.exit(main())

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""All of a long run together, in two processes: average, accumulated gradients, best model, validation loss, end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]

# Runs in a process of its own, because it forks: pytest's has threads.
CODE = """
import json, signal, sys
from pathlib import Path
import torch
from torch import nn
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from dcn_d2.engine import DCNTrainer, TrainingStopped, launch
from dcn_d2.engine.steps import StepTrainer
from tests.engine.test_stopping import At, send
from tests.engine.test_steps import Squares
from tests.engine.tiny import tiny_config

KEYS = ["DATASETS.TEST", ("nuclei_val",), "TEST.EVAL_PERIOD", 1, "TEST.LOSS", True, "TEST.BEST_METRIC", "bbox/AP",
        "SOLVER.EMA.ENABLED", True, "SOLVER.ACCUMULATE_BATCHES", 2, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 9,
        "SOLVER.BASE_LR", 0.0005]

def write(folder, name, value):
    Path(folder, f"{name}.rank{comm.get_rank()}.json").write_text(json.dumps(value))

def scored(scores):
    original = DCNTrainer.test.__func__
    def test(cls, cfg, model, evaluators=None):
        original(cls, cfg, model, evaluators)
        return {"bbox": {"AP": scores.pop(0)}} if comm.is_main_process() else {}
    DCNTrainer.test = classmethod(test)

def steps_of_two(folder):
    # Squares on four batches of one image each, two in each process: as one process with all four.
    model = nn.parallel.DistributedDataParallel(Squares())
    data = [[(1.0, 0.0)], [(2.0, 0.0)]] if comm.get_rank() == 0 else [[(3.0, 0.0)], [(4.0, 0.0)]]
    exchanged = []
    model.register_comm_hook(None, lambda state, bucket: (exchanged.append(1), hooks.allreduce_hook(None, bucket))[1])
    steps = StepTrainer(model, data, torch.optim.SGD(model.parameters(), lr=0.01), batches=2)
    with EventStorage() as storage:
        steps.run_step()
        logged = storage.latest()["total_loss"][0] if comm.is_main_process() else None
    write(folder, "steps", [model.module.weight.item(), len(exchanged), logged])

def begin(folder):
    steps_of_two(folder)
    scored([1.0, 5.0, 4.0])
    trainer = DCNTrainer(tiny_config(Path(folder), *KEYS))
    trainer.resume_or_load(resume=False)
    if comm.get_rank() == 1:
        trainer.register_hooks([At(2, send(signal.SIGTERM))])
    try:
        trainer.train()
    except TrainingStopped as stopped:
        write(folder, "stopped", [trainer.iter, stopped.code])

def resume(folder):
    scored([4.5, 4.0, 3.0])
    trainer = DCNTrainer(tiny_config(Path(folder), *KEYS, "TEST.PATIENCE", 3))
    trainer.resume_or_load(resume=True)
    results = trainer.train()
    parameters = torch.cat([p.detach().flatten() for p in trainer.checkpointer.model.parameters()])
    averages = torch.cat([p.flatten() for p in trainer.average.model.parameters()])
    ends = [trainer.start_iter, trainer.iter, trainer.stopped_early, results]
    write(folder, "resumed", [*ends, float(parameters.double().sum()), float(averages.double().sum())])

def normed(folder):
    seen = []
    def test(cls, cfg, model, evaluators=None):
        seen.append([float(v.double().sum()) for k, v in model.state_dict().items() if "running" in k])
        return {"bbox": {"AP": 1.0}} if comm.is_main_process() else {}
    DCNTrainer.test = classmethod(test)
    for average in (True, False):
        trainer = DCNTrainer(tiny_config(Path(folder, str(average)), *KEYS, "TEST.LOSS", False,
                                         "SOLVER.MAX_ITER", 2, "SOLVER.EMA.ENABLED", average))
        trainer.resume_or_load(resume=False)
        trainer.train()
    write(folder, "normed", seen)

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks as hooks
launch({"begin": begin, "resume": resume, "normed": normed}[sys.argv[2]], 2, args=(sys.argv[1],), start_method="fork")
"""


def run(part: str, folder: Path, *names: str) -> list[list[list]]:
    """Runs a part in two processes; gives what both of them have written under each name."""
    env = os.environ | {"PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(folder), part]
    done = subprocess.run(
        command, env=env, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    files = [[folder / f"{name}.rank{rank}.json" for rank in (0, 1)] for name in names]
    assert all(file.exists() for pair in files for file in pair), done.stdout[-4000:]
    return [[json.loads(file.read_text()) for file in pair] for pair in files]


def test_two_processes_accumulate_stop_resume_and_end_early_together(tmp_path: Path) -> None:
    steps, stopped = run("begin", tmp_path, "steps", "stopped")
    (weight, exchanged, logged), (other, *_) = steps
    # By hand: the gradients are 2 x^2 w + x, so 3, 10, 21 and 36; the losses are x^2 + x.
    assert weight == other == pytest.approx(1 - 0.01 * 17.5)
    assert exchanged == 1
    assert logged == pytest.approx((2 + 6 + 12 + 20) / 4)
    assert stopped == [[2, 143], [2, 143]]
    ((first, second),) = run("resume", tmp_path, "resumed")
    # Iteration 2 was not evaluated; 3, 4 and 5 were no better than 1.
    assert first[:3] == second[:3] == [3, 6, True]
    assert first[3] == {"bbox": {"AP": 3.0}} and second[3] is None
    assert first[4:] == second[4:], "all processes have the same weights and averages"
    best = torch.load(tmp_path / "model_best.pth")
    assert best["best"]["value"] == 5.0 and best["iteration"] == 1
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 5
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("validation_loss" in line for line in lines)
    assert "training stops early at iteration 5" in (tmp_path / "log.txt").read_text()


def test_two_processes_evaluate_the_model_that_the_checkpoint_holds(tmp_path: Path) -> None:
    ((first, second),) = run("normed", tmp_path, "normed")
    assert first == second and len(first) == 4
    for folder, seen in (("True", first[1]), ("False", first[3])):
        model = torch.load(tmp_path / folder / "model_final.pth")["model"]
        assert [float(v.double().sum()) for k, v in model.items() if "running" in k] == pytest.approx(seen)

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The average of the weights: its values, what checkpoints hold, and that a resumed run goes on exactly."""

import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng
from torch import Tensor, nn

from dcn_d2.engine import DCNTrainer, TrainingStopped
from dcn_d2.engine.averaging import decay_after

from .test_stopping import At, send, signals_that_are_not_ignored  # noqa: F401  a fixture
from .test_trainer import loggers_as_before, train  # noqa: F401  a fixture
from .tiny import tiny_config

EMA = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.6, "SOLVER.BASE_LR", 0.02, "SOLVER.MOMENTUM", 0.9]


class Repeatable(DCNTrainer):
    """Data and random numbers follow from the iteration, so that a resumed run may equal an uninterrupted one."""

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        batches = list(islice(super().build_train_loader(cfg), 4))

        class Drawn:
            def __iter__(self) -> Iterator[Any]:
                while True:
                    yield batches[int(torch.randint(4, ()))]

        return Drawn()

    def run_step(self) -> None:
        torch.manual_seed(self.iter)
        super().run_step()


def repeatable(folder: Path, *keys: Any, resume: bool = False) -> Repeatable:
    seed_all_rng(0)
    trainer = Repeatable(tiny_config(folder, *keys))
    trainer.resume_or_load(resume=resume)
    return trainer


def assert_equal(found: Any, expected: Any, place: str = "") -> None:
    """Compares what checkpoints hold, bit by bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_equal(found[key], value, f"{place}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_equal(found[number], value, f"{place}.{number}")
    else:
        assert found == expected, place


class Watch(HookBase):
    """Notes the trained weights after each step, and before the first."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def note(self) -> None:
        state = self.trainer.checkpointer.model.state_dict()
        self.states.append({name: value.clone() for name, value in state.items()})

    before_train = after_step = note


def test_warm_up_of_the_decay() -> None:
    assert decay_after(1, 0.999, warmup=True) == pytest.approx(2 / 11)
    assert decay_after(10**6, 0.999, warmup=True) == 0.999
    assert decay_after(1, 0.999, warmup=False) == 0.999


@pytest.mark.parametrize("warmup", [True, False])
def test_average_and_what_a_checkpoint_holds(warmup: bool, tmp_path: Path) -> None:
    trainer = repeatable(tmp_path, *EMA, "SOLVER.EMA.WARMUP", warmup)
    watch = Watch()
    trainer.register_hooks([watch])
    trainer.train()
    decays = [2 / 11, 3 / 12, 4 / 13, 5 / 14] if warmup else [0.6] * 4
    saved = torch.load(tmp_path / "model_final.pth")
    trained = saved["trainer"]["hooks"]["WeightAverage"]["trained"]
    moved = 0
    for name, first in watch.states[0].items():
        if not first.is_floating_point():
            continue
        expected = first.double()
        for decay, state in zip(decays, watch.states[1:]):
            expected = decay * expected + (1 - decay) * state[name].double()
        assert (saved["model"][name] - expected).abs().max() <= 1e-5 * (1 + expected.abs().max()), name
        assert torch.equal(trained[name], watch.states[-1][name]), name
        moved += name.endswith(("running_mean", "running_var")) and not torch.equal(trained[name], saved["model"][name])
    assert moved > 100, "statistics of BatchNorm are averaged too"


def test_average_is_what_is_evaluated_and_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[dict[str, Tensor]] = []

    def test(cls: Any, cfg: Any, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"bbox": {"AP": 1.0}}

    monkeypatch.setattr(DCNTrainer, "test", classmethod(test))
    keys = ["DATASETS.TEST", ("nuclei_val",), "TEST.EVAL_PERIOD", 2, "TEST.BEST_METRIC", "bbox/AP"]
    trainer = repeatable(tmp_path, *EMA, *keys)
    trainer.train()
    assert_equal(dict(torch.load(tmp_path / "model_best.pth")["model"]), evaluated[0])
    assert_equal(dict(torch.load(tmp_path / "model_final.pth")["model"]), evaluated[1])
    assert "evaluations use the average of the weights" in (tmp_path / "log.txt").read_text()
    fresh = DCNTrainer(tiny_config(tmp_path / "other", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")))
    fresh.resume_or_load(resume=False)
    assert_equal(dict(fresh.model.state_dict()), evaluated[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_equals_an_uninterrupted_one_bit_by_bit(accumulate: int, tmp_path: Path) -> None:
    keys = [*EMA, "SOLVER.MAX_ITER", 6, "SOLVER.ACCUMULATE_BATCHES", accumulate]
    keys += ["DATASETS.TEST", ("nuclei_val",), "TEST.EVAL_PERIOD", 2, "TEST.LOSS", True]
    repeatable(tmp_path / "whole", *keys).train()
    stopped = repeatable(tmp_path / "two", *keys)
    stopped.register_hooks([At(2, send(signal.SIGTERM))])
    with pytest.raises(TrainingStopped):
        stopped.train()
    again = repeatable(tmp_path / "two", *keys, resume=True)
    assert again.start_iter == 3
    again.train()
    whole, two = (torch.load(tmp_path / name / "model_final.pth") for name in ("whole", "two"))
    assert_equal(two, whole)


def test_average_may_be_switched_off_and_on_when_resuming(tmp_path: Path) -> None:
    repeatable(tmp_path, *EMA).train()
    trained = torch.load(tmp_path / "model_final.pth")["trainer"]["hooks"]["WeightAverage"]["trained"]
    without = repeatable(tmp_path, *EMA, "SOLVER.EMA.ENABLED", False, "SOLVER.MAX_ITER", 5, resume=True)
    assert_equal(dict(without.model.state_dict()), dict(trained))
    assert "the average of the weights that the checkpoint holds is dropped" in (tmp_path / "log.txt").read_text()
    without.train()
    saved = torch.load(tmp_path / "model_final.pth")
    assert "WeightAverage" not in saved["trainer"].get("hooks", {})
    again = repeatable(tmp_path, *EMA, "SOLVER.MAX_ITER", 5, resume=True)  # nothing is left to train
    again.train()
    assert_equal(dict(again.average.model.state_dict()), dict(saved["model"]))  # type: ignore[union-attr]


def test_average_in_mixed_precision_stays_float32(tmp_path: Path) -> None:
    trainer = train(tmp_path, *EMA, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
    assert trainer.average is not None
    for name, value in trainer.average.model.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64), name

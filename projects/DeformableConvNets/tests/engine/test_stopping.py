# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase

from dcn_d2.engine import DCNTrainer, TrainingStopped, stopping

from .test_trainer import iterations, loggers_as_before  # noqa: F401  a fixture
from .tiny import tiny_config


class At(HookBase):
    """Calls something in one iteration, before its step."""

    def __init__(self, iteration: int, action: Callable[[], None]) -> None:
        self.iteration, self.action = iteration, action

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.action()


def send(*numbers: int, pause: float = 0.0) -> Callable[[], None]:
    def kill() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    return kill


def stopped_trainer(folder: Path, iteration: int, action: Callable[[], None], *keys: Any) -> DCNTrainer:
    trainer = DCNTrainer(tiny_config(folder, *keys))
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([At(iteration, action)])
    return trainer


@pytest.fixture(autouse=True)
def signals_that_are_not_ignored() -> Iterator[None]:
    """Under nohup, or in the background of a shell script, processes ignore some."""
    ignored = [number for number in stopping.SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_leaves_a_checkpoint_of_its_iteration(number: int, code: int, tmp_path: Path) -> None:
    handlers = [signal.getsignal(one) for one in stopping.SIGNALS]
    trainer = stopped_trainer(tmp_path, 2, send(number), "SOLVER.MAX_ITER", 5)
    with pytest.raises(TrainingStopped) as stopped:
        trainer.train()
    assert stopped.value.code == code
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == handlers
    assert torch.load(tmp_path / "model_0000002.pth")["iteration"] == 2
    assert "stopped at iteration 2, go on with --resume" in (tmp_path / "log.txt").read_text()
    assert iterations(tmp_path) == [2]
    again = DCNTrainer(tiny_config(tmp_path, "SOLVER.MAX_ITER", 5))
    again.resume_or_load(resume=True)
    assert again.start_iter == 3
    again.train()
    assert iterations(tmp_path) == [2, 4]


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    trainer = stopped_trainer(tmp_path, 2, send(signal.SIGINT, signal.SIGINT, pause=stopping.SAME + 0.1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


def test_same_signal_that_arrives_twice_is_one(tmp_path: Path) -> None:
    trainer = stopped_trainer(tmp_path, 2, send(signal.SIGTERM, signal.SIGTERM))
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert (tmp_path / "model_0000002.pth").exists()


def test_signals_that_the_process_ignores_stay_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell script
    try:
        stopped_trainer(tmp_path, 2, send(signal.SIGINT)).train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "model_final.pth").exists()


def test_signal_that_comes_while_processes_agree_waits_for_the_next_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = stopping.StopRequest()
    monkeypatch.setattr(stopping.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(stopping.comm, "_get_global_gloo_group", lambda: None)

    def reduce(flag: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        stop._receive(signal.SIGTERM, None)  # after this process has said 0 to the others

    monkeypatch.setattr(stopping.dist, "all_reduce", reduce)
    assert not stop.agreed(), "the other process goes on, and would be waited for in vain"
    assert stop.agreed()


def test_training_in_another_thread_works(tmp_path: Path) -> None:
    trainer = DCNTrainer(tiny_config(tmp_path))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert (tmp_path / "model_final.pth").exists()


def test_checkpoint_that_is_there_is_not_written_twice(tmp_path: Path) -> None:
    trainer = stopped_trainer(tmp_path, 1, send(signal.SIGTERM), "SOLVER.CHECKPOINT_PERIOD", 2)
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert (tmp_path / "log.txt").read_text().count("Saving checkpoint") == 1


def test_stop_in_the_last_iteration_leaves_only_the_evaluation(tmp_path: Path) -> None:
    keys = ["DATASETS.TEST", ("nuclei_val",)]
    trainer = stopped_trainer(tmp_path, 3, send(signal.SIGTERM), *keys)
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_final.pth"] and not trainer_results(tmp_path)
    again = DCNTrainer(tiny_config(tmp_path, *keys))
    again.resume_or_load(resume=True)
    assert "AP" in again.train()["bbox"] and trainer_results(tmp_path)


def trainer_results(folder: Path) -> bool:
    return "bbox/AP" in (folder / "metrics.json").read_text()


@pytest.mark.parametrize("period, name", [(2, "model_0000001.pth"), (0, "model_final.pth")])
def test_evaluation_is_not_awaited(period: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(tmp_path, "DATASETS.TEST", ("nuclei_val",), "TEST.EVAL_PERIOD", period)
    trainer = DCNTrainer(cfg)
    loader = DCNTrainer.build_test_loader

    def interrupted(cfg: Any, dataset_name: str) -> Iterator[Any]:
        send(signal.SIGTERM)()
        return pytest.fail("evaluation went on") or loader(cfg, dataset_name)

    monkeypatch.setattr(DCNTrainer, "build_test_loader", interrupted)
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*.pth")] == [name]


def test_workers_that_the_signal_has_killed_cost_no_iteration(tmp_path: Path) -> None:
    def kill_group() -> None:  # as systemd and Slurm do
        trainer.stop._receive(signal.SIGTERM, None)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
        trainer.stop.agreed = lambda: False  # type: ignore[method-assign]  # so that the missing batch is met

    trainer = stopped_trainer(tmp_path, 2, kill_group, "DATALOADER.NUM_WORKERS", 1, "SOLVER.MAX_ITER", 50)
    with pytest.raises(TrainingStopped):
        trainer.train()
    (path,) = tmp_path.glob("model_*.pth")
    saved = torch.load(path)
    assert saved["iteration"] == int(path.stem.removeprefix("model_")) >= 1
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["iteration"] == saved["iteration"]


def test_worker_that_the_signal_killed_while_it_handed_over_a_batch_cost_the_checkpoint(tmp_path: Path) -> None:
    def end_data() -> None:
        def batches() -> Iterator[Any]:
            raise EOFError  # what `multiprocessing` raises
            yield

        trainer.stop._receive(signal.SIGTERM, None)
        trainer._trainer._data_loader_iter_obj = batches()  # type: ignore[attr-defined]
        trainer.stop.agreed = lambda: False  # type: ignore[method-assign]

    trainer = stopped_trainer(tmp_path, 2, end_data)
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert torch.load(tmp_path / "model_0000001.pth")["iteration"] == 1

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Runs a model over many images: prepared ahead, in batches of one size, results in the order of the images."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch

from .machine import count_cores

# What prediction takes on top of the model: a Faster R-CNN R-50-FPN needed 398 MiB for an image of 800 x 1216.
BYTES_FOR_A_PIXEL = 430

Inputs = dict[str, Any]
Outputs = dict[str, Any]


class Plan(NamedTuple):
    """How many images run at once: `workers` batches of up to `batch_size`, with `threads` threads for each batch."""

    batch_size: int
    workers: int
    threads: int


class _Item:
    """An image on its way: it is being prepared (`inputs`), then in a batch (`place`: the batch, its number there)."""

    def __init__(self, inputs: Future[Inputs]) -> None:
        self.inputs: Future[Inputs] | None = inputs
        self.place: tuple[Future[list[Outputs]], int] | None = None

    def waiting(self) -> Inputs | None:
        """Waits until it is prepared. Gives the model's input; None if it failed, or is in a batch already."""
        return None if self.inputs is None or self.inputs.exception() else self.inputs.result()

    def result(self) -> Outputs | BaseException:
        """Waits for the result. Gives the error if it could not be prepared; raises the model's errors."""
        if self.place:
            batch, number = self.place
            return batch.result()[number]
        error = self.inputs and self.inputs.exception()
        assert error
        return error


def plan_batches(batch_size: int | None, workers: int | None, pixels: int, on_cpu: bool) -> Plan:
    """Plans how much runs at once.

    On a CPU several batches at once, with a share of the threads each, gain more than large batches: each operator
    divides badly among threads, and large batches leave the caches. So by default there is a worker for each thread, as
    far as half of the free memory allows. Elsewhere there is one worker.

    Args:
        batch_size: how many images a batch has at most, if the caller says it.
        workers: how many batches run at once, if the caller says it.
        pixels: of an image.
        on_cpu: whether the model is on the CPU.
    """
    threads, batch_size = torch.get_num_threads(), batch_size or 2
    if workers is None:
        fitting = _free_memory() // 2 // (batch_size * pixels * BYTES_FOR_A_PIXEL)
        workers = max(1, min(threads, fitting)) if on_cpu else 1
    return Plan(batch_size, workers, max(1, threads // workers))


def _free_memory() -> int:
    """Bytes that new work may take without pushing out other work; where that is not known, very many."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 60


def run_in_batches(
    images: Iterable[Any],
    prepare: Callable[[int, Any], Inputs],
    run: Callable[[list[Inputs]], list[Outputs]],
    plan: Plan,
) -> Iterator[Outputs | BaseException]:
    """Yields the model's output for each image, or the error that `prepare` raised for it, in the order of the images.

    Only images of exactly one size share a batch. Padding them to one size would change their results near the borders.
    A bounded number of images is held at any time, so `images` may be endless. It is iterated in the caller's thread.

    Args:
        images: what `prepare` takes.
        prepare: gives the model's input for (position, image). It runs in background threads, ahead of the model.
        run: the model. With one worker it runs in the caller's thread, else in several threads at once.
        plan: how much runs at once.
    """
    numbered = enumerate(images)
    window: deque[_Item] = deque()
    running: list[Future[list[Outputs]]] = []
    with _threads(_decoders()) as decoders, _workers(plan) as workers:
        while True:
            for position, image in islice(numbered, 4 * plan.batch_size * plan.workers - len(window)):
                window.append(_Item(decoders.submit(prepare, position, image)))
            if not window:
                return
            running = [batch for batch in running if not batch.done()]
            # A queue of two batches for each worker: no worker waits while the caller uses a result. With one worker,
            # which is the caller's thread, a batch starts when its first result is asked for.
            while len(running) < 2 * plan.workers if plan.workers > 1 else not window[0].place:
                batch, inputs = _next_batch(window, plan.batch_size)
                if not batch:
                    break
                running.append(workers.submit(run, inputs))
                for number, item in enumerate(batch):
                    item.place, item.inputs = (running[-1], number), None
            yield window.popleft().result()


def _next_batch(window: Iterable[_Item], batch_size: int) -> tuple[list[_Item], list[Inputs]]:
    """The first image that waits for a batch, and others of its size that follow it; none if none waits."""
    batch: list[_Item] = []
    chosen: list[Inputs] = []
    for item in window:
        inputs = item.waiting()
        if inputs and (not chosen or inputs["image"].shape == chosen[0]["image"].shape):
            batch.append(item)
            chosen.append(inputs)
        if len(batch) == batch_size:
            break
    return batch, chosen


class _Caller(Executor):
    """Runs what is submitted at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _threads(number: int, **others: Any) -> Iterator[Executor]:
    """A pool of threads; at its end nothing more starts, whatever happened."""
    pool = ThreadPoolExecutor(number, **others)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _workers(plan: Plan) -> Iterator[Executor]:
    """What runs the batches. Each worker's operators use `plan.threads` threads; those of the caller keep theirs."""
    if plan.workers == 1:
        yield _Caller()
        return
    with _threads(plan.workers, initializer=_set_threads, initargs=(plan.threads,)) as pool:
        # The number belongs to the thread that sets it, and besides to threads that start later: so all workers start
        # now, and then the caller's number is set again.
        before, all_started = torch.get_num_threads(), threading.Barrier(plan.workers)
        for start in [pool.submit(all_started.wait) for _ in range(plan.workers)]:
            start.result()
        torch.set_num_threads(before)
        yield pool


def _set_threads(number: int) -> None:
    torch.set_num_threads(number)
    torch.get_num_threads()  # torch initialises a new thread at its first operator, with the number that is global then


def _decoders() -> int:
    """How many threads read and resize images: more than one where there are cores for that."""
    return max(1, min(8, count_cores() // 2))

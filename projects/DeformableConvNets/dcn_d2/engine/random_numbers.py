# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Keeps the random numbers of a training as they are while something else is computed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_numbers_kept(seed: int | None = None) -> Iterator[None]:
    """A context after which Python, NumPy and PyTorch go on as if nothing had been drawn inside.

    Args:
        seed: what is drawn inside starts from it; None goes on with the numbers of outside.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            if seed is not None:
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Numbers of segments as colours: red counts 1, green 256 and blue 65536."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536 % 256], axis=-1).astype(np.uint8)


def rgb2id(colours: np.ndarray) -> np.ndarray:
    return colours.astype(np.int64) @ np.array([1, 256, 65536])

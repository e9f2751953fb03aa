# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""In which type a training computes: float32, or mixed precision where the machine gains by it."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

from ..config import with_dcn_keys


def why_not_on_cpu(dtype: str) -> str:
    """Says why training on this machine's processor should not be in mixed precision; "" if it may.

    The default, "auto", asks for an instruction of the processor that multiplies in bfloat16. Measured with
    `benchmarks/training_precision.py` on an AMD EPYC with AVX512_BF16 and without AMX: training iterations were 1.3 to
    1.7 times as fast in bfloat16 (results/training_precision_cpu.json). AMX multiplies faster still. Without either,
    bfloat16 is converted to float32 and back around each product.

    Args:
        dtype: SOLVER.AMP.DTYPE. Whoever asks for "bfloat16" by its name gets it on any processor.
    """
    if dtype == "float16":
        return "mixed precision in float16 (SOLVER.AMP.DTYPE) needs a GPU"
    if dtype == "bfloat16" or multiplies_bfloat16():
        return ""
    return (
        "this processor has no instructions for bfloat16 (AMX or AVX512_BF16), and would be slower with it than in "
        'float32; SOLVER.AMP.DTYPE "bfloat16" uses it all the same'
    )


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions that multiply in bfloat16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Gives the 16-bit type that a config trains in; None for float32."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    dtype = with_dcn_keys(cfg).SOLVER.AMP.DTYPE
    if dtype == "auto":
        dtype = "bfloat16" if cfg.MODEL.DEVICE == "cpu" else "float16"
    return getattr(torch, dtype)

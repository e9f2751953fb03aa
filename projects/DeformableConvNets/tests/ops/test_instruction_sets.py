# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The CPU kernels are compiled once for each instruction set: which one is used, and that all of them compute right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# As DCN_CPU_CAPABILITY names them, and what Linux calls the instructions that each needs on top of those before.
INSTRUCTIONS = {
    "default": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16"},
}
CAPABILITIES = list(INSTRUCTIONS)


def missing_instructions(capability: str) -> list[str]:
    """What the processor lacks of what this instruction set needs."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("needs Linux's /proc/cpuinfo to know what the processor has")
    needed = set().union(*(INSTRUCTIONS[name] for name in CAPABILITIES[: CAPABILITIES.index(capability) + 1]))
    return sorted(needed - set(info.read_text().split()))


@pytest.mark.instruction_set
def test_the_best_instruction_set_is_used_up_to_the_one_asked_for() -> None:
    """Matrix tiles, for example: in bfloat16 they are several times as fast as what runs without them."""
    asked = os.environ.get("DCN_CPU_CAPABILITY", CAPABILITIES[-1])
    possible = [name for name in CAPABILITIES[: CAPABILITIES.index(asked) + 1] if not missing_instructions(name)]
    assert torch.ops.dcn_d2.capability() == possible[-1]


@pytest.mark.unsanitized
@pytest.mark.parametrize("capability", CAPABILITIES[:-1])
def test_every_instruction_set(capability: str) -> None:
    """Repeats what compares kernels with the reference. The best instruction set is what all other tests run on."""
    missing = missing_instructions(capability)
    if missing:
        pytest.skip(f"the processor has no {capability}: it lacks {', '.join(missing)}")
    # The test above is among these, and fails if another set is used than this one.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        + ["-m", "instruction_set and not gpu", str(Path(__file__).parent)],
        env=os.environ | {"DCN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None and int(passed[1]) > 500, result.stdout

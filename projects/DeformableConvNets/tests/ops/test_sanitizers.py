# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The operators' tests under the address and the undefined behaviour sanitizers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZED = "DCN_LIBRARY" in os.environ


@pytest.mark.slow
@pytest.mark.skipif(SANITIZED, reason="runs in this process")
def test_operators_under_sanitizers(project: Path) -> None:
    """On the best instruction set only; `dev/sanitize.sh` by itself runs them all."""
    result = subprocess.run(
        [str(project / "dev/sanitize.sh")],
        env={"DCN_CPU_CAPABILITY": "amx"} | os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    if result.returncode == 77:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


# Fewer numbers than the operands' sizes promise.
SHRUNK = """
import sys, torch
from dcn_d2.ops import deform_conv2d, deform_roi_pool
image = torch.randn(1, 16, 32, 32).contiguous(memory_format=getattr(torch, sys.argv[2]))
image.untyped_storage().resize_(4 * 16 * 32 * 31)
if sys.argv[1] == "deform_conv2d":
    deform_conv2d(image, torch.zeros(1, 2, 32, 32), torch.randn(16, 16, 1, 1))
else:
    deform_roi_pool(image, torch.tensor([[0, 0.0, 0.0, 32.0, 32.0]]), None, 4)
"""


@pytest.mark.skipif(not SANITIZED, reason="dev/sanitize.sh runs it")
@pytest.mark.parametrize(
    ("operator", "memory_format"), [("deform_conv2d", "channels_last"), ("deform_roi_pool", "contiguous_format")]
)
def test_a_read_past_the_end_is_noticed(operator: str, memory_format: str) -> None:
    result = subprocess.run([sys.executable, "-c", SHRUNK, operator, memory_format], capture_output=True, text=True)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr, result.stderr
    # The read itself, frame 0, is in our library: not in torch, nor in a function that the sanitizer wraps.
    first = re.search(r"^ *#0 .*$", result.stderr, re.M)
    assert first is not None and re.search(r" in dcn::cpu::|[ /]csrc/cpu/", first[0]), result.stderr

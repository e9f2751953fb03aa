# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA sources for the CPU and calls the operators that they define there."""

from __future__ import annotations

import faulthandler
import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
SANITIZED = "DCN_SANITIZED"  # names the sanitized library in the process that runs under the sanitizers
ROUND_ROBIN, GREEDY_WARP = 0, 1
# What the backward operators return.
GRADIENTS = {
    "deform_conv2d": ("input", "offset", "weight", "mask"),
    "modulated_deform_conv2d": ("input", "offset_and_mask", "weight"),
    "deform_roi_pool": ("input", "offset", "mask"),
    "deform_psroi_pool": ("input", "offset", "mask"),
}


# Emulated operators with one argument more than the public ones: whether TF32 is allowed. On a GPU, the kernels ask.
COMPILED = {
    name + suffix: f"_{name}{suffix}"
    for name in ("deform_conv2d", "modulated_deform_conv2d")
    for suffix in ("", "_backward")
}


def schema_of(name: str) -> Any:
    """The schema of an emulated operator: the public one's, with `allow_tf32` where COMPILED says so."""
    schema = getattr(torch.ops.dcn_d2, name.lstrip("_")).default._schema
    if not name.startswith("_"):
        return schema
    return torch._C.parse_schema(str(schema).replace("::", "::_").replace(") ->", ", bool allow_tf32=False) ->", 1))


def compile_library(library: Path, *flags: str) -> Path:
    """Compiles the kernels with the host's C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile the emulated kernels with")
    target = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (PROJECT / "setup.py").read_text())
    assert target is not None
    command = [
        *shlex.split(compiler),
        "-std=c++20",
        "-O1",
        "-g1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += ["-Wno-unknown-pragmas", f"-DTORCH_TARGET_VERSION={target[1]}", f"-I{PROJECT / 'csrc'}", f"-I{HERE}"]
    command += [word for path in include_paths("cpu") for word in ("-isystem", path)]
    command += [*flags, str(HERE / "emulated.cpp"), "-o", str(library)]
    subprocess.run([*command, f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"], check=True)
    return library


def call(namespace: Any, name: str, values: dict[str, Any]) -> Any:
    """Calls an operator, or its backward, by argument names; those not given take the operator's defaults."""
    defaults = {a.name: a.default_value for a in schema_of(name.removesuffix("_backward").lstrip("_")).arguments}
    return getattr(namespace, name)(*((defaults | values)[a.name] for a in schema_of(name).arguments))


def emulate(name: str, values: dict[str, Any], **need: bool) -> dict[str, Tensor]:
    """Runs an emulated operator forward and backward. Gives its output and gradients by name."""
    operators = torch.ops.dcn_d2_emulated
    values = {"allow_tf32": False} | values
    output = call(operators, COMPILED.get(name, name), values)
    generator = torch.Generator().manual_seed(1)
    grad = values.get("grad", torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype))
    needed = dict.fromkeys(("need_input", "need_offset", "need_weight"), True) | {"deterministic": False} | need
    backward = f"{name}_backward"
    found = call(operators, COMPILED.get(backward, backward), values | needed | {"grad": grad})
    return {"output": output, "grad": grad} | dict(zip(GRADIENTS[name], found))


def barriers(path: str) -> list[tuple[str, int]]:
    """Files and lines of the barriers of all kernels in one file or folder of csrc/cuda; there must be some."""
    root = PROJECT / "csrc/cuda"
    found = []
    for file in [root / path] if (root / path).is_file() else sorted((root / path).rglob("*.cu*")):
        lines = file.read_text().splitlines()
        found += [(str(file.relative_to(root)), n) for n, line in enumerate(lines, 1) if "__syncthreads()" in line]
    assert found, path
    return found


def changes_something(run: Callable[[], bool]) -> bool:
    """Calls `run` in a process of its own: code that reads poison may crash, and that counts too."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        changed = True
        try:
            changed = run()
        finally:
            os._exit(int(changed))
    return os.waitpid(pid, 0)[1] != 0


def removal_is_noticed(
    configure: Any,
    operator: str,
    values: dict[str, Any],
    file: str,
    line: int,
    same: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> bool:
    """Whether results change, or an emulated kernel fails, in some schedule without the barrier on this line."""
    configure(ROUND_ROBIN)
    expected = emulate(operator, values)
    configure(GREEDY_WARP)
    complete = emulate(operator, values)
    assert all(same(complete[name], value) for name, value in expected.items()), "results change with all barriers"

    def changes(schedule: int) -> bool:
        configure(schedule, line, file)
        try:
            found = emulate(operator, values)
        except RuntimeError as error:
            return "emulated kernel" in str(error)
        return not all(same(found[name], value) for name, value in expected.items())

    noticed = any(changes_something(functools.partial(changes, schedule)) for schedule in (ROUND_ROBIN, GREEDY_WARP))
    configure(ROUND_ROBIN)
    return noticed

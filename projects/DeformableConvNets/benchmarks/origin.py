# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Where numbers were measured, on what machine, with which versions and commit: every result file says it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino", "deformops", "triton")


def environment(device: str) -> dict[str, Any]:
    """The machine, the versions and the commit, as a result file names them."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    name, changes = commit()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        **({"gpu": gpu()} if device == "cuda" else {}),
        "threads_available": processors_available(),
        "instruction_set_cap": os.environ.get("DCN_CPU_CAPABILITY", "none"),
        "versions": versions,
        "python": platform.python_version(),
        "commit": name,
        "uncommitted_changes": changes,
        "date": time.strftime("%Y-%m-%d"),
    }


def processors_available() -> int | None:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def gpu() -> dict[str, Any]:
    """How large the GPU is, and the versions of what drives it; what cannot be found out is left out."""
    questions: dict[str, Callable[[], Any]] = {
        "capability": lambda: "{}.{}".format(*torch.cuda.get_device_capability()),
        "multiprocessors": lambda: torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
        "cuda": lambda: torch.version.cuda,
        "cudnn": torch.backends.cudnn.version,
        "driver": lambda: _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
    }
    found = {}
    for name, ask in questions.items():
        with suppress(Exception):
            found[name] = ask()
    return found


def processor() -> str:
    """The processor's name, and which vector extensions it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split("\t", 1) for line in reversed(lines) if "\t" in line)
    name = fields.get("model name", platform.machine()).lstrip("\t: ")
    flags = set(fields.get("flags", "").split())
    return f"{name} ({', '.join(f for f in ('avx2', 'avx512f', 'amx_bf16') if f in flags) or 'no AVX2'})"


@cache
def commit() -> tuple[str, bool | None]:
    """The commit, and whether files differ from it, or None if that is not known.

    Where there is no git, the environment variable DCN_COMMIT says it: "abc123def456" or "abc123def456 with changes".
    """
    named, changed, _ = os.environ.get("DCN_COMMIT", "").partition(" with changes")
    if named:
        return named, bool(changed)
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return head or "unknown", None if changes is None else bool(changes)


def _output(*command: str) -> Any:
    """What a command prints, or None if there is no such command or it fails."""
    try:
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()

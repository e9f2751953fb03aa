# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The options that all benchmarks have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals
from benchmarks.origin import processors_available


class _Check(argparse.Action):
    """Says which goals result files meet and ends the program, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            print(goals.report(values))
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: --check: {error}\n")
        parser.exit()


def parser(description: str, quick: str, repeats: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `quick` says what --quick leaves out."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--dtype", default="float32", choices=["float32", "tf32", "float16", "bfloat16"])
    options.add_argument("--threads", type=int, nargs="+", help="default: 1 and all, or 1 for CUDA")
    options.add_argument("--repeats", type=int, default=repeats)
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--output", type=Path, help="default: results/<benchmark>_<device>.json")
    options.add_argument(
        "--check", type=Path, nargs="+", metavar="FILE", action=_Check, help="say which goals result files meet"
    )
    return options


def parse(options: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parses, and sets what depends on the machine."""
    parsed = options.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: no GPU is visible to torch")
    if parsed.dtype == "tf32" and parsed.device != "cuda":
        options.error("--dtype tf32: only GPUs have it, --device cuda")
    if parsed.repeats < 2:
        options.error(f"--repeats: a spread needs at least 2, got {parsed.repeats}")
    every = sorted({1, processors_available() or 1}) if parsed.device == "cpu" else [1]
    parsed.threads = parsed.threads or every
    return parsed

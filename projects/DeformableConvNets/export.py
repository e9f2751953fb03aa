#!/usr/bin/env python3
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writes a trained detector into a file of another runtime; dcn_d2/command_line/export.py has the arguments.

PyTorch and Detectron2 are imported in the functions, so that --help and mistyped arguments answer at once.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from dcn_d2.command_line.export import parse_arguments
from dcn_d2.quiet import silence_detectron2_warnings

if TYPE_CHECKING:
    from dcn_d2.export import Exported

silence_detectron2_warnings()


def export_from_command_line(args: argparse.Namespace) -> Exported:
    """Builds the model that the command line names, and exports it."""
    from pathlib import Path

    from dcn_d2.checkpoint import UntrainedError
    from dcn_d2.export import export
    from dcn_d2.prediction.model import check_weights, explain_untrained, read_config

    cfg = read_config(args)
    check_weights(args, cfg, "export.py")
    options: dict[str, Any] = {}
    if args.aot:
        print("compiling takes some minutes", flush=True)
        options["compile"] = True
    try:
        return export(
            cfg,
            args.output,
            format=args.format,
            part=args.part,
            size=tuple(args.size) if args.size else None,
            batch=args.batch,
            dtype=args.dtype,
            masks=args.masks,
            check=not args.no_check,
            image=args.image,
            row=Path(args.config_file).stem,
            overwrite=args.overwrite,
            **options,
        )
    except UntrainedError as error:
        raise explain_untrained(error, args, cfg, "export.py") from error


class _EndedError(BaseException):
    """SIGTERM, as a scheduler or a container sends it. It ends the script as Ctrl-C does: no half file stays."""


@contextmanager
def _raising_at_sigterm() -> Iterator[None]:
    def end(number: int, frame: Any) -> NoReturn:
        raise _EndedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(argv: list[str] | None = None) -> int:
    """Runs the command line, and gives the exit code; a mistake ends in one line."""
    args = parse_arguments(argv)
    try:
        with _raising_at_sigterm():
            from dcn_d2.engine import MISTAKES, one_line
            from dcn_d2.export.summary import summarise

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of tracing: what they fear, the comparison would show
                    exported = export_from_command_line(args)
            except (*MISTAKES, RuntimeError, MemoryError) as error:
                sys.exit(f"export.py: {one_line(error)}")
            print("\n".join(summarise(exported)))
            return 0
    except (KeyboardInterrupt, _EndedError) as error:
        print("export.py: interrupted; no file was written", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _EndedError) else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(run())

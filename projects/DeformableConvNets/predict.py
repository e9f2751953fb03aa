#!/usr/bin/env python3
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Predicts many images and videos, and writes COCO's results; dcn_d2/command_line/predict.py has the arguments.

PyTorch and Detectron2 are imported in the functions, so that --help and mistyped arguments answer at once.
"""

from __future__ import annotations

import io
import signal
import sys

from dcn_d2.command_line.predict import parse_arguments
from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()


def run(argv: list[str] | None = None) -> int:
    """Runs the command line, and gives the exit code; a mistake ends in one line."""
    args = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        from dcn_d2.engine import MISTAKES, one_line
        from dcn_d2.prediction.run import predict

        try:
            return predict(args)
        except (*MISTAKES, RuntimeError) as error:
            sys.exit(f"predict.py: {one_line(error)}")
    except KeyboardInterrupt:  # in the seconds of the imports, before the first image, or while results are written
        command = "the same command without --overwrite" if args.overwrite else "the same command"
        print(f"predict.py: interrupted; {command} goes on", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(run())

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writes OUTPUT_DIR/report.html for a run that is done, interrupted or only evaluated."""

from __future__ import annotations

import argparse
import logging
import sys

from ..quiet import silence_detectron2_warnings


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m dcn_d2.report", description=__doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="the folder of the run")
    args = parser.parse_args(arguments)
    silence_detectron2_warnings()
    from .build import write_report

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(write_report(args.folder))
    except OSError as error:
        sys.exit(f"dcn_d2.report: {error}")


if __name__ == "__main__":
    main()

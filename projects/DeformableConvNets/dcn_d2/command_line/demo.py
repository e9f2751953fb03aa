# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of demo.py."""

from __future__ import annotations

import argparse

from .types import IMAGE_SOURCES, add_model_arguments, add_source_arguments, check_model, check_pairs, count, score


def parse_arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; `description` is the text above the list of options."""
    parser = argparse.ArgumentParser(
        description=description, epilog=IMAGE_SOURCES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, exported=True)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="a registered data set; the first of DATASETS.TEST by default")
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, see below (another option ends the list)")
    parser.add_argument("--output", default="output/pictures", metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--max-images", type=count(1), default=8, metavar="N", help="of a data set, how many to draw")
    parser.add_argument("--points", type=count(0), default=3, metavar="N", help="detections whose sampling is drawn")
    parser.add_argument("--confidence", type=score, default=0.5, metavar="SCORE", help="lowest score that is drawn")
    parser.add_argument(
        "--stretch-contrast",
        action="store_true",
        help="brighten what is drawn, for dark images as those of microscopes; the model sees the image as it is",
    )
    add_source_arguments(parser)
    args = parser.parse_args(argv)
    check_pairs(parser, args)
    check_model(parser, args)
    return args

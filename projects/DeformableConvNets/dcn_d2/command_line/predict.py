# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of predict.py."""

from __future__ import annotations

import argparse

from .types import (
    IMAGE_SOURCES,
    add_model_arguments,
    add_source_arguments,
    check_model,
    check_pairs,
    count,
    score,
    shard,
)

DESCRIPTION = """Predicts many images, and writes the detections.

OUTPUT gets detections.json (COCO's results), images.json (which image has which id, in COCO's format) and, if there are
any, unreadable.txt. Images that cannot be read are listed there and left out.

What is found is written while the command runs. After an interruption of any kind, the same command goes on: images
that are done are not predicted again. An output folder of another command is refused.
"""
EXAMPLES = """
examples:
  a folder, with published weights:
    predict.py --config-file faster_rcnn_R_50_FPN_1x_mdconv_c3-c5 --published --input photos --output found
  two machines that share a folder; whichever finishes last writes detections.json:
    predict.py --config-file ... --weights model_final.pth --input photos --output found --shard 1/2
    predict.py --config-file ... --weights model_final.pth --input photos --output found --shard 2/2
  COCO's validation set, ready for pycocotools:
    predict.py ... --input instances_val2017.json --images val2017 --output found
"""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=IMAGE_SOURCES + EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser, exported=True)
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="PATH", help="images, see below (another option ends it)"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--score-threshold", type=score, metavar="SCORE", help="lowest score that is written")
    parser.add_argument(
        "--format",
        choices=("json", "parquet", "both"),
        default="json",
        help="detections.json, detections.parquet (needs pyarrow), or both",
    )
    parser.add_argument("--pictures", action="store_true", help="also draw each image, in OUTPUT/pictures")
    parser.add_argument("--video", action="store_true", help="also draw each video, as OUTPUT/pictures/NAME.mp4")
    parser.add_argument("--confidence", type=score, default=0.5, metavar="SCORE", help="lowest score that is drawn")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="predict the I-th of N equal parts")
    parser.add_argument("--merge", action="store_true", help="predict nothing; write the results of finished shards")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away what is in OUTPUT; of several shards, each one does so only with results of another command",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if an image could not be read")
    parser.add_argument(
        "--batch-size",
        type=count(1),
        metavar="N",
        help="images of one size that are predicted together; by default what was measured to be fast",
    )
    add_source_arguments(parser)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_pairs(parser, args)
    if args.merge:
        if args.overwrite or args.shard != (1, 1) or args.pictures or args.video:
            parser.error("--merge only writes results again: leave out --overwrite, --shard, --pictures and --video")
        return args
    check_model(parser, args)
    if not args.input:
        parser.error("--input PATH is needed: a folder, files, a list, a video (--help shows all kinds)")
    return args

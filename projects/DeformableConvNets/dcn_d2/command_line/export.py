# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The arguments of export.py."""

from __future__ import annotations

import argparse

from .types import add_model_arguments, check_opts, count

# The formats and the suffixes of their files, as in dcn_d2/export/formats.py, which needs torch.
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "torchscript": ".ts"}
DTYPES = ("float32", "float16", "bfloat16")

DESCRIPTION = """Writes a trained detector into a file that another runtime runs.

The file is compared with the model on an image before it gets its name: if the detections differ by more than rounding,
the command fails and leaves no file.
"""
EXAMPLES = """
formats, which --format or the suffix of --output names:
  onnx         model.onnx   ONNX Runtime (1.25 or newer), TensorRT (10.1 or newer); standard operators only
  openvino     model.xml    OpenVINO, with model.bin beside it
  pt2          model.pt2    torch.export; with --aot compiled by AOTInductor
  torchscript  model.ts     TorchScript

examples:
  a checkpoint of your own, for images of any size and batches of any number:
    export.py --config-file output/mine/config.yaml --weights output/mine/model_final.pth --output mine.onnx
  a row of the zoo for images of one size, one at a time:
    export.py --config-file faster_rcnn_R_50_FPN_1x_mdconv_c3-c5 --published --size 800 1344 --batch 1 --output a.xml
"""


def build_parser() -> argparse.ArgumentParser:
    """Makes the parser."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="where the exported model goes")
    parser.add_argument("--format", choices=tuple(SUFFIXES), help="by default that of the suffix of --output")
    parser.add_argument(
        "--part", choices=("detector", "backbone"), default="detector", help="backbone: images in, feature maps out"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=count(1),
        metavar=("HEIGHT", "WIDTH"),
        help="all images lie on canvases of this size; by default any size",
    )
    parser.add_argument("--batch", type=count(1), metavar="N", help="always so many images; by default any number")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="in which backbone and heads compute")
    parser.add_argument(
        "--masks",
        choices=("boxes", "pasted", "none"),
        default="boxes",
        help="probabilities within each box (default), truth values in the whole image, or no masks",
    )
    parser.add_argument("--aot", action="store_true", help="with pt2: compile the graph for this machine's processor")
    parser.add_argument("--image", metavar="FILE", help="to compare with; by default a picture of nuclei")
    parser.add_argument("--no-check", action="store_true", help="do not compare the file with the model")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; the format is known then."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_opts(parser, args.opts)
    if args.format is None:
        known = [name for name, suffix in SUFFIXES.items() if args.output.endswith(suffix)]
        if not known:
            parser.error(f"--output {args.output}: its suffix is none of {', '.join(SUFFIXES.values())}")
        (args.format,) = known
    elif not args.output.endswith(SUFFIXES[args.format]):
        parser.error(f"--output {args.output}: a file of --format {args.format} ends with {SUFFIXES[args.format]}")
    if args.aot and args.format != "pt2":
        parser.error(f"--aot goes with --format pt2, not with {args.format}")
    if args.no_check and args.image:
        parser.error("--image is for the comparison, which --no-check leaves out")
    return args

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Finds objects in all images of a folder with Ray Data, on one machine or on a cluster, and writes Parquet or JSON.

    pip install "ray[data]"
    python examples/ray_predict.py --model faster_rcnn_R_50_FPN_1x_mdconv_c3-c5 --input photos/ --output found/
    python examples/ray_predict.py --model config.yaml --weights model_final.pth --input s3://bucket/photos \
        --output s3://bucket/found --workers 16 --gpus 1

Each worker is a process with a model of its own. Every image becomes a row: its path, and the columns that
`dcn_d2.batch.DetectorActor` makes of it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a row of the zoo, or a config file")
    parser.add_argument("--weights", help="default: the published ones of a row of the zoo, else those in the config")
    parser.add_argument("--input", required=True, nargs="+", help="folders or files, of any storage that Ray reads")
    parser.add_argument("--output", required=True, help="folder that the files are written to")
    parser.add_argument("--format", default="parquet", choices=["parquet", "json"])
    parser.add_argument("--workers", type=int, default=2, help="processes, in the whole cluster")
    parser.add_argument("--cpus", type=float, default=1, help="processors for each worker")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each worker")
    parser.add_argument("--batch-size", type=int, default=16, help="images that a worker is given at once")
    parser.add_argument("--score-threshold", type=float, default=0.05)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")
    return parser.parse_args(arguments)


def find_objects(args: argparse.Namespace) -> Any:
    """Gives the data set with the detections; Ray computes it when it is used."""
    try:
        import ray.data
    except ImportError as error:
        sys.exit(f"ray_predict.py: Ray Data is not installed: pip install 'ray[data]' ({error})")
    from dcn_d2.batch import DetectorActor

    # Files and not ray.data.read_images, so that images are read as in training, and unreadable ones end nothing.
    images = ray.data.read_binary_files(args.input, include_paths=True)
    return images.map_batches(
        DetectorActor,
        fn_constructor_args=(args.model, args.weights),
        fn_constructor_kwargs={"opts": args.opts, "score_threshold": args.score_threshold},
        batch_format="pyarrow",
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the script."""
    args = parse_arguments(arguments)
    found = find_objects(args)
    (found.write_parquet if args.format == "parquet" else found.write_json)(args.output)


if __name__ == "__main__":
    main()

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Memory of predict.py while it predicts thousands of images of many sizes: it must not grow with their number.

    python -m benchmarks.predict_memory               2,000 small images, a slim Faster R-CNN with random weights
    python -m benchmarks.predict_memory --images 10000 --options --pictures

The command runs as a user runs it. Its memory is what Linux calls VmRSS, read about ten times a second from outside:
after the first images are done, which is the start, and from then on to the end, the writing of detections.json
included. The exit status is 1 if it grew by more than the goal.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a run by the file's name, without -m

from dcn_d2.quiet import silence_detectron2_warnings

silence_detectron2_warnings()

import numpy as np
from PIL import Image

from benchmarks.origin import PROJECT
from benchmarks.results import Results

GOAL_MB = 200
FIRST = 100  # images, after which the memory at the start is read
CONFIG = PROJECT / "examples" / "nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"


def make_images(folder: Path, number: int, least: int = 48, most: int = 200) -> None:
    """Writes images of noise, each of another size."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(number):
        height, width = random.integers(least, most, 2)
        pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.jpg")


def make_weights(path: Path) -> None:
    """Writes random weights for the model of `CONFIG`."""
    import torch
    from detectron2.modeling import build_model

    from dcn_d2.engine import load_config

    torch.manual_seed(0)
    torch.save({"model": build_model(load_config(str(CONFIG), ["MODEL.DEVICE", "cpu"])).state_dict()}, path)


def resident_mb(process: int) -> float:
    """The memory of a process in MB; 0 if it has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def count_lines(file: Path) -> int:
    """The lines of a file that is being written; 0 if it does not exist yet."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def watch(model: Sequence[str], images: Path, output: Path, first: int = FIRST) -> dict[str, Any]:
    """Runs predict.py and reads its memory.

    Args:
        model: the arguments that choose the model, and others.
        images: a folder.
        output: a folder for the results, which does not exist yet.
        first: so many images are done at the start.

    Returns:
        How many images there were, and megabytes: at the start, at most after it, and by how much that is more.
    """
    command = [sys.executable, str(PROJECT / "predict.py"), "--input", str(images), "--output", str(output), *model]
    part = output / "parts" / "1-of-1" / "images.jsonl"
    done, start, most = 0, 0.0, 0.0
    process = subprocess.Popen(command, cwd=PROJECT)
    try:
        while process.poll() is None:
            done = count_lines(part)
            memory = resident_mb(process.pid)
            if done >= first:
                start = start or memory
                most = max(most, memory)
            time.sleep(0.1)
    finally:
        process.kill()
    if process.wait() or not start:
        raise RuntimeError(f"predict.py ended with {process.returncode} after {done} images")
    return {
        "images": count_lines(part),
        "start_mb": round(start),
        "most_mb": round(most),
        "grown_mb": round(most - start),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark, and gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, metavar="N")
    parser.add_argument("--output", type=Path, help="default: results/predict_memory_cpu.json")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further arguments of predict.py")
    args = parser.parse_args(arguments)
    results = Results(args.output, "predict_memory", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder / "images", args.images)
        make_weights(folder / "model.pth")
        model = ["--config-file", str(CONFIG), "--weights", str(folder / "model.pth"), *args.options]
        model += ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64"]
        row = watch(model, folder / "images", folder / "output")
    row |= {"options": args.options, "goal_mb": GOAL_MB, "met": row["grown_mb"] <= GOAL_MB}
    results.add(
        row, {}, lambda row: f"{row['images']} images: {row['start_mb']} MB, then {row['grown_mb']:+d} MB at most"
    )
    return max(results.finish(), int(not row["met"]))


if __name__ == "__main__":
    sys.exit(main())

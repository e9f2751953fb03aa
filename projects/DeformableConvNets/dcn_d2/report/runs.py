# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""OUTPUT_DIR/runs.json: what a report needs and no other file of a run holds.

It lists each start of the training (a run that was resumed has several) and each evaluation without training, with
times, versions and memory, and says where the annotations and images of the data sets are.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..files import is_local, write_atomically

FILE = "runs.json"
Entry = dict[str, Any]


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Gives what runs.json holds; {} where it is missing or damaged."""
    try:
        record = json.loads(Path(folder, FILE).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_runs(folder: str | os.PathLike[str]) -> list[Entry]:
    """Gives the starts of training and the evaluations, the first one first."""
    runs = read_record(folder).get("runs")
    return [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []


def begin_run(cfg: CfgNode, start: int) -> None:
    """Notes that training starts.

    Args:
        cfg: of the run.
        start: the first iteration.
    """
    entry = {"start": start, "max_iter": cfg.SOLVER.MAX_ITER, "status": "training", **_circumstances(cfg)}
    _write(cfg, lambda runs: [*runs, entry])


def end_run(cfg: CfgNode, end: int, status: str) -> None:
    """Notes that the training that `begin_run` has noted has ended.

    Args:
        cfg: of the run.
        end: the number of iterations that are done.
        status: "finished", "stopped early" (by TEST.PATIENCE), "stopped" (by a signal) or "failed".
    """
    now = time.time()

    def change(runs: list[Entry]) -> list[Entry]:
        if not runs or runs[-1].get("status") != "training":
            return runs
        values = {"end": end, "status": status, "seconds": now - runs[-1]["began"], "memory": peak_memory()}
        return [*runs[:-1], runs[-1] | values]

    _write(cfg, change)


def record_evaluation(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Notes the results of an evaluation without training."""
    if not comm.is_main_process():
        return
    entry = {"status": "evaluated", "weights": cfg.MODEL.WEIGHTS, "results": results, **_circumstances(cfg)}
    _write(cfg, lambda runs: [*runs, entry])


def _write(cfg: CfgNode, change: Any) -> None:
    if not is_local(cfg.OUTPUT_DIR):
        return
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    known = read_record(cfg.OUTPUT_DIR).get("data_sets")
    data_sets = (known if isinstance(known, dict) else {}) | {name: describe_data_set(name) for name in sorted(names)}
    record = {"runs": change(read_runs(cfg.OUTPUT_DIR)), "data_sets": data_sets}
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    text = json.dumps(record, indent=1, default=str).encode()
    with write_atomically(Path(cfg.OUTPUT_DIR, FILE)) as file:
        file.write(text)


def _circumstances(cfg: CfgNode) -> Entry:
    return {
        "began": time.time(),
        "processes": comm.get_world_size(),
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "device": cfg.MODEL.DEVICE,
        "train": list(cfg.DATASETS.TRAIN),
        "test": list(cfg.DATASETS.TEST),
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    from .. import info

    return info.describe()


def describe_data_set(name: str) -> Entry:
    """Says what kind a data set is, and where its annotations and images are."""
    if name not in DatasetCatalog:
        return {}
    metadata = MetadataCatalog.get(name)
    found: Entry = {"evaluator": metadata.get("evaluator_type", None)}
    for key, field in (("annotations", "json_file"), ("images", "image_root")):
        if path := metadata.get(field, None):
            found[key] = os.path.abspath(PathManager.get_local_path(path))
    return found


def peak_memory() -> Entry:
    """The most memory that this process has used so far, in bytes, by device."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.max_memory_allocated()
    return found

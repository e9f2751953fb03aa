#!/usr/bin/env python3
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Sets every key of a config to wrong, odd and huge values, and looks at what happens.

A value comes through one of three doors: set in code, KEY VALUE of a command line, or a YAML file. It must be refused
with a `ConfigError` that names key and value, or it must work: a narrow model is built with it and trained for a step,
and an image resized. Everything else is a fault: another exception, a message without the key, a value that was taken
and fails later. A run is repeated by its seed.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from dcn_d2 import model_zoo
from dcn_d2.config import ConfigError, check_config, load_config
from dcn_d2.config.access import keys_of, value_of
from dcn_d2.config.messages import shorten
from dcn_d2.config.table import RULES
from dcn_d2.data.transforms import build_augmentation
from dcn_d2.engine import DCNTrainer

DOORS = ("code", "option", "file")
NARROW = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "16", "MODEL.FPN.OUT_CHANNELS", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.DCN.POOLER_FC_DIM", "32"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "2"),
    *("MODEL.RETINANET.NUM_CLASSES", "2", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
]
KEYPOINTS = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "2"]
RETINANET = [
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_dcn_retinanet_resnet_fpn_backbone"),
    *("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"),
]
# Keys that do not work on this machine, or that name something outside the config.
NOT_USED = ("MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR", "DATASETS.", "PUBLISHED.", "MODEL.LOAD_PROPOSALS", "VERSION")

WORDS = ["", " ", "no", "None", "nan", "auto ", "\0", "ä", "a" * 5000, "../x", "[1", "(1,", "{", "1e400"]
NUMBERS = [0, 1, 2, 3, 7, -1, -2, 2**31, 10**30, -(10**30), 65537]
FRACTIONS = [0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-30, 1e30, -1e30, math.nan, math.inf, -math.inf]
LISTS: list[Any] = [
    [],
    (),
    [[]],
    [None],
    ["a"],
    [0],
    [-1],
    [math.nan],
    [True] * 3,
    [1, "a"],
    [[1], 2],
    list(range(100)),
]
OTHERS: list[Any] = [None, True, False, {}, {"A": 1}]


class Case(NamedTuple):
    """One value of one key through one door."""

    door: str
    key: str
    value: Any


class Result(NamedTuple):
    """The result of a case: "refused", "worked", "taken" (nothing here can use it), "not finite" or "FAULT"."""

    outcome: str
    message: str = ""


def arguments_of(key: str) -> tuple[str, list[str]]:
    """Gives the row of the zoo, and the changes to it, that make a narrow model which reads `key`."""
    if key.startswith("MODEL.RETINANET."):
        return "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", NARROW + RETINANET
    if key.startswith("MODEL.ROI_KEYPOINT_HEAD."):
        return "faster_rcnn_R_50_FPN_1x_mdpool", NARROW + KEYPOINTS
    if "POOLER" in key:
        return "faster_rcnn_R_50_FPN_1x_mdpool", NARROW
    return "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5", NARROW


def odd_values(default: Any, rng: random.Random) -> Iterator[Any]:
    """Gives values for a key, some made from its right one."""
    yield from WORDS + NUMBERS + FRACTIONS + LISTS + OTHERS
    if isinstance(default, str) and default:
        place = rng.randrange(len(default))
        yield from (default.lower(), default.upper(), default + "x", default[:place] + default[place + 1 :], [default])
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        yield from (-default, default * 10**9, str(default), [default], default + 0.5)
    if isinstance(default, (list, tuple)):
        values = list(default)
        yield from (
            values[:-1],
            values + values[-1:],
            [values],
            values[::-1],
            str(values)[:-1],
            {"A": values},
        )
        others: list[Any] = ["a", None, math.nan, -1, [], True]
        yield from ([other, *values[1:]] for other in others)


def all_cases(seed: int) -> list[Case]:
    """Gives every case, in an order that depends on the seed."""
    rng = random.Random(seed)
    cases = []
    for key in RULES:
        row, changes = arguments_of(key)
        default = value_of(_base(row, tuple(changes)), key)
        for value in odd_values(default, rng):
            # A file of version 1 would need the keys of that version.
            cases += [Case(door, key, value) for door in DOORS if (door, key, value) != ("file", "VERSION", 1)]
    rng.shuffle(cases)
    return cases


_BASES: dict[tuple[str, tuple[str, ...]], CfgNode] = {}


def _base(row: str, changes: tuple[str, ...]) -> CfgNode:
    if (row, changes) not in _BASES:
        _BASES[row, changes] = load_config(model_zoo.get_config_file(row), changes)
    return _BASES[row, changes].clone()


def through_door(case: Case, folder: Path) -> CfgNode:
    """Sets the key, and checks the config as training does."""
    row, changes = arguments_of(case.key)
    if case.door == "code":
        cfg = _base(row, tuple(changes))
        *nodes, last = case.key.split(".")
        node = cfg
        for name in nodes:
            node = node[name]
        dict.__setitem__(node, last, case.value)
    elif case.door == "option":
        text = case.value if isinstance(case.value, str) else repr(case.value)
        cfg = load_config(model_zoo.get_config_file(row), [*changes, case.key, text])
    else:
        content: Any = case.value
        for name in reversed(case.key.split(".")):
            content = {name: content}
        file = folder / "config.yaml"
        changed = _base(row, tuple(changes))
        (folder / "base.yaml").write_text(changed.dump())
        file.write_text("_BASE_: base.yaml\n" + yaml.safe_dump(content, allow_unicode=True))
        cfg = load_config(str(file))
    check_config(cfg)
    return cfg


def use(cfg: CfgNode) -> float:
    """Builds what the config describes, trains one step and resizes an image; gives the loss."""
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = DCNTrainer.build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    height, width = 96, 128
    truth = Instances((height, width))
    truth.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [50, 20, 100, 90]]))
    truth.gt_classes = torch.tensor([0, 1]).clamp(max=min(cfg.MODEL.ROI_HEADS.NUM_CLASSES, 2) - 1)
    truth.gt_masks = BitMasks(torch.ones(2, height, width, dtype=torch.bool))
    keypoints = torch.full((2, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3), 2.0)
    keypoints[..., :2] = 55
    truth.gt_keypoints = Keypoints(keypoints)
    image = torch.rand(len(cfg.MODEL.PIXEL_MEAN), height, width) * 255
    with EventStorage():
        losses = model([{"image": image, "instances": truth}])
    loss = sum(losses.values())
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss.backward()
        optimizer.step()
        scheduler.step()
    picture = np.zeros((40, 60, 3), dtype=np.uint8)
    for is_train in (True, False):
        AugmentationList(build_augmentation(cfg, is_train))(AugInput(picture))
    return float(loss)


def run_case(case: Case, folder: Path, used: dict[tuple[str, str], Result] | None) -> Result:
    """Tries a case. `used` remembers what worked; with None the model is not built."""
    try:
        cfg = through_door(case, folder)
    except ConfigError as error:
        return _judge_message(case, str(error))
    except Exception as error:  # of any kind: the campaign looks for them
        return Result("FAULT", f"{type(error).__name__} instead of ConfigError: {error}")
    if used is None or case.key.startswith(NOT_USED):
        return Result("taken")
    known = (case.key, repr(value_of(cfg, case.key)))
    if known not in used:
        try:
            loss = use(cfg)
            used[known] = Result("worked" if math.isfinite(loss) else "not finite", f"loss {loss}")
        except Exception as error:
            used[known] = Result("FAULT", f"accepted, then {type(error).__name__}: {error}")
    return used[known]


def _judge_message(case: Case, message: str) -> Result:
    if case.key.rpartition(".")[2] not in message:
        return Result("FAULT", f"the message does not name the key: {message}")
    if len(message) > 2000:
        return Result("FAULT", f"a message of {len(message)} characters")
    by_itself = RULES[case.key](case.value) is not None
    if case.door == "code" and by_itself and f"got {shorten(case.value)}" not in message:
        return Result("FAULT", f"the message does not give the value: {message}")
    return Result("refused", message)


def run(seed: int, count: int, try_out: bool, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs `count` cases (0: all) and gives a summary."""
    start = time.monotonic()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    cases = all_cases(seed)
    chosen = cases[: count or None]
    outcomes: collections.Counter[str] = collections.Counter()
    faults = []
    used: dict[tuple[str, str], Result] | None = {} if try_out else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            for case in chosen:
                result = run_case(case, Path(folder), used)
                outcomes[result.outcome] += 1
                if result.outcome == "FAULT":
                    faults.append({"door": case.door, "key": case.key, "value": repr(case.value)[:200]})
                    faults[-1]["message"] = result.message[:1000]
                    report(f"{case.door} {case.key} {repr(case.value)[:80]}: {result.message[:300]}")
    finally:
        logging.disable(logging.NOTSET)
    return {
        "campaign": "configs",
        "seed": seed,
        "cases": len(chosen),
        "of": len(cases),
        "keys": len({case.key for case in chosen}),
        "outcomes": dict(outcomes),
        "faults": faults,
        "seconds": round(time.monotonic() - start, 1),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; 1 if there are faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="makes order and typos; repeats a run")
    parser.add_argument("--cases", type=int, default=3000, metavar="N", help="how many; 0 is all, some 30000")
    parser.add_argument("--check-only", action="store_true", help="do not try out what is accepted")
    parser.add_argument("--output", metavar="FILE", help="where to write the summary, as JSON")
    args = parser.parse_args(argv)
    unknown = set(RULES) - set(keys_of(_base(*_hashable(arguments_of("")))))
    if unknown:
        sys.exit(f"configs.py: the table has keys that no config has: {', '.join(sorted(unknown))}")
    summary = run(args.seed, args.cases, not args.check_only)
    if args.output:
        Path(args.output).write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{summary['cases']} cases with seed {args.seed}: {summary['outcomes']}, {summary['seconds']} s")
    return 1 if summary["faults"] else 0


def _hashable(arguments: tuple[str, list[str]]) -> tuple[str, tuple[str, ...]]:
    return arguments[0], tuple(arguments[1])


if __name__ == "__main__":
    sys.exit(main())

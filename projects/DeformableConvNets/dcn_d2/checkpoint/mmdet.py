# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Names of MMDetection's two-stage detectors <-> names of Detectron2's. Needs neither torch nor Detectron2.

Values are anything with a shape that can be indexed along its first dimension: torch tensors, numpy arrays. Neither
layout asks for a transposition: classes, box deltas, anchors and flattened features have the same order in both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from . import names

_NO_COUNTERPART = f"{names.PREPROCESSOR}|{names.CONSTANTS}"
_STATISTICS = ("weight", "bias", "running_mean", "running_var")

_V1_HEADS = ("bbox_head.", "mask_head.", "bbox_roi_extractor.", "mask_roi_extractor.")
_MMDET_PREFIXES = ("backbone.conv1.", "backbone.layer", "neck.", "rpn_head.", "roi_head.", *_V1_HEADS)


# What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")


def unwrap_name(name: str) -> str:
    """Takes off what wrappers other than DistributedDataParallel put into a name: `a._orig_mod.b` becomes `a.b`."""
    return _WRAPPERS.sub("", name)


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Takes off what training puts around a state dict and its names.

    That is {"state_dict": …} or {"model": …} around it, and in the names "module." and what `unwrap_name` takes off.

    Raises:
        ValueError: A name is not text, or two are the same without wrappers.
    """
    for _ in range(100):  # a dictionary may contain itself
        wrapped = [key for key in ("state_dict", "model") if isinstance(checkpoint.get(key), Mapping)]
        if not wrapped:
            break
        checkpoint = checkpoint[wrapped[0]]
    else:
        raise ValueError(f"{wrapped[0]!r} contains itself")
    for name in checkpoint:
        if not isinstance(name, str):
            raise ValueError(
                f"an entry is called {str(name)[:100]!r}, which is of type {type(name).__name__}, not text"
            )
    while True:
        unwrapped = {name: unwrap_name(name) for name in checkpoint}
        if unwrapped and all(name.startswith("module.") for name in unwrapped.values()):
            unwrapped = {name: short.removeprefix("module.") for name, short in unwrapped.items()}
        if all(name == short for name, short in unwrapped.items()):
            return checkpoint
        if len(set(unwrapped.values())) < len(unwrapped):
            twice = [name for name, short in unwrapped.items() if name != short and short in checkpoint]
            raise ValueError(f"without the names of wrappers, {', '.join(twice) or 'entries'} are there twice")
        checkpoint = {short: checkpoint[name] for name, short in unwrapped.items()}


def is_mmdet_detector(state_dict: Mapping[str, Any]) -> bool:
    """Tells by its names whether a checkpoint, wrapped or not, is that of a detector of MMDetection."""
    return any(name.startswith(_MMDET_PREFIXES) for name in unwrap_state_dict(state_dict))


def has_v1_layout(state_dict: Mapping[str, Any]) -> bool:
    """Tells by its names whether a checkpoint, wrapped or not, is that of a two-stage detector of MMDetection 1.x.

    Version 2 put the heads below "roi_head." and moved the background from the first class to the last.
    """
    weights = unwrap_state_dict(state_dict)

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in weights)

    return has("rpn_head.") and has("bbox_head.", "mask_head.") and not has("roi_head.")


def convert_mmdet_state_dict(
    state_dict: Mapping[str, Any], *, keep_num_batches_tracked: bool = False
) -> dict[str, Any]:
    """Renames the entries of a two-stage detector of MMDetection, of any version, to those of Detectron2.

    The classes of 1.x are reordered. What training leaves in a checkpoint is ignored: wrappers, optimizer, averaged
    copies, counters, buffers of the preprocessor. The values are shared, not copied.

    Args:
        state_dict: a state dict, or a checkpoint around one.
        keep_num_batches_tracked: keeps the counters of BatchNorm, which neither evaluation nor the zoo's rows use.

    Raises:
        ValueError: Names are unknown, two give the same name, or a norm lacks its statistics; all are listed.
    """
    weights = unwrap_state_dict(state_dict)
    averaged = {"ema_" + name.replace(".", "_") for name in weights}  # as the EMA hook of MMCV 1.x names its copies
    weights = {
        name: value
        for name, value in weights.items()
        if name not in averaged and (keep_num_batches_tracked or not name.endswith(".num_batches_tracked"))
    }
    if has_v1_layout(weights):
        weights = {f"roi_head.{name}" if name.startswith(_V1_HEADS) else name: v for name, v in weights.items()}
        background_first = _background_first(weights, otherwise=True)
    else:
        background_first = _background_first(weights, otherwise=False)
    if background_first:
        weights = _background_last(weights)
    return names.rename(weights, names.DETECTOR, "of MMDetection", _NO_COUNTERPART, _find_missing(weights))


def to_mmdet(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the entries of a detector of the zoo, as Detectron2 names them, to those of MMDetection 2.x and 3.x.

    The inverse of `convert_mmdet_state_dict`.

    Args:
        state_dict: a state dict, or a checkpoint around one.

    Raises:
        ValueError: Names are unknown, or a norm lacks its statistics; all are listed.
    """
    weights, rules = unwrap_state_dict(state_dict), names.backwards(names.DETECTOR)
    whose = "of a detector with the names of Detectron2"
    return names.rename(weights, rules, whose, _NO_COUNTERPART, _find_missing(weights))


def _find_missing(weights: Mapping[str, Any]) -> list[str]:
    """Lists the statistics that norms lack, which Detectron2's FrozenBatchNorm2d would silently make up."""
    problems = []
    for name in weights:
        norm, _, parameter = name.rpartition(".")
        if parameter == "running_mean" or re.search(r"(\.norm|\.bn\d?|\.downsample\.1)$", norm):
            lacking = [key for key in _STATISTICS if f"{norm}.{key}" not in weights]
            problems += [f"{names.shown(norm)}.{key} is missing" for key in lacking]
    return problems


_CLS, _REG, _MASK = ".fc_cls.weight", ".fc_reg.weight", ".conv_logits.weight"


def _classes_with_background(weights: Mapping[str, Any]) -> int:
    """Number of rows of the classifiers, 0 if there are none."""
    return max((value.shape[0] for name, value in weights.items() if name.endswith(_CLS)), default=0)


def _background_first(weights: Mapping[str, Any], otherwise: bool) -> bool:
    """Tells whether class 0 is the background, as in 1.x, which has boxes and masks for the background too.

    Heads that all classes share have the same shapes in all versions. If there are no others, the result is
    `otherwise`.
    """
    classes = _classes_with_background(weights)
    said: dict[bool, list[str]] = {True: [], False: []}
    for name, value in weights.items():
        for end, rows in ((_REG, 4), (_MASK, 1)):
            if name.endswith(end) and value.shape[0] != rows:  # not shared by all classes
                for first, expected in ((True, rows * classes), (False, rows * (classes - 1))):
                    if value.shape[0] == expected:
                        said[first].append(f"{name} {list(value.shape)}")
    if said[True] and said[False]:
        raise ValueError(
            f"with {classes} classes, background included, {', '.join(said[True])} have a row for the background, but "
            f"{', '.join(said[False])} have none"
        )
    return bool(said[True]) or (otherwise and not said[False])


def _background_last(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the background from the first class to the last, and drops its boxes and masks."""
    classes = _classes_with_background(weights)
    changed = dict(weights)
    for name, value in weights.items():
        stem = name.rpartition(".")[0] + ".weight"
        if stem.endswith(_CLS):
            changed[name] = value[[*range(1, value.shape[0]), 0]]
        elif stem.endswith(_REG) and value.shape[0] == 4 * classes:
            changed[name] = value[4:]
        elif stem.endswith(_MASK) and value.shape[0] == classes > 1:
            changed[name] = value[1:]
    return changed

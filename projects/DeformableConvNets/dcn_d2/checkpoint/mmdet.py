# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Names of MMDetection's two-stage detectors <-> names of Detectron2's. Needs neither torch nor Detectron2.

Values are anything with a shape that can be indexed along its first dimension: torch tensors, numpy arrays. Neither
layout asks for a transposition: classes, box deltas, anchors and flattened features have the same order in both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

# MMDetection 2.x and 3.x -> Detectron2. `*` stands for the parameter, {x} for a number, {x+1} for the same number plus
# 1, and {x.} for a number and a dot or for nothing at all: a cascade numbers its heads.
_RULES = (
    ("backbone.conv1.*", "backbone.bottom_up.stem.conv1.*"),
    ("backbone.bn1.*", "backbone.bottom_up.stem.conv1.norm.*"),
    ("backbone.layer{s}.{b}.conv2.conv_offset.*", "backbone.bottom_up.res{s+1}.{b}.conv2_offset.*"),
    # The name until early 2020. The way back takes the first rule that fits, so it gives the newer one.
    ("backbone.layer{s}.{b}.conv2_offset.*", "backbone.bottom_up.res{s+1}.{b}.conv2_offset.*"),
    ("backbone.layer{s}.{b}.conv{k}.*", "backbone.bottom_up.res{s+1}.{b}.conv{k}.*"),
    ("backbone.layer{s}.{b}.bn{k}.*", "backbone.bottom_up.res{s+1}.{b}.conv{k}.norm.*"),
    ("backbone.layer{s}.{b}.downsample.0.*", "backbone.bottom_up.res{s+1}.{b}.shortcut.*"),
    ("backbone.layer{s}.{b}.downsample.1.*", "backbone.bottom_up.res{s+1}.{b}.shortcut.norm.*"),
    ("neck.lateral_convs.{i}.conv.*", "backbone.fpn_lateral{i+2}.*"),
    ("neck.lateral_convs.{i}.bn.*", "backbone.fpn_lateral{i+2}.norm.*"),
    ("neck.fpn_convs.{i}.conv.*", "backbone.fpn_output{i+2}.*"),
    ("neck.fpn_convs.{i}.bn.*", "backbone.fpn_output{i+2}.norm.*"),
    ("rpn_head.rpn_conv.*", "proposal_generator.rpn_head.conv.*"),
    ("rpn_head.rpn_cls.*", "proposal_generator.rpn_head.objectness_logits.*"),
    ("rpn_head.rpn_reg.*", "proposal_generator.rpn_head.anchor_deltas.*"),
    (
        "roi_head.bbox_roi_extractor.roi_layers.{l}.offset_fc.{i}.*",
        "roi_heads.box_pooler.level_poolers.{l}.offset_fc.{i}.*",
    ),
    (
        "roi_head.bbox_roi_extractor.roi_layers.{l}.mask_fc.{i}.*",
        "roi_heads.box_pooler.level_poolers.{l}.mask_fc.{i}.*",
    ),
    ("roi_head.bbox_head.{s.}shared_fcs.{i}.*", "roi_heads.box_head.{s.}fc{i+1}.*"),
    ("roi_head.bbox_head.{s.}fc_cls.*", "roi_heads.box_predictor.{s.}cls_score.*"),
    ("roi_head.bbox_head.{s.}fc_reg.*", "roi_heads.box_predictor.{s.}bbox_pred.*"),
    ("roi_head.mask_head.{s.}convs.{i}.conv.*", "roi_heads.mask_head.{s.}mask_fcn{i+1}.*"),
    ("roi_head.mask_head.{s.}convs.{i}.bn.*", "roi_heads.mask_head.{s.}mask_fcn{i+1}.norm.*"),
    ("roi_head.mask_head.{s.}upsample.*", "roi_heads.mask_head.{s.}deconv.*"),
    ("roi_head.mask_head.{s.}conv_logits.*", "roi_heads.mask_head.{s.}predictor.*"),
)
_PARAMETERS = "weight|bias|running_mean|running_var|num_batches_tracked"
_STATISTICS = ("bias", "running_mean", "running_var")

# Buffers that the other side makes from its config.
_CONSTANTS = re.compile(r"data_preprocessor\..*|pixel_mean|pixel_std|.*anchor_generator\.cell_anchors\.\d+")

_V1_HEADS = ("bbox_head.", "mask_head.", "bbox_roi_extractor.", "mask_roi_extractor.")
_MMDET_PREFIXES = ("backbone.conv1.", "backbone.layer", "neck.", "rpn_head.", "roi_head.", *_V1_HEADS)


# What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")


def unwrap_name(name: str) -> str:
    """Takes off what wrappers other than DistributedDataParallel put into a name: `a._orig_mod.b` is `a.b`."""
    return _WRAPPERS.sub("", name)


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Takes off what training puts around a state dict: {"state_dict": …}, {"model": …} and the prefix "module.".

    And what `unwrap_name` takes off.

    Raises:
        ValueError: A name is no text, or two are the same without wrappers.
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
            raise ValueError(f"an entry is called {str(name)[:100]!r}, a {type(name).__name__} and no text")
    while True:
        names = {name: unwrap_name(name) for name in checkpoint}
        if names and all(name.startswith("module.") for name in names.values()):
            names = {name: short.removeprefix("module.") for name, short in names.items()}
        if all(name == short for name, short in names.items()):
            return checkpoint
        if len(set(names.values())) < len(names):
            twice = [name for name, short in names.items() if name != short and short in checkpoint]
            raise ValueError(f"without the names of wrappers, {', '.join(twice) or 'entries'} are there twice")
        checkpoint = {short: checkpoint[name] for name, short in names.items()}


def is_mmdet_detector(state_dict: Mapping[str, Any]) -> bool:
    """Tells by its names whether a checkpoint, wrapped or not, is that of a detector of MMDetection."""
    return any(name.startswith(_MMDET_PREFIXES) for name in unwrap_state_dict(state_dict))


def has_v1_layout(state_dict: Mapping[str, Any]) -> bool:
    """Tells by its names whether a checkpoint, wrapped or not, is that of a two-stage detector of MMDetection 1.x.

    Version 2 put the heads below "roi_head." and moved the background from the first class to the last.
    """
    names = unwrap_state_dict(state_dict)

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

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
    return _rename(_background_last(weights) if background_first else weights, _RULES, "of MMDetection")


def to_mmdet(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Renames the entries of a detector of the zoo, as Detectron2 names them, to those of MMDetection 2.x and 3.x.

    The inverse of `convert_mmdet_state_dict`.

    Args:
        state_dict: a state dict, or a checkpoint around one.

    Raises:
        ValueError: Names are unknown, or a norm lacks its statistics; all are listed.
    """
    backwards = [(theirs, mine) for mine, theirs in _RULES]
    return _rename(unwrap_state_dict(state_dict), backwards, "of a detector with the names of Detectron2")


def _rename(weights: Mapping[str, Any], rules: Iterable[tuple[str, str]], whose: str) -> dict[str, Any]:
    sources: dict[str, str] = {}
    problems = []
    for name, value in weights.items():
        if _CONSTANTS.fullmatch(name):
            continue
        new_name = next((new for rule in rules if (new := _apply(rule, name))), None)
        if new_name is None:
            problems.append(f"{name} is unknown")
        elif new_name in sources:
            problems.append(f"{sources[new_name]} and {name} both become {new_name}")
        elif not hasattr(value, "shape"):
            problems.append(f"{name} is no tensor but a {type(value).__name__}")
        else:
            sources[new_name] = name
    # Detectron2's FrozenBatchNorm2d fills in for missing statistics without a word.
    for name in weights:
        stem, _, parameter = name.rpartition(".")
        if parameter == "running_mean" or re.search(r"(\.norm|\.bn\d?|\.downsample\.1)$", stem):
            lacking = [key for key in ("weight", *_STATISTICS) if f"{stem}.{key}" not in weights]
            problems += [f"{stem}.{key} is missing" for key in lacking]
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise ValueError(f"these are not the weights {whose}, or not of a model that dcn_d2 knows:\n  {listed}")
    return {new_name: weights[name] for new_name, name in sources.items()}


_FIELD = re.compile(r"\*|\{(?P<letter>\w)(?P<kind>\.|\+\d+)?\}")


def _apply(rule: tuple[str, str], name: str) -> str | None:
    """The new name if the rule's left side is that of `name`, else None."""
    source, target = rule
    pattern, shifts = _compile(source)
    if not (match := pattern.fullmatch(name)):
        return None
    numbers = {
        letter: None if digits is None else int(digits) - shifts[letter]
        for letter, digits in match.groupdict().items()
        if letter != "parameter"
    }
    if any(number is not None and number < 0 for number in numbers.values()):
        return None

    def fill(field: re.Match[str]) -> str:
        if field[0] == "*":
            return match["parameter"]
        number = numbers[field["letter"]]
        if number is None:
            return ""
        return f"{number}." if field["kind"] == "." else str(number + int(field["kind"] or 0))

    return _FIELD.sub(fill, target)


@functools.cache
def _compile(template: str) -> tuple[re.Pattern[str], dict[str, int]]:
    """Regular expression of a side of a rule, and what has to be subtracted from each of its numbers."""
    pattern, position, shifts = "", 0, {}
    for field in _FIELD.finditer(template):
        pattern += re.escape(template[position : field.start()])
        position = field.end()
        letter, kind = field["letter"], field["kind"]
        if field[0] == "*":
            pattern += rf"(?P<parameter>{_PARAMETERS})"
        else:
            pattern += rf"(?:(?P<{letter}>\d+)\.)?" if kind == "." else rf"(?P<{letter}>\d+)"
            shifts[letter] = 0 if kind == "." else int(kind or 0)
    return re.compile(pattern + re.escape(template[position:])), shifts


_CLS, _REG, _MASK = ".fc_cls.weight", ".fc_reg.weight", ".conv_logits.weight"


def _classes_with_background(weights: Mapping[str, Any]) -> int:
    """Number of rows of the classifiers, 0 if there are none."""
    return max((value.shape[0] for name, value in weights.items() if name.endswith(_CLS)), default=0)


def _background_first(weights: Mapping[str, Any], otherwise: bool) -> bool:
    """Tells whether class 0 is the background: in 1.x there are boxes and masks for the background too.

    Heads that are shared by all classes have the same shapes in both; then it is `otherwise`.
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

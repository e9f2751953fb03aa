# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The table of names: what MMDetection and torchvision call an entry, and what Detectron2 calls it.

Needs neither torch nor Detectron2. Each rule is a pair of patterns, and is read in both directions:

    *       weight, bias, running_mean, running_var or num_batches_tracked, the same on both sides
    {s}     a number, the same on both sides; {s+1} is that number plus 1
    {h.}    a number and a dot, or nothing: a cascade numbers its heads, other detectors have one without a number

The first rule that matches a name gives the new one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

Rule = tuple[str, str]

# A ResNet or ResNeXt alone, as torchvision and MMDetection name it. s is the stage, b the block, k the layer.
RESNET: tuple[Rule, ...] = (
    ("conv1.weight", "stem.conv1.weight"),
    ("bn1.*", "stem.conv1.norm.*"),
    ("layer{s}.{b}.conv{k}.weight", "res{s+1}.{b}.conv{k}.weight"),
    ("layer{s}.{b}.bn{k}.*", "res{s+1}.{b}.conv{k}.norm.*"),
    ("layer{s}.{b}.downsample.0.weight", "res{s+1}.{b}.shortcut.weight"),
    ("layer{s}.{b}.downsample.1.*", "res{s+1}.{b}.shortcut.norm.*"),
)

# What deformable convolution adds to it. MMDetection used the second name until early 2020; the way back takes the
# first rule that matches, so it gives the newer name.
OFFSET_BRANCHES: tuple[Rule, ...] = (
    ("layer{s}.{b}.conv2.conv_offset.*", "res{s+1}.{b}.conv2_offset.*"),
    ("layer{s}.{b}.conv2_offset.*", "res{s+1}.{b}.conv2_offset.*"),
)

# A two-stage detector of MMDetection 2.x or 3.x. i counts layers, l the levels of the feature pyramid.
DETECTOR: tuple[Rule, ...] = (
    *((f"backbone.{theirs}", f"backbone.bottom_up.{ours}") for theirs, ours in (*RESNET, *OFFSET_BRANCHES)),
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
    ("roi_head.bbox_head.{h.}shared_fcs.{i}.*", "roi_heads.box_head.{h.}fc{i+1}.*"),
    ("roi_head.bbox_head.{h.}fc_cls.*", "roi_heads.box_predictor.{h.}cls_score.*"),
    ("roi_head.bbox_head.{h.}fc_reg.*", "roi_heads.box_predictor.{h.}bbox_pred.*"),
    ("roi_head.mask_head.{h.}convs.{i}.conv.*", "roi_heads.mask_head.{h.}mask_fcn{i+1}.*"),
    ("roi_head.mask_head.{h.}convs.{i}.bn.*", "roi_heads.mask_head.{h.}mask_fcn{i+1}.norm.*"),
    ("roi_head.mask_head.{h.}upsample.*", "roi_heads.mask_head.{h.}deconv.*"),
    ("roi_head.mask_head.{h.}conv_logits.*", "roi_heads.mask_head.{h.}predictor.*"),
)

# Regular expressions of entries that have no counterpart on the other side.
CONSTANTS = r"pixel_mean|pixel_std|.*anchor_generator\.cell_anchors\.\d+"  # Detectron2 makes them from its config
PREPROCESSOR = r"data_preprocessor\..*"  # MMDetection does
COUNTERS = r".*\.num_batches_tracked"  # BatchNorm counts, and nothing reads it
CLASSIFIER = r"fc\..*"  # for the 1000 classes of ImageNet; a detector has its own

_PARAMETERS = "weight|bias|running_mean|running_var|num_batches_tracked"
_FIELD = re.compile(r"\*|\{(?P<letter>\w)(?P<kind>\.|\+\d+)?\}")
# A ResNet has four stages, and three layers in a block. Other letters are any number.
_NUMBERS = {"s": "[1-4]", "k": "[1-3]"}


def backwards(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same rules from Detectron2's names to the others."""
    return tuple((ours, theirs) for theirs, ours in rules)


def shown(name: object) -> str:
    """A name from a file as it can be shown in a message: in one line, and cut where it is long."""
    text = str(name)
    text = text if len(text) <= 120 else f"{text[:100]}…"
    return text if text.isprintable() else repr(text)[1:-1]


def rename(
    weights: Mapping[str, Any], rules: Iterable[Rule], whose: str, left_out: str, problems: Iterable[str] = ()
) -> dict[str, Any]:
    """Renames the entries of a state dict.

    Args:
        weights: the entries, which are shared and not copied.
        rules: from their names to the new ones.
        whose: names in messages what the entries have to be.
        left_out: regular expression of the names that are ignored.
        problems: sentences about what else is wrong, to be listed with the rest.

    Raises:
        ValueError: A name is unknown, two give the same name, a value is not a tensor, or there are `problems`. The
            message lists everything.
    """
    rules = tuple(rules)
    sources: dict[str, str] = {}
    found = []
    for name, value in weights.items():
        if re.fullmatch(left_out, name):
            continue
        new_name = next((new for rule in rules if (new := _apply(rule, name))), None)
        if new_name is None:
            found.append(f"{shown(name)} is unknown")
        elif new_name in sources:
            found.append(f"{shown(sources[new_name])} and {shown(name)} both become {shown(new_name)}")
        elif not hasattr(value, "shape"):
            found.append(f"{shown(name)} is of type {type(value).__name__}, not a tensor")
        else:
            sources[new_name] = name
    if listed := dict.fromkeys([*found, *problems]):
        lines = "\n  ".join(listed)
        raise ValueError(f"these are not the weights {whose}, or not of a model that dcn_d2 knows:\n  {lines}")
    return {new_name: weights[name] for new_name, name in sources.items()}


def _apply(rule: Rule, name: str) -> str | None:
    """The new name if the rule's left side matches `name`, else None."""
    source, target = rule
    pattern, shifts = _compile(source)
    if not (match := pattern.fullmatch(name)):
        return None
    numbers = {
        letter: None if digits is None else int(digits) - shifts[letter]
        for letter, digits in match.groupdict().items()
        if letter != "parameter"
    }
    for letter, number in numbers.items():
        if number is not None and not re.fullmatch(_NUMBERS.get(letter, r"\d+"), str(number)):
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

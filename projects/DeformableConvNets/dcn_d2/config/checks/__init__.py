# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks a config before anything is built from it: each value, values that must agree, and keys that nothing reads.

The builders of dcn_d2 call `check_part`, its trainer and predictor `check_config`, `load_config` the part of it
that says what is wrong.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.logger import log_first_n
from detectron2.utils.registry import Registry

from ..reader import ConfigError
from ..rules import DETECTRON2_POOLERS, RULES, channels_of, listed, nearest

Problem = tuple[str, str]  # a key, and a sentence that begins with it
Check = Callable[[CfgNode], Iterator[Problem]]

_RESNET_BUILDERS = ("build_resnet_backbone", "build_dcn_resnet_backbone")
_FPN_BUILDERS = ("build_resnet_fpn_backbone", "build_dcn_resnet_fpn_backbone")
_RETINANET_BUILDERS = ("build_retinanet_resnet_fpn_backbone", "build_dcn_retinanet_resnet_fpn_backbone")
_OUR_HEADS = ("DCNROIHeads", "DCNCascadeROIHeads")


def check_config(cfg: CfgNode, training: bool = False) -> None:
    """Raises for values that cannot work, and warns once of each key that is set but that nothing reads.

    Args:
        cfg: the config; keys of dcn_d2 that it lacks have their defaults.
        training: also ask for what only training needs.

    Raises:
        ConfigError: with key, value and what is allowed, of all that is wrong.
    """
    problems = find_problems(cfg) + [*_machine_problems(cfg)]
    if training and not problems and not cfg.DATASETS.TRAIN:
        problems = [("DATASETS.TRAIN", f"DATASETS.TRAIN is {cfg.DATASETS.TRAIN!r}: training needs a data set")]
    raise_problems(problems)
    warn_of_unread_keys(cfg)


def check_part(cfg: CfgNode, key: str, name: str) -> None:
    """What the builders of dcn_d2 call: as `check_config`, for the keys below MODEL.

    Where the config names another part, as for the backbone below an FPN of one's own, only the part is checked.

    Args:
        cfg: the config.
        key: which part is built, such as "MODEL.BACKBONE.NAME".
        name: name of the part.
    """
    if value_of(cfg, key) == name:
        raise_problems(find_problems(cfg, "MODEL.", _MODEL_CHECKS) + [*_machine_problems(cfg)])
        warn_of_unread_keys(cfg)
        return
    copy = cfg.clone()
    copy.defrost()
    copy.merge_from_list([key, name])
    raise_problems(find_problems(copy, "MODEL.", _PART_CHECKS[key]))


def find_problems(cfg: CfgNode, below: str = "", checks: Sequence[Check] | None = None) -> list[Problem]:
    """Gives all values that no part of a model can have; only if there are none, those that contradict each other.

    Args:
        cfg: the config.
        below: look only at the values of keys that begin with this.
        checks: which contradictions to look for; all by default.
    """
    problems = []
    for key, rule in RULES.items():
        if not key.startswith(below) or _is_for_others(cfg, key):
            continue
        value = value_of(cfg, key, missing := object())
        problem = None if value is missing else rule(value)
        if problem is not None:
            problems.append((key, f"{key} {problem}, got {shorten(value)}"))
    if checks is None:
        checks = (*_MODEL_CHECKS, _check_images)
    return problems or [problem for check in checks for problem in check(cfg)]


# Keys whose values a part of one's own may extend: a ResNet of another depth, another pooler, boxes with an angle.
_EXTENDED_BY = {
    "MODEL.BACKBONE.NAME": r"MODEL\.(RESNETS|FPN)\..*",
    "MODEL.PROPOSAL_GENERATOR.NAME": r"MODEL\.RPN\.BBOX_REG_LOSS_TYPE",
    "MODEL.ROI_HEADS.NAME": r"MODEL\.ROI_\w+_HEAD\.(POOLER_TYPE|BBOX_REG_LOSS_TYPE|NORM)",
}


def _is_for_others(cfg: CfgNode, key: str) -> bool:
    """Whether a part that is neither dcn_d2's nor Detectron2's reads the key: it knows what the value may be."""
    import detectron2.modeling as modeling

    registries = (modeling.BACKBONE_REGISTRY, modeling.PROPOSAL_GENERATOR_REGISTRY, modeling.ROI_HEADS_REGISTRY)
    for (reader, keys), registry in zip(_EXTENDED_BY.items(), registries):
        if re.fullmatch(keys, key):
            name = value_of(cfg, reader)
            part = _part(registry, name) if isinstance(name, str) else None
            return part is not None and not _is_known(part)
    return False


def raise_problems(problems: list[Problem]) -> None:
    """Raises a `ConfigError` with all messages, if there are any."""
    messages = [message for _, message in problems]
    if len(messages) > 1:
        messages.insert(0, f"{len(messages)} values of the config are wrong:")
    if messages:
        raise ConfigError("\n  ".join(messages))


def value_of(cfg: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Gives the value of a key such as "MODEL.DEVICE", or `default` where `cfg` does not have it."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def keys_of(cfg: CfgNode, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Gives all keys that have values."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from keys_of(value, (*path, key))
        else:
            yield ".".join((*path, key))


def nearest_key(key: str, cfg: CfgNode) -> str:
    """Gives '; did you mean KEY?' for the key of `cfg` that is most like `key`, or nothing if none is."""
    known = list(keys_of(cfg))
    last = key.rpartition(".")[2]
    same_end = [other for other in known if other.rpartition(".")[2] == last]
    return nearest(key, same_end) or nearest(key, known) or (f"; did you mean {same_end[0]!r}?" if same_end else "")


def shorten(value: Any) -> str:
    """Gives the value as a message shows it."""
    try:
        shown = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a huge number"
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _machine_problems(cfg: CfgNode) -> Iterator[Problem]:
    """Finds a GPU that this machine does not have; without any GPU, `fit_to_machine` takes the CPU."""
    if not isinstance(cfg.MODEL.DEVICE, str) or not cfg.MODEL.DEVICE.startswith("cuda:"):
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus <= (torch.device(cfg.MODEL.DEVICE).index or 0):
        yield "MODEL.DEVICE", f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but the GPUs of this machine are 0 to {gpus - 1}"


# What follows may take for granted that each value by itself is right.


def _part(registry: Registry, name: str) -> Any:
    return registry.get(name) if name in registry else None


def _meta_architecture(cfg: CfgNode) -> Any:
    from detectron2.modeling import META_ARCH_REGISTRY

    return _part(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE)


def _reads_proposals(cfg: CfgNode) -> bool:
    """Whether the model has a proposal generator, as far as is known."""
    from detectron2.modeling import GeneralizedRCNN, ProposalNetwork

    architecture = _meta_architecture(cfg)
    return isinstance(architecture, type) and issubclass(architecture, (GeneralizedRCNN, ProposalNetwork))


def _reads_roi_heads(cfg: CfgNode) -> bool:
    from detectron2.modeling import GeneralizedRCNN

    architecture = _meta_architecture(cfg)
    return isinstance(architecture, type) and issubclass(architecture, GeneralizedRCNN)


def _is_retinanet(cfg: CfgNode) -> bool:
    from detectron2.modeling import RetinaNet

    architecture = _meta_architecture(cfg)
    return isinstance(architecture, type) and issubclass(architecture, RetinaNet)


def _roi_heads(cfg: CfgNode) -> Any:
    from detectron2.modeling import ROI_HEADS_REGISTRY

    return _part(ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME)


def _has_standard_heads(cfg: CfgNode) -> bool:
    from detectron2.modeling import StandardROIHeads

    heads = _roi_heads(cfg)
    return _reads_roi_heads(cfg) and isinstance(heads, type) and issubclass(heads, StandardROIHeads)


def _heads_with_poolers(cfg: CfgNode) -> list[str]:
    model = cfg.MODEL
    return [
        "ROI_BOX_HEAD",
        *(["ROI_MASK_HEAD"] if model.MASK_ON else []),
        *(["ROI_KEYPOINT_HEAD"] if model.KEYPOINT_ON else []),
    ]


def _check_names(cfg: CfgNode) -> Iterator[Problem]:
    """Names of parts must be registered."""
    import detectron2.modeling as modeling
    from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
    from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.keypoint_head import ROI_KEYPOINT_HEAD_REGISTRY
    from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY

    named = {
        "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
        "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    }
    if _reads_proposals(cfg):
        named["MODEL.PROPOSAL_GENERATOR.NAME"] = modeling.PROPOSAL_GENERATOR_REGISTRY
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals":
            named["MODEL.RPN.HEAD_NAME"] = RPN_HEAD_REGISTRY
            named["MODEL.ANCHOR_GENERATOR.NAME"] = ANCHOR_GENERATOR_REGISTRY
    if _reads_roi_heads(cfg):
        named["MODEL.ROI_HEADS.NAME"] = modeling.ROI_HEADS_REGISTRY
    if _has_standard_heads(cfg):
        registries = (ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY, ROI_KEYPOINT_HEAD_REGISTRY)
        for head, registry in zip(("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"), registries):
            if head in _heads_with_poolers(cfg):
                named[f"MODEL.{head}.NAME"] = registry
    for key, registry in named.items():
        name = value_of(cfg, key)
        if name in registry or (key == "MODEL.PROPOSAL_GENERATOR.NAME" and name == "PrecomputedProposals"):
            continue
        known = sorted(known for known, _ in registry)
        yield (
            key,
            f"{key} must be {listed(known)}{nearest(name, known)}, got {shorten(name)} (what a package of one's own "
            "adds is known once that is imported)",
        )


def _check_resnet(cfg: CfgNode) -> Iterator[Problem]:
    """Depth, widths, groups and norm of the ResNets of dcn_d2 and Detectron2."""
    if cfg.MODEL.BACKBONE.NAME not in (*_RESNET_BUILDERS, *_FPN_BUILDERS, *_RETINANET_BUILDERS):
        return
    resnets = cfg.MODEL.RESNETS
    deformed = [stage for stage, deform in enumerate(resnets.DEFORM_ON_PER_STAGE) if deform]
    if resnets.DEPTH in (18, 34):
        if deformed:
            yield (
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE={list(resnets.DEFORM_ON_PER_STAGE)} needs bottleneck blocks, which "
                f"MODEL.RESNETS.DEPTH={resnets.DEPTH} does not have; use 50, 101 or 152",
            )
        for key, needed in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
            if resnets[key] != needed:
                yield (
                    f"MODEL.RESNETS.{key}",
                    f"MODEL.RESNETS.{key} must be {needed} with DEPTH={resnets.DEPTH}, got {resnets[key]}",
                )
    groups = resnets.DEFORM_NUM_GROUPS
    if deformed and resnets.DEPTH not in (18, 34):
        channels = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2 ** deformed[0]
        if channels % groups:
            divisors = [number for number in range(1, min(channels, 64) + 1) if channels % number == 0]
            yield (
                "MODEL.RESNETS.DEFORM_NUM_GROUPS",
                f"MODEL.RESNETS.DEFORM_NUM_GROUPS must divide the {channels} channels of the 3x3 convolutions of "
                f"res{deformed[0] + 2}, such as {listed(divisors)}, got {groups}",
            )
    if resnets.NORM == "GN":
        widths = {"STEM_OUT_CHANNELS": resnets.STEM_OUT_CHANNELS, "RES2_OUT_CHANNELS": resnets.RES2_OUT_CHANNELS}
        if resnets.DEPTH not in (18, 34):
            widths["NUM_GROUPS * WIDTH_PER_GROUP"] = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP
        for key, width in widths.items():
            if width % 32:
                yield (
                    "MODEL.RESNETS.NORM",
                    f"MODEL.RESNETS.NORM is GN, which has 32 groups: MODEL.RESNETS.{key} must be a multiple of 32, got "
                    f"{width}",
                )


def _check_fpn(cfg: CfgNode) -> Iterator[Problem]:
    """The levels of the FPNs of dcn_d2 and Detectron2."""
    if cfg.MODEL.BACKBONE.NAME not in (*_FPN_BUILDERS, *_RETINANET_BUILDERS):
        return
    key, fpn, given = "MODEL.FPN.IN_FEATURES", cfg.MODEL.FPN, list(cfg.MODEL.RESNETS.OUT_FEATURES)
    levels = list(fpn.IN_FEATURES)
    missing = [level for level in levels if level not in given]
    if missing:
        yield key, f"{key} has {listed(missing)}, but MODEL.RESNETS.OUT_FEATURES has only {listed(given)}"
    elif levels not in [["res2", "res3", "res4", "res5"][start:] for start in range(4)]:
        yield key, f"{key} must be stages that follow each other, from res2, res3, res4 or res5 to res5, got {levels}"
    elif cfg.MODEL.RESNETS.RES5_DILATION != 1 and len(levels) > 1:
        yield (
            "MODEL.RESNETS.RES5_DILATION",
            "MODEL.RESNETS.RES5_DILATION must be 1 below an FPN, whose levels halve from one to the next, "
            f"got {cfg.MODEL.RESNETS.RES5_DILATION}",
        )
    if fpn.NORM == "GN" and fpn.OUT_CHANNELS % 32:
        yield (
            "MODEL.FPN.NORM",
            "MODEL.FPN.NORM is GN, which has 32 groups: MODEL.FPN.OUT_CHANNELS must be a multiple of 32, got "
            f"{fpn.OUT_CHANNELS}",
        )


def _features(cfg: CfgNode) -> list[str] | None:
    """Names of the feature maps that the backbone gives, or None for one that is not known here."""
    name = cfg.MODEL.BACKBONE.NAME
    if name in _RESNET_BUILDERS:
        return list(cfg.MODEL.RESNETS.OUT_FEATURES)
    if name not in (*_FPN_BUILDERS, *_RETINANET_BUILDERS):
        return None
    levels = [level.replace("res", "p") for level in cfg.MODEL.FPN.IN_FEATURES]
    return [*levels, "p6"] if name in _FPN_BUILDERS else [*levels, "p6", "p7"]


def _check_features(cfg: CfgNode) -> Iterator[Problem]:
    """What heads read must be what the backbone gives, and each level has its anchors."""
    given = _features(cfg)
    readers = [
        *(["MODEL.RPN.IN_FEATURES"] if _reads_proposals(cfg) and _has_rpn(cfg) else []),
        *(["MODEL.ROI_HEADS.IN_FEATURES"] if _reads_roi_heads(cfg) else []),
        *(["MODEL.RETINANET.IN_FEATURES"] if _is_retinanet(cfg) else []),
    ]
    for key in readers:
        missing = [level for level in value_of(cfg, key) if given is not None and level not in given]
        if given is not None and missing:
            hint = ""
            if "p7" in missing and cfg.MODEL.BACKBONE.NAME in _FPN_BUILDERS:
                hint = "; p7 is in build_dcn_retinanet_resnet_fpn_backbone"
            yield key, f"{key} has {listed(missing)}, but {cfg.MODEL.BACKBONE.NAME} gives only {listed(given)}{hint}"
        elif key == "MODEL.ROI_HEADS.IN_FEATURES" and given is not None and _has_standard_heads(cfg):
            names = list(value_of(cfg, key))
            strides = [int(re.sub(r"\D", "", name) or 0) for name in names]
            if strides != list(range(strides[0], strides[0] + len(strides))):
                yield key, f"{key} must have levels that follow one another, from fine to coarse, got {shorten(names)}"
    anchored = [key for key in readers if key != "MODEL.ROI_HEADS.IN_FEATURES"]
    for key in anchored if cfg.MODEL.ANCHOR_GENERATOR.NAME == "DefaultAnchorGenerator" else []:
        levels = len(value_of(cfg, key))
        for anchors in ("SIZES", "ASPECT_RATIOS"):
            lists = len(cfg.MODEL.ANCHOR_GENERATOR[anchors])
            if lists not in (1, levels):
                yield (
                    f"MODEL.ANCHOR_GENERATOR.{anchors}",
                    f"MODEL.ANCHOR_GENERATOR.{anchors} must have a list for each of the {levels} levels of {key}, or "
                    f"one for all, got {lists}",
                )


def _has_rpn(cfg: CfgNode) -> bool:
    from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN

    generator = _part(PROPOSAL_GENERATOR_REGISTRY, cfg.MODEL.PROPOSAL_GENERATOR.NAME)
    return isinstance(generator, type) and issubclass(generator, RPN)


def _check_labels(cfg: CfgNode) -> Iterator[Problem]:
    """One label more than thresholds."""
    for node in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = len(cfg.MODEL[node].IOU_THRESHOLDS), len(cfg.MODEL[node].IOU_LABELS)
        if labels != thresholds + 1:
            key = f"MODEL.{node}.IOU_LABELS"
            yield key, f"{key} must have one value more than MODEL.{node}.IOU_THRESHOLDS ({thresholds}), got {labels}"


def _check_box_weights(cfg: CfgNode) -> Iterator[Problem]:
    """Boxes have four numbers, rotated ones five."""
    from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
    from detectron2.modeling.proposal_generator.rrpn import RRPN
    from detectron2.modeling.roi_heads.rotated_fast_rcnn import RROIHeads

    readers: list[tuple[str, Any, type]] = []
    if _reads_proposals(cfg) and _has_rpn(cfg):
        generator = _part(PROPOSAL_GENERATOR_REGISTRY, cfg.MODEL.PROPOSAL_GENERATOR.NAME)
        readers.append(("MODEL.RPN", generator, RRPN))
    if _reads_roi_heads(cfg):
        readers.append(("MODEL.ROI_BOX_HEAD", _roi_heads(cfg), RROIHeads))
    for node, part, rotated in readers:
        if not _is_known(part):
            continue
        key, expected = f"{node}.BBOX_REG_WEIGHTS", 5 if issubclass(part, rotated) else 4
        weights = value_of(cfg, key)
        if len(weights) != expected:
            yield key, f"{key} must have {expected} values, which the boxes of {part.__name__} have, got {weights}"


def _check_poolers(cfg: CfgNode) -> Iterator[Problem]:
    """Only the heads of dcn_d2 build the poolers of dcn_d2."""
    from ...modeling.roi_heads import DCNROIHeads

    heads = _roi_heads(cfg)
    if not _reads_roi_heads(cfg) or heads is None or (isinstance(heads, type) and issubclass(heads, DCNROIHeads)):
        return
    if not getattr(heads, "__module__", "").startswith("detectron2."):
        return
    for head in _heads_with_poolers(cfg):
        pooler = cfg.MODEL[head].POOLER_TYPE
        if pooler and pooler not in DETECTRON2_POOLERS:
            key = f"MODEL.{head}.POOLER_TYPE"
            yield (
                key,
                f"{key} is {pooler!r}, which needs MODEL.ROI_HEADS.NAME {listed(_OUR_HEADS)}, got "
                f"{cfg.MODEL.ROI_HEADS.NAME!r} (which knows {listed(DETECTRON2_POOLERS)})",
            )


def _check_heads(cfg: CfgNode) -> Iterator[Problem]:
    """A box head must have layers, and norms must fit their widths."""
    if not _has_standard_heads(cfg):
        return
    box = cfg.MODEL.ROI_BOX_HEAD
    if box.NAME == "FastRCNNConvFCHead" and box.NUM_FC + box.NUM_CONV == 0:
        yield (
            "MODEL.ROI_BOX_HEAD.NUM_FC",
            "MODEL.ROI_BOX_HEAD.NUM_FC and NUM_CONV are both 0, but FastRCNNConvFCHead needs a layer",
        )
    mask = [("ROI_MASK_HEAD", cfg.MODEL.ROI_MASK_HEAD)] if cfg.MODEL.MASK_ON else []
    # Those of Detectron2; others, as PointRend's, may take the feature maps as they are.
    takers = {"ROI_MASK_HEAD": "MaskRCNNConvUpsampleHead", "ROI_KEYPOINT_HEAD": "KRCNNConvDeconvUpsampleHead"}
    for name in _heads_with_poolers(cfg):
        if not cfg.MODEL[name].POOLER_TYPE and cfg.MODEL[name].NAME == takers.get(name):
            key = f"MODEL.{name}.POOLER_TYPE"
            yield key, f"{cfg.MODEL[name].NAME} (MODEL.{name}.NAME) needs a pooler, but {key} is empty"
    for name, head in [("ROI_BOX_HEAD", box), *mask]:
        if head.NUM_CONV and head.NORM == "GN" and head.CONV_DIM % 32:
            yield (
                f"MODEL.{name}.NORM",
                f"MODEL.{name}.NORM is GN, which has 32 groups: MODEL.{name}.CONV_DIM must be a multiple of 32, got "
                f"{head.CONV_DIM}",
            )


def _check_cascade(cfg: CfgNode) -> Iterator[Problem]:
    """The stages of a cascade must be as many in all keys."""
    from detectron2.modeling.roi_heads import CascadeROIHeads

    heads = _roi_heads(cfg)
    if not (_reads_roi_heads(cfg) and isinstance(heads, type) and issubclass(heads, CascadeROIHeads)):
        return
    cascade, node = cfg.MODEL.ROI_BOX_CASCADE_HEAD, "MODEL.ROI_BOX_CASCADE_HEAD"
    stages, weights = len(cascade.IOUS), len(cascade.BBOX_REG_WEIGHTS)
    if stages != weights:
        yield (
            f"{node}.BBOX_REG_WEIGHTS",
            f"{node}.BBOX_REG_WEIGHTS has {weights} values, but {node}.IOUS says that there are {stages} stages",
        )
    losses = len(value_of(cfg, "MODEL.DCN.CASCADE_LOSS_WEIGHTS", ()))
    if cfg.MODEL.ROI_HEADS.NAME in _OUR_HEADS and losses not in (0, stages):
        yield (
            "MODEL.DCN.CASCADE_LOSS_WEIGHTS",
            f"MODEL.DCN.CASCADE_LOSS_WEIGHTS has {losses} values, but {node}.IOUS says that there are {stages} stages",
        )
    first = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0]
    if cascade.IOUS[0] != first:
        yield f"{node}.IOUS", f"{node}.IOUS must begin with MODEL.ROI_HEADS.IOU_THRESHOLDS, {first}, got {cascade.IOUS}"
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        key = "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"
        yield key, f"{key} must be True with MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME}, got False"
    if cfg.MODEL.MASK_ON and value_of(cfg, "MODEL.DCN.CASCADE_MASK_HEADS", False):
        if not cfg.MODEL.DCN.CASCADE_RESAMPLE:
            yield (
                "MODEL.DCN.CASCADE_MASK_HEADS",
                "MODEL.DCN.CASCADE_MASK_HEADS needs MODEL.DCN.CASCADE_RESAMPLE: the boxes that Detectron2 keeps for "
                "the later stages have no ground-truth masks",
            )
        if not cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE and cfg.MODEL.ROI_MASK_HEAD.NAME != "MaskRCNNConvUpsampleHead":
            yield (
                "MODEL.ROI_MASK_HEAD.POOLER_TYPE",
                "MODEL.DCN.CASCADE_MASK_HEADS needs a pooler, but MODEL.ROI_MASK_HEAD.POOLER_TYPE is empty",
            )


def _check_images(cfg: CfgNode) -> Iterator[Problem]:
    """Channels, and sizes to draw from."""
    means, deviations = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    if deviations != means:
        yield (
            "MODEL.PIXEL_STD",
            f"MODEL.PIXEL_STD must have as many values as MODEL.PIXEL_MEAN, {means}, got {deviations}",
        )
    channels = channels_of(cfg.INPUT.FORMAT)
    # A grey image takes the mean of each channel of a network for colour. Images with more channels than PIL's have a
    # reader of their own, and then INPUT.FORMAT says nothing about them.
    if channels not in (1, means) and means <= 4:
        yield (
            "MODEL.PIXEL_MEAN",
            f"MODEL.PIXEL_MEAN must have {channels} values for INPUT.FORMAT {cfg.INPUT.FORMAT}, got {means}",
        )
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        key = "INPUT.MIN_SIZE_TRAIN"
        yield key, f"{key} must be the least and the largest size with INPUT.MIN_SIZE_TRAIN_SAMPLING range, got {sizes}"
    crop = cfg.INPUT.CROP
    relative = crop.TYPE.startswith("relative")
    if crop.ENABLED and any(size > 1 if relative else type(size) is not int for size in crop.SIZE):
        allowed = "parts of the image, at most 1," if relative else "whole numbers of pixels"
        yield "INPUT.CROP.SIZE", f"INPUT.CROP.SIZE must be {allowed} with INPUT.CROP.TYPE {crop.TYPE}, got {crop.SIZE}"


_MODEL_CHECKS = (
    _check_names,
    _check_resnet,
    _check_fpn,
    _check_features,
    _check_labels,
    _check_box_weights,
    _check_poolers,
    _check_heads,
    _check_cascade,
)
_PART_CHECKS: dict[str, tuple[Check, ...]] = {
    "MODEL.BACKBONE.NAME": (_check_resnet, _check_fpn),
    "MODEL.PROPOSAL_GENERATOR.NAME": (),
    "MODEL.ROI_HEADS.NAME": (_check_heads, _check_cascade),
}


def warn_of_unread_keys(cfg: CfgNode) -> None:
    """Says in the log, once in a process, which keys are set away from their defaults though nothing reads them."""
    for key, reason in unread_keys(cfg):
        message = f"{key} is {shorten(value_of(cfg, key))}, but nothing reads it: {reason}"
        log_first_n(logging.WARNING, message, name=__name__, key="message")


def unread_keys(cfg: CfgNode) -> list[Problem]:
    """Gives the keys that are set away from their defaults though the parts that were chosen do not read them.

    Of parts that are neither dcn_d2's nor Detectron2's it is not known what they read: nothing is said about those.
    """
    defaults = _defaults()
    absent = object()
    return [
        (key, reason)
        for key, reason in _unread(cfg)
        if value_of(cfg, key, absent) not in (absent, value_of(defaults, key))
    ]


@cache
def _defaults() -> CfgNode:
    from ..keys import add_dcn_keys

    cfg = get_cfg()
    add_dcn_keys(cfg)
    return cfg


def _is_known(part: Any) -> bool:
    return getattr(part, "__module__", "").startswith(("detectron2.", "dcn_d2."))


def _unread(cfg: CfgNode) -> Iterator[Problem]:
    """Gives keys of dcn_d2, and of its part of MODEL.RESNETS, that nothing reads, with the reason."""
    from detectron2.modeling import BACKBONE_REGISTRY

    yield from _unread_by_heads(cfg)
    name = cfg.MODEL.BACKBONE.NAME
    if not _is_known(_part(BACKBONE_REGISTRY, name)):
        return
    if not name.startswith("build_dcn_"):
        for key in ("NORM_EVAL", "MEMORY_FORMAT"):
            yield f"MODEL.DCN.{key}", f"MODEL.BACKBONE.NAME is {name!r}, and only those named build_dcn_... read it"
    if not any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        reason = "MODEL.RESNETS.DEFORM_ON_PER_STAGE makes no stage deformable"
        for key in ("MODEL.RESNETS.DEFORM_MODULATED", "MODEL.RESNETS.DEFORM_NUM_GROUPS", "SOLVER.OFFSET_LR_FACTOR"):
            yield key, reason


def _unread_by_heads(cfg: CfgNode) -> Iterator[Problem]:
    from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY

    from ...modeling.roi_heads import DCNCascadeROIHeads, DCNROIHeads
    from ...modeling.rpn import DCNRPN

    dcn = _defaults().MODEL.DCN
    of_rpn = [key for key in dcn if key.startswith("RPN_")]
    of_cascade = [key for key in dcn if key.startswith("CASCADE_")]
    of_heads = [key for key in dcn if key.startswith(("ROI_", "POOLER_"))]
    if not _is_known(_meta_architecture(cfg)):
        return
    architecture = f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}"
    if not _reads_proposals(cfg):
        yield from ((f"MODEL.DCN.{key}", f"{architecture}, which has no RPN") for key in of_rpn)
    else:
        generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        part = _part(PROPOSAL_GENERATOR_REGISTRY, generator)
        if generator == "PrecomputedProposals" or _is_known(part) and not issubclass(part, DCNRPN):
            reason = f"MODEL.PROPOSAL_GENERATOR.NAME is {generator!r}, and only DCNRPN reads it"
            yield from ((f"MODEL.DCN.{key}", reason) for key in of_rpn)
    if not _reads_roi_heads(cfg):
        yield from ((f"MODEL.DCN.{key}", f"{architecture}, which has no RoI heads") for key in of_heads + of_cascade)
        return
    heads = _roi_heads(cfg)
    if not _is_known(heads):
        return
    name = f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}"
    if not issubclass(heads, DCNROIHeads):
        reason = f"{name}, and only {listed(_OUR_HEADS)} read it".replace(" or ", " and ")
        yield from ((f"MODEL.DCN.{key}", reason) for key in of_heads)
    elif all(cfg.MODEL[head].POOLER_TYPE in (*DETECTRON2_POOLERS, "") for head in _heads_with_poolers(cfg)):
        poolers = listed(f"MODEL.{head}.POOLER_TYPE" for head in _heads_with_poolers(cfg))
        yield "MODEL.DCN.POOLER_FC_DIM", f"no pooler is deformable ({poolers} is Detectron2's)"
    if not issubclass(heads, DCNCascadeROIHeads):
        yield from ((f"MODEL.DCN.{key}", f"{name}, and only DCNCascadeROIHeads reads it") for key in of_cascade)
    elif not cfg.MODEL.MASK_ON:
        yield "MODEL.DCN.CASCADE_MASK_HEADS", "MODEL.MASK_ON is False"

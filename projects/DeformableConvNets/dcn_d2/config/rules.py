# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What each key of a config may be: one table, of dcn_d2's keys and of those of Detectron2 that fail late or silently.

A rule is a function of a value. It gives None where the value is right, and else what it must be, as the end of a
sentence that begins with the key: "must be a whole number from 1 to 65536". `dcn_d2.config.checks` applies the table.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any

Rule = Callable[[Any], "str | None"]

LARGEST_WHOLE = 2**53  # what a float holds exactly; torch takes no larger ones in place of floats
HUGE = 2**31 - 1  # more iterations, images or boxes than that are a mistake
WIDEST = 65536  # channels; wider layers are a mistake, and would end as an error of the memory allocator

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
STAGES = ("stem", "res2", "res3", "res4", "res5")
DETECTRON2_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIAlignRotated", "ROIPool")


def nearest(name: str, names: Iterable[str]) -> str:
    """Gives '; did you mean NAME?' for the name that is most like `name`, or nothing if none is."""
    folded = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def listed(choices: Iterable[Any]) -> str:
    """Gives 'a, b or c'."""
    *first, last = [str(choice) if choice != "" else '""' for choice in choices]
    return f"{', '.join(first)} or {last}" if first else last


def flag(value: Any) -> str | None:
    """True or False; 1 and 0 mean the same."""
    return None if type(value) in (bool, int) and value in (0, 1) else "must be True or False"


def text(value: Any) -> str | None:
    """Any string."""
    return None if isinstance(value, str) else "must be a string"


def name(value: Any) -> str | None:
    """A string that is not empty."""
    return None if isinstance(value, str) and value.strip() else "must be a name"


def folder_name(value: Any) -> str | None:
    """A name whose ~ the shell has replaced: a folder that is really called ~ is dangerous to remove."""
    if isinstance(value, str) and value.startswith("~"):
        return "must be a folder without ~, which is not replaced in configs; write the path of the home folder out"
    return name(value)


def whole(low: int, high: int = HUGE, besides: int | None = None, meaning: str = "") -> Rule:
    """A whole number from `low` to `high`, or the one number `besides`, whose `meaning` the message gives."""
    allowed = f"must be a whole number from {low} to {high}"
    if high == HUGE:
        allowed = f"must be a whole number of at least {low}"
    if besides is not None:
        allowed += f", or {besides}"
    if meaning:
        allowed += f" ({meaning})"

    def rule(value: Any) -> str | None:
        if type(value) is int and (low <= value <= high or value == besides):
            return None
        return f"{allowed}, not more than {high}" if type(value) is int and value > HUGE else allowed

    return rule


def number(
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    besides: float | None = None,
    infinite: bool = False,
) -> Rule:
    """A number from `low` to `high`; with `above` and `below` the ends are left out. NaN never is one."""
    start = f"above {low:g}" if above else f"from {low:g}"
    if high < math.inf:
        allowed = (
            f"must be a number {start} {'and below' if above and below else 'to below' if below else 'to'} {high:g}"
        )
    else:
        allowed = f"must be a finite number {'above' if above else 'of at least'} {low:g}"
    if besides is not None:
        allowed += f", or {besides:g}"

    def rule(value: Any) -> str | None:
        if type(value) is int and abs(value) > LARGEST_WHOLE:
            return f"{allowed}, and no whole number of more than {LARGEST_WHOLE}"
        right = type(value) in (int, float) and (infinite or math.isfinite(value))
        right = right and (low < value if above else low <= value) and (value < high if below else value <= high)
        return None if right or (type(value) in (int, float) and value == besides) else allowed

    return rule


def choice(*choices: Any) -> Rule:
    """One of `choices`."""

    def rule(value: Any) -> str | None:
        if any(type(value) is type(other) and value == other for other in choices):
            return None
        hint = nearest(value, (other for other in choices if isinstance(other, str))) if isinstance(value, str) else ""
        return f"must be {listed(choices)}{hint}"

    return rule


def several(rule_of_one: Rule, *, length: int | None = None, least: int = 0, allowed: str = "") -> Rule:
    """A list or tuple whose values all follow `rule_of_one`; `length` or `least` says how many there must be."""

    def rule(value: Any) -> str | None:
        count = f"{length} " if length is not None else f"at least {least} " if least > 1 else ""
        if not isinstance(value, (list, tuple)):
            return allowed or f"must be a list of {count}values, as [...] or (...,)"
        if length is not None and len(value) != length or len(value) < least:
            return allowed or (f"must have {count}values" if count else "must not be empty")
        for position, one in enumerate(value):
            problem = rule_of_one(one)
            if problem is not None:
                return f"{problem} in all its values (number {position + 1} is {one!r})"
        return None

    return rule


def either(rule_of_one: Rule, value_of_none: str) -> Rule:
    """As `rule_of_one`, or None, which means `value_of_none`."""

    def rule(value: Any) -> str | None:
        problem = None if value is None else rule_of_one(value)
        return problem and f"{problem}, or None ({value_of_none})"

    return rule


def increasing(rule_of_one: Rule, least: int = 1, strictly: bool = False) -> Rule:
    """A list of at least `least` values that grow; `strictly`: none stands twice."""
    values_rule = several(rule_of_one, least=least)

    def rule(value: Any) -> str | None:
        problem = values_rule(value)
        if problem is None and list(value) != sorted(value):
            return "must be in increasing order"
        if problem is None and strictly and len(set(value)) < len(value):
            return "must have no value twice"
        return problem

    return rule


def device(value: Any) -> str | None:
    """A device of torch."""
    import torch

    problem = 'must name a device of torch, such as "cpu", "cuda" or "cuda:0"'
    if not isinstance(value, str):
        return problem
    try:
        torch.device(value)
    except RuntimeError:
        return problem + nearest(value.partition(":")[0], ("cpu", "cuda"))
    return None


def image_format(value: Any) -> str | None:
    """What Detectron2 converts images to: a mode of PIL, or BGR, or YUV-BT.601."""
    if isinstance(value, str) and channels_of(value) is not None:
        return None
    hint = nearest(value, ("BGR", "RGB", "L")) if isinstance(value, str) else ""
    return f"must be BGR, YUV-BT.601, or a mode of PIL, such as RGB or L (grey){hint}"


def channels_of(image_format: str) -> int | None:
    """Gives the number of channels of images in a format, or None where PIL has no such format."""
    from PIL import ImageMode

    if image_format in ("BGR", "YUV-BT.601"):
        return 3
    try:
        return len(ImageMode.getmode(image_format).bands)
    except KeyError:
        return None


def box_pooler(value: Any) -> str | None:
    """A pooler of Detectron2 or of dcn_d2."""
    from ..modeling.poolers import ROI_POOLER_REGISTRY

    return choice(*DETECTRON2_POOLERS, *(name for name, _ in ROI_POOLER_REGISTRY))(value)


def pooler_or_none(value: Any) -> str | None:
    """As `box_pooler`, or "" for a head without a pooler."""
    return None if value == "" else box_pooler(value)


def deform_stages(value: Any) -> str | None:
    """Four flags."""
    if isinstance(value, (list, tuple)) and len(value) != 4:
        return "needs 4 values, for res2 to res5"
    return several(flag, length=4)(value)


count, width, fraction, factor = whole(1), whole(1, WIDEST), number(0, 1), number(0)
iou_or_off = number(0, 1, besides=-1)
norm = choice(*NORMS)
box_loss = choice(*BOX_LOSSES)
four_weights = several(number(0, above=True), length=4)
box_weights = several(number(0, above=True), least=4)  # 5 where boxes are rotated
names = several(name)
some_names = several(name, least=1)
lists_of_sizes = several(several(number(0, above=True), least=1), least=1)
iou_labels = several(choice(-1, 0, 1), least=2)

# The keys of dcn_d2; a test holds this table against those of `add_dcn_config`.
OUR_RULES: dict[str, Rule] = {
    "MODEL.DCN.NORM_EVAL": flag,
    "MODEL.DCN.MEMORY_FORMAT": choice("auto", "contiguous", "channels_last"),
    "MODEL.DCN.POOLER_FC_DIM": width,
    "MODEL.DCN.POOLER_MMDET_LEVELS": flag,
    "MODEL.DCN.RPN_LOW_QUALITY_IOU": iou_or_off,
    "MODEL.DCN.RPN_PADDING_DIVISOR": whole(0, meaning="0: all anchors take part"),
    "MODEL.DCN.RPN_LOSS_PER_SAMPLE": flag,
    "MODEL.DCN.ROI_LOW_QUALITY_IOU": iou_or_off,
    "MODEL.DCN.CASCADE_AVERAGE_LOGITS": flag,
    "MODEL.DCN.CASCADE_MASK_HEADS": flag,
    "MODEL.DCN.CASCADE_RESAMPLE": flag,
    "MODEL.DCN.CASCADE_LOSS_WEIGHTS": several(factor),
    "MODEL.DCN.CASCADE_SCALE_GRADIENTS": flag,
    "INPUT.RESIZE_WITH": choice("PIL", "cv2"),
    "SOLVER.REFERENCE_IMS_PER_BATCH": whole(0, meaning="0 leaves BASE_LR alone"),
    "SOLVER.OFFSET_LR_FACTOR": factor,
    "PUBLISHED.WEIGHTS": text,
    "PUBLISHED.LOG": text,
    "PUBLISHED.BOX_AP": number(0, 100),
    "PUBLISHED.MASK_AP": number(0, 100),
}

DETECTRON2_RULES: dict[str, Rule] = {
    "VERSION": choice(1, 2),
    "MODEL.DEVICE": device,
    "MODEL.META_ARCHITECTURE": name,
    "MODEL.WEIGHTS": text,
    "MODEL.MASK_ON": flag,
    "MODEL.KEYPOINT_ON": flag,
    "MODEL.LOAD_PROPOSALS": flag,
    "MODEL.PIXEL_MEAN": several(number(-math.inf), least=1),
    "MODEL.PIXEL_STD": several(number(0, above=True), least=1),
    "MODEL.BACKBONE.NAME": name,
    "MODEL.BACKBONE.FREEZE_AT": whole(0, 5, meaning="1 freezes the stem, 2 also res2, 5 all; 0 nothing"),
    "MODEL.RESNETS.DEPTH": choice(18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": several(choice(*STAGES), least=1),
    "MODEL.RESNETS.NUM_GROUPS": width,
    "MODEL.RESNETS.NORM": norm,
    "MODEL.RESNETS.WIDTH_PER_GROUP": width,
    "MODEL.RESNETS.STRIDE_IN_1X1": flag,
    "MODEL.RESNETS.RES5_DILATION": choice(1, 2),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": width,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": width,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": deform_stages,
    "MODEL.RESNETS.DEFORM_MODULATED": flag,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": width,
    "MODEL.FPN.IN_FEATURES": names,
    "MODEL.FPN.OUT_CHANNELS": width,
    "MODEL.FPN.NORM": norm,
    "MODEL.FPN.FUSE_TYPE": choice("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.NAME": name,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": factor,
    "MODEL.ANCHOR_GENERATOR.NAME": name,
    "MODEL.ANCHOR_GENERATOR.SIZES": lists_of_sizes,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": lists_of_sizes,
    "MODEL.ANCHOR_GENERATOR.OFFSET": number(0, 1, below=True),
    "MODEL.RPN.HEAD_NAME": name,
    "MODEL.RPN.IN_FEATURES": some_names,
    "MODEL.RPN.BOUNDARY_THRESH": whole(0, besides=-1, meaning="-1 keeps all anchors"),
    "MODEL.RPN.IOU_THRESHOLDS": increasing(fraction),
    "MODEL.RPN.IOU_LABELS": iou_labels,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": count,
    "MODEL.RPN.POSITIVE_FRACTION": fraction,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": box_loss,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": factor,
    "MODEL.RPN.BBOX_REG_WEIGHTS": box_weights,
    "MODEL.RPN.SMOOTH_L1_BETA": factor,
    "MODEL.RPN.LOSS_WEIGHT": factor,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": count,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": count,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": count,
    "MODEL.RPN.POST_NMS_TOPK_TEST": count,
    "MODEL.RPN.NMS_THRESH": fraction,
    "MODEL.RPN.CONV_DIMS": several(whole(1, WIDEST, besides=-1, meaning="-1: as the feature maps"), least=1),
    "MODEL.ROI_HEADS.NAME": name,
    "MODEL.ROI_HEADS.NUM_CLASSES": whole(1, 1_000_000),
    "MODEL.ROI_HEADS.IN_FEATURES": some_names,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": increasing(fraction),
    "MODEL.ROI_HEADS.IOU_LABELS": iou_labels,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": count,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": fraction,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": fraction,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": fraction,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": flag,
    "MODEL.ROI_BOX_HEAD.NAME": text,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": box_loss,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": factor,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": box_weights,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": factor,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": whole(1, 1024),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": whole(0, 1024, meaning="0: as many as the bin is large"),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": box_pooler,
    "MODEL.ROI_BOX_HEAD.NUM_FC": whole(0, 1000),
    "MODEL.ROI_BOX_HEAD.FC_DIM": width,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": whole(0, 1000),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": width,
    "MODEL.ROI_BOX_HEAD.NORM": norm,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": flag,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": flag,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": several(four_weights, least=1),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": several(fraction, least=1),
    "MODEL.ROI_MASK_HEAD.NAME": text,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": whole(1, 1024),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": whole(0, 1024, meaning="0: as many as the bin is large"),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": pooler_or_none,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": whole(0, 1000),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": width,
    "MODEL.ROI_MASK_HEAD.NORM": norm,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": flag,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": text,
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": whole(1, 1024),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": whole(0, 1024, meaning="0: as many as the bin is large"),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": pooler_or_none,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": several(width, least=1),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": width,
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": whole(0),
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": factor,
    "MODEL.RETINANET.NUM_CLASSES": whole(1, 1_000_000),
    "MODEL.RETINANET.IN_FEATURES": some_names,
    "MODEL.RETINANET.NUM_CONVS": whole(1, 1000),
    "MODEL.RETINANET.IOU_THRESHOLDS": increasing(fraction),
    "MODEL.RETINANET.IOU_LABELS": iou_labels,
    "MODEL.RETINANET.PRIOR_PROB": number(0, 1, above=True, below=True),
    "MODEL.RETINANET.SCORE_THRESH_TEST": fraction,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": count,
    "MODEL.RETINANET.NMS_THRESH_TEST": fraction,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": four_weights,
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": factor,
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": number(0, 1, besides=-1),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": factor,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": box_loss,
    "MODEL.RETINANET.NORM": norm,
    "INPUT.FORMAT": image_format,
    "INPUT.MIN_SIZE_TRAIN": several(whole(0, WIDEST, meaning="0 leaves the size alone"), least=1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": choice("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": width,
    "INPUT.MIN_SIZE_TEST": whole(0, WIDEST, meaning="0 leaves the size alone"),
    "INPUT.MAX_SIZE_TEST": width,
    "INPUT.RANDOM_FLIP": choice("horizontal", "vertical", "none"),
    "INPUT.CROP.ENABLED": flag,
    "INPUT.CROP.TYPE": choice("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": several(number(0, above=True), length=2),
    "INPUT.MASK_FORMAT": choice("polygon", "bitmask"),
    "DATASETS.TRAIN": names,
    "DATASETS.TEST": names,
    "DATALOADER.NUM_WORKERS": whole(0, 1024),
    "DATALOADER.ASPECT_RATIO_GROUPING": flag,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": flag,
    "DATALOADER.REPEAT_THRESHOLD": factor,
    "SOLVER.MAX_ITER": count,
    "SOLVER.IMS_PER_BATCH": count,
    "SOLVER.BASE_LR": factor,
    "SOLVER.BASE_LR_END": factor,
    "SOLVER.MOMENTUM": number(0, 1, below=True),
    "SOLVER.NESTEROV": flag,
    "SOLVER.WEIGHT_DECAY": factor,
    "SOLVER.WEIGHT_DECAY_NORM": factor,
    "SOLVER.WEIGHT_DECAY_BIAS": either(factor, "as WEIGHT_DECAY"),
    "SOLVER.BIAS_LR_FACTOR": factor,
    "SOLVER.GAMMA": factor,
    "SOLVER.STEPS": increasing(count, least=0, strictly=True),
    "SOLVER.WARMUP_FACTOR": fraction,
    "SOLVER.WARMUP_ITERS": whole(0),
    "SOLVER.WARMUP_METHOD": choice("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": count,
    "SOLVER.REFERENCE_WORLD_SIZE": whole(0, meaning="0 leaves all as it is"),
    "SOLVER.CLIP_GRADIENTS.ENABLED": flag,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": choice("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": number(0, above=True),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": number(0, above=True, infinite=True),
    "SOLVER.AMP.ENABLED": flag,
    "TEST.EVAL_PERIOD": whole(0, meaning="0: only at the end"),
    "TEST.DETECTIONS_PER_IMAGE": whole(1, besides=-1, meaning="-1 keeps all"),
    "TEST.AUG.ENABLED": flag,
    "TEST.AUG.MIN_SIZES": several(width, least=1),
    "TEST.AUG.MAX_SIZE": width,
    "TEST.AUG.FLIP": flag,
    "TEST.PRECISE_BN.ENABLED": flag,
    "TEST.PRECISE_BN.NUM_ITER": count,
    "OUTPUT_DIR": folder_name,
    "SEED": whole(-1, HUGE, meaning="-1: another one each time"),
    "VIS_PERIOD": whole(0, meaning="0: never"),
    "CUDNN_BENCHMARK": flag,
}

RULES: dict[str, Rule] = OUR_RULES | DETECTRON2_RULES

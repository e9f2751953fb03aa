# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The config keys of dcn_d2. All default to Detectron2's behaviour."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .checks import find_problems, nearest_key, raise_problems, shorten, value_of
from .reader import ConfigError, read_config_file
from .rules import RULES


def register() -> None:
    """Registers everything of dcn_d2 with Detectron2; a second call changes nothing.

    These are the backbones, heads and poolers, the data sets `nuclei_train` and `nuclei_val`, dcn_d2's layers in
    Detectron2's own deformable ResNet block, and the addresses of foreign weights that MODEL.WEIGHTS may have. A
    process that gets a finished config, by pickle for example, needs this and not `add_dcn_config`.
    """
    from .. import checkpoint, data, modeling  # noqa: F401  the last two register what they have when imported

    modeling.use_dcn_layers_in_detectron2()
    checkpoint.register_path_handlers()


def add_dcn_config(cfg: CN) -> None:
    """Adds the keys below to `cfg` and registers everything of dcn_d2 with Detectron2.

    Keys that `cfg` has already keep their values, so a second call changes nothing. To read a file into `cfg`, call
    `cfg.merge_from_file(file, allow_unsafe=False)`: without the second argument, Detectron2 runs code that the file
    asks for. `load_config` does all of this.
    """
    register()
    add_dcn_keys(cfg)


def with_dcn_keys(cfg: CN) -> CN:
    """Gives `cfg` if it has all keys below, else a copy that has them, with the defaults of those that it lacked.

    What builds models calls it: configs made without dcn_d2, or by an older one, get its defaults.
    """
    copy = cfg.clone()
    copy.defrost()
    add_dcn_keys(copy)
    return cfg if copy == cfg else copy


def add_dcn_keys(cfg: CN) -> None:
    """Adds dcn_d2's keys to `cfg`, without registering anything; those that it has already keep their values."""

    def add(node: CN, key: str, default: Any) -> Any:
        if key not in node:
            node[key] = default
        return node[key]

    dcn = add(cfg.MODEL, "DCN", CN())
    # Every BatchNorm of the ResNet uses its running statistics and leaves them as they are, also in training, while
    # its weight and bias train (MMDetection's norm_eval). Other norms are left alone.
    add(dcn, "NORM_EVAL", False)

    # Memory format of the weights of dcn_d2's backbones, and with them of all feature maps: "contiguous",
    # "channels_last", or "auto": channels_last on CPU, where it was measured to be the faster one, else contiguous.
    # (On an H200 in float16, channels_last made inference of a Faster R-CNN 9 % faster and training 4 % slower.)
    # Results are the same up to rounding.
    add(dcn, "MEMORY_FORMAT", "auto")

    # Width of the hidden layers that predict offsets and masks in the RoI poolers of dcn_d2, which POOLER_TYPE of
    # MODEL.ROI_BOX_HEAD names: DeformPSRoIPool, ModulatedDeformPSRoIPool, DeformRoIPool, ModulatedDeformRoIPool.
    add(dcn, "POOLER_FC_DIM", 1024)
    # DCNROIHeads and DCNCascadeROIHeads choose the FPN level of a box with MMDetection's formula, which differs from
    # Detectron2's for boxes a hair smaller than 112, 224 and 448 pixels.
    add(dcn, "POOLER_MMDET_LEVELS", False)

    # The rest of MODEL.DCN changes training only, but for CASCADE_AVERAGE_LOGITS and CASCADE_MASK_HEADS.
    # With the proposal generator DCNRPN, ground truth takes over the anchors of its highest IoU if that is at least
    # this; -1 is Detectron2's rule: no minimum, and an anchor keeps the ground truth of its own highest IoU.
    add(dcn, "RPN_LOW_QUALITY_IOU", -1.0)
    # DCNRPN leaves out of matching and sampling the anchors whose centre lies outside the image padded to multiples of
    # this, and those that RPN.BOUNDARY_THRESH excludes; 0 is Detectron2's rule, all anchors of the batch take part.
    add(dcn, "RPN_PADDING_DIVISOR", 0)
    # The losses of DCNRPN are averages over the sampled anchors, and not sums over RPN.BATCH_SIZE_PER_IMAGE.
    add(dcn, "RPN_LOSS_PER_SAMPLE", False)
    # As RPN_LOW_QUALITY_IOU, for the proposals of DCNROIHeads and DCNCascadeROIHeads; -1: such matches do not exist.
    add(dcn, "ROI_LOW_QUALITY_IOU", -1.0)

    # DCNCascadeROIHeads scores with the softmax of the stages' mean logits, not with the mean of their probabilities.
    add(dcn, "CASCADE_AVERAGE_LOGITS", False)
    # DCNCascadeROIHeads has a mask head for each stage, and averages their masks at test time.
    add(dcn, "CASCADE_MASK_HEADS", False)
    # Each stage of DCNCascadeROIHeads samples anew from the boxes of the stage before and the ground truth.
    add(dcn, "CASCADE_RESAMPLE", False)
    # Factors of the losses of each stage of DCNCascadeROIHeads; empty is 1 for all.
    add(dcn, "CASCADE_LOSS_WEIGHTS", ())
    # Each of S stages of DCNCascadeROIHeads passes 1 / S of its gradient on to the pooled features.
    add(dcn, "CASCADE_SCALE_GRADIENTS", True)

    # What resizes images in dcn_d2's trainer and predictor: "PIL", which Detectron2 uses, or "cv2", MMDetection's way.
    add(cfg.INPUT, "RESIZE_WITH", "PIL")

    # Batch size that SOLVER.BASE_LR is meant for: with another IMS_PER_BATCH, train_net.py scales BASE_LR linearly and
    # says so. 0 leaves BASE_LR alone.
    add(cfg.SOLVER, "REFERENCE_IMS_PER_BATCH", 0)

    # Factor on the learning rate of the convolutions that predict offsets and modulation, as MMEngine's
    # dcn_offset_lr_mult. From scratch, a small one keeps samples near their regular positions at first.
    add(cfg.SOLVER, "OFFSET_LR_FACTOR", 1.0)

    # What is published for a row of the zoo; nothing that builds or trains a model reads it.
    published = add(cfg, "PUBLISHED", CN())
    # Address of the weights; "" where there are none.
    add(published, "WEIGHTS", "")
    # Address of the log of their training; "" where there is none.
    add(published, "LOG", "")
    # Box AP of the weights on COCO val2017, in percent; 0 where it is not known.
    add(published, "BOX_AP", 0.0)
    # Mask AP of the weights on COCO val2017, in percent; 0 for a model without masks.
    add(published, "MASK_AP", 0.0)


def load_config(config_file: str, opts: Sequence[Any] = (), check: bool = True) -> CN:
    """Reads a config with dcn_d2's keys, as data: no YAML of a stranger can run code.

    Args:
        config_file: path of a YAML; "" gives the defaults.
        opts: KEY VALUE pairs that override it.
        check: refuse values that cannot work, and values that contradict each other. False is for a file that is
            complete only with others, or that is to be mended: check with `dcn_d2.config.checks.check_config` then.

    Raises:
        ConfigError: with the file and line, or the key, value and what is allowed.
    """
    cfg = get_cfg()
    add_dcn_config(cfg)
    origins: dict[str, str] = {}
    if config_file:
        cfg, origins = _merge_file(cfg, str(Path(config_file).expanduser()) if config_file[0] == "~" else config_file)
    _merge_options(cfg, opts, origins)
    if check:
        raise_problems(
            [(key, f"{origins[key]}: {message}" if key in origins else message) for key, message in find_problems(cfg)]
        )
    return cfg


def _merge_file(cfg: CN, file: str) -> tuple[CN, dict[str, str]]:
    """Gives `cfg` with the values of a file, and the file and line of each of its keys."""
    values, origins = read_config_file(file)
    if "VERSION" in values and values["VERSION"] not in (1, 2):
        raise ConfigError(f"{origins['VERSION']}: VERSION must be 1 or 2, got {shorten(values['VERSION'])}")
    for key, value in values.items():
        if isinstance(cfg.get(key), CN) and not isinstance(value, dict):
            raise ConfigError(f"{origins[key]}: {_explain(cfg, key, value)}")

    class DataNode(CN):
        """Detectron2's node, whose `merge_from_file` takes what has been read as data."""

        @classmethod
        def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
            return values

    reader = DataNode(cfg)
    try:
        reader.merge_from_file(file)  # which also brings old versions up to date
    except _ERRORS_OF_MERGING as error:
        key = _key_in(error)
        message = _explain(cfg, key, value_of(values, key)) if key else f"a value cannot be read: {error}"
        raise ConfigError(f"{origins.get(key, file)}: {message}") from error
    return CN(reader), origins


def _merge_options(cfg: CN, opts: Sequence[Any], origins: dict[str, str]) -> None:
    """Merges KEY VALUE pairs."""
    if len(opts) % 2:
        raise ConfigError(f"KEY VALUE must come in pairs, got {' '.join(map(str, opts))}")
    absent = object()
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            if value_of(cfg, str(key), absent) is absent:  # Detectron2 looks for parts of a key inside of values too
                raise KeyError(key)
            cfg.merge_from_list([key, value])
        except _ERRORS_OF_MERGING as error:
            raise ConfigError(_explain(cfg, str(key), value)) from error
        origins.pop(key, None)


# Of yacs, and of the literal_eval that it reads values with.
_ERRORS_OF_MERGING = (AssertionError, AttributeError, KeyError, MemoryError, RecursionError, TypeError, ValueError)


def _key_in(error: BaseException) -> str:
    """The key that a message of yacs ends with, or "" if none does."""
    found = re.search(r"[Kk]ey:? ([A-Z][A-Za-z0-9_.]*)", str(error))
    return found[1] if found else ""


def _explain(cfg: CN, key: str, value: Any) -> str:
    """Says why a value could not be merged."""
    absent = object()
    expected = value_of(cfg, key, absent)
    if expected is absent:
        return f"Non-existent key: {key}{nearest_key(key, cfg)}"
    if isinstance(expected, CN):
        return f"Type mismatch: {key} is no value but a node with the keys {', '.join(expected)}, got {shorten(value)}"
    decoded = value
    if isinstance(value, str):
        try:
            decoded = literal_eval(value)
        except _ERRORS_OF_MERGING + (SyntaxError,):
            decoded = value
    if isinstance(expected, float) and type(decoded) is int:
        return f"Type mismatch: {key} must be written with a point, as {shorten(decoded)}.0, got {shorten(decoded)}"
    if isinstance(expected, str) and not isinstance(decoded, str):
        return f"Type mismatch: {key} must be a string, got {shorten(decoded)} (quotes make it one: \"'{value}'\")"
    problem = RULES[key](decoded) if key in RULES else None
    if problem is None:
        problem = f"must be {type(expected).__name__}, as {expected!r}"
    return f"Type mismatch: {key} {problem}, got {shorten(decoded)}"

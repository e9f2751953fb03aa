# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Names and shapes of MMDetection's published checkpoints, one for each row of its zoo, without the values.

They are written down as rules, and `FACTS` holds what they must add up to: taken from the state dicts of MMDetection
3.3's own models for these rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

# Number of entries, and the digest of all names and shapes as `digest` computes it.
FACTS = {
    "cascade_mask_rcnn_R_101_FPN_1x_dconv_c3-c5": (766, "9b1c9869b432d44a"),
    "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5": (426, "c2746c8ac95e4fac"),
    "cascade_mask_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": (766, "240081034baeba10"),
    "cascade_rcnn_R_101_FPN_1x_dconv_c3-c5": (730, "d36397866fc351bc"),
    "cascade_rcnn_R_50_FPN_1x_dconv_c3-c5": (390, "28942399c354a0d2"),
    "faster_rcnn_R_101_FPN_1x_dconv_c3-c5": (714, "413bc0e051e0c8d8"),
    "faster_rcnn_R_50_FPN_1x_dconv_c3-c5": (374, "0de673d4a93bcae1"),
    "faster_rcnn_R_50_FPN_1x_dpool": (372, "f064dd271fd7732b"),
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5": (374, "5f574d1ba57e387f"),
    "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5_group4": (374, "059c6b401eb34921"),
    "faster_rcnn_R_50_FPN_1x_mdpool": (388, "3da0e42197718c05"),
    "faster_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5": (714, "00908580d9a49f70"),
    "mask_rcnn_R_101_FPN_1x_dconv_c3-c5": (726, "1730782c3adc1e8e"),
    "mask_rcnn_R_50_FPN_1x_dconv_c3-c5": (386, "120057d653e94860"),
    "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5": (386, "31843a640caab008"),
}

Layout = dict[str, tuple[int, ...]]


def published_layout(row: str) -> Layout:
    """Names and shapes of the entries of a row's checkpoint in MMDetection's layout.

    Args:
        row: name of a row of the zoo, for example "faster_rcnn_R_50_FPN_1x_dconv_c3-c5".
    """
    layout: Layout = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int, bias: bool = True) -> None:
        layout[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            layout[f"{name}.bias"] = (outputs,)

    def norm(name: str, channels: int) -> None:
        for parameter in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{name}.{parameter}"] = (channels,)
        layout[f"{name}.num_batches_tracked"] = ()

    def linear(name: str, outputs: int, inputs: int) -> None:
        layout[f"{name}.weight"], layout[f"{name}.bias"] = (outputs, inputs), (outputs,)

    groups, width = (32, 128) if "X_101" in row else (1, 64)
    deform_groups = 4 if "group4" in row else 1
    offsets = 27 * deform_groups if "mdconv" in row else 18 * deform_groups if "dconv" in row else 0
    conv("backbone.conv1", 64, 3, 7, bias=False)
    norm("backbone.bn1", 64)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6 if "R_50" in row else 23, 3), start=1):
        middle, outputs = width * 2 ** (stage - 1), 256 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"backbone.layer{stage}.{block}"
            conv(f"{name}.conv1", middle, inputs, 1, bias=False)
            conv(f"{name}.conv2", middle, middle // groups, 3, bias=False)
            if offsets and stage > 1:
                conv(f"{name}.conv2.conv_offset", offsets, middle, 3)
            conv(f"{name}.conv3", outputs, middle, 1, bias=False)
            for number, channels in enumerate((middle, middle, outputs), start=1):
                norm(f"{name}.bn{number}", channels)
            if block == 0:
                conv(f"{name}.downsample.0", outputs, inputs, 1, bias=False)
                norm(f"{name}.downsample.1", outputs)
            inputs = outputs
        conv(f"neck.lateral_convs.{stage - 1}.conv", 256, outputs, 1)
        conv(f"neck.fpn_convs.{stage - 1}.conv", 256, 256, 3)

    conv("rpn_head.rpn_conv", 256, 256, 3)
    conv("rpn_head.rpn_cls", 3, 256, 1)
    conv("rpn_head.rpn_reg", 12, 256, 1)

    if "dpool" in row:
        branches = {"offset_fc": (1024, 1024, 2 * 7 * 7)} | ({"mask_fc": (1024, 7 * 7)} if "mdpool" in row else {})
        for level in range(4):
            for branch, sizes in branches.items():
                for number, (size, before) in enumerate(zip(sizes, (256 * 7 * 7, *sizes))):
                    linear(f"roi_head.bbox_roi_extractor.roi_layers.{level}.{branch}.{2 * number}", size, before)

    cascade = row.startswith("cascade")
    for stage_dot in ("0.", "1.", "2.") if cascade else ("",):
        linear(f"roi_head.bbox_head.{stage_dot}fc_cls", 81, 1024)
        linear(f"roi_head.bbox_head.{stage_dot}fc_reg", 4 if cascade else 320, 1024)
        linear(f"roi_head.bbox_head.{stage_dot}shared_fcs.0", 1024, 256 * 7 * 7)
        linear(f"roi_head.bbox_head.{stage_dot}shared_fcs.1", 1024, 1024)
        if "mask" in row:
            for number in range(4):
                conv(f"roi_head.mask_head.{stage_dot}convs.{number}.conv", 256, 256, 3)
            conv(f"roi_head.mask_head.{stage_dot}upsample", 256, 256, 2)
            conv(f"roi_head.mask_head.{stage_dot}conv_logits", 80, 256, 1)
    return layout


def digest(layout: Mapping[str, Iterable[int]]) -> str:
    """Digest of names and shapes, whatever their order."""
    lines = "\n".join(f"{name} {list(shape)}" for name, shape in sorted(layout.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def zeros(layout: Layout) -> dict[str, np.ndarray]:
    """A state dict of that layout whose arrays take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in layout.items()}

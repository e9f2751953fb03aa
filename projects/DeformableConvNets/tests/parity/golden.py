# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Small cases whose outputs by MMDetection are kept in `golden/`. `python -m tests.parity.golden` makes them again.

Each case is a row of the zoo made narrow, with weights and an image from a seed. Its file holds the outputs and, with
the origin, what is needed to make weights and image again where mmdet is absent. Making them needs mmdet.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.parity.compare import Outputs, compare

FOLDER = Path(__file__).parent / "golden"
# Case -> row, the pooling that takes the place of mmcv's CUDA operator, and the POOLER_TYPE if it is not the row's.
CASES: dict[str, tuple[str, str, str]] = {
    "faster_mdconv": ("faster_rcnn_R_50_FPN_1x_mdconv_c3-c5_group4", "", ""),
    "mask_dconv": ("mask_rcnn_R_50_FPN_1x_dconv_c3-c5", "", ""),
    "cascade_mask_dconv": ("cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5", "", ""),
    "x101_dconv": ("faster_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5", "", ""),
    "mdpool_original": ("faster_rcnn_R_50_FPN_1x_mdpool", "original", ""),
    "mdpool_aligned": ("faster_rcnn_R_50_FPN_1x_mdpool", "aligned", "ModulatedDeformRoIPool"),
}
CLASSES, WIDTH, FPN_WIDTH, FC_WIDTH = 10, 16, 32, 64
GROUPS, GROUP_WIDTH = 4, 8
PROPOSALS = 100
# Masks are what makes files large. Without them all detections above the score threshold are compared.
DETECTIONS_WITH_MASKS, DETECTIONS = 30, 1000
SAMPLES = 200  # kept values of each FPN map


def image(seed: int, height: int = 128, width: int = 192) -> np.ndarray:
    """A mosaic of coloured tiles with noise, (height, width, 3) RGB uint8."""
    random = np.random.RandomState(seed)
    tiles = np.kron(random.randint(0, 200, (height // 16, width // 16, 3)), np.ones((16, 16, 1), np.int64))
    return (tiles + random.randint(0, 56, (height, width, 3))).astype(np.uint8)


def slim_mmdet(config: Any) -> None:
    """Makes a config of MMDetection narrow."""
    model = config.model
    model.backbone.update(depth=50, base_channels=WIDTH)
    if model.backbone.type == "ResNeXt":
        model.backbone.update(groups=GROUPS, base_width=GROUP_WIDTH)
    model.neck.update(in_channels=[4 * WIDTH * 2**stage for stage in range(4)], out_channels=FPN_WIDTH)
    model.rpn_head.update(in_channels=FPN_WIDTH, feat_channels=FPN_WIDTH)
    heads = model.roi_head
    heads.bbox_roi_extractor.out_channels = FPN_WIDTH
    if "output_channels" in heads.bbox_roi_extractor.roi_layer:
        heads.bbox_roi_extractor.roi_layer.update(output_channels=FPN_WIDTH, deform_fc_channels=FC_WIDTH)
    for head in heads.bbox_head if isinstance(heads.bbox_head, list) else [heads.bbox_head]:
        head.update(in_channels=FPN_WIDTH, fc_out_channels=FC_WIDTH, num_classes=CLASSES)
    if "mask_head" in heads:
        heads.mask_roi_extractor.out_channels = FPN_WIDTH
        heads.mask_head.update(in_channels=FPN_WIDTH, conv_out_channels=FPN_WIDTH, num_classes=CLASSES)
    model.test_cfg.rpn.update(nms_pre=2 * PROPOSALS, max_per_img=PROPOSALS)
    model.test_cfg.rcnn.max_per_img = DETECTIONS_WITH_MASKS if "mask_head" in heads else DETECTIONS


def slim_detectron2(cfg: Any, pooler: str) -> None:
    """Makes the config of the same row in Detectron2 equally narrow."""
    model = cfg.MODEL
    model.RESNETS.DEPTH = 50
    model.RESNETS.STEM_OUT_CHANNELS, model.RESNETS.RES2_OUT_CHANNELS = WIDTH, 4 * WIDTH
    model.RESNETS.WIDTH_PER_GROUP = WIDTH
    if model.RESNETS.NUM_GROUPS > 1:
        model.RESNETS.NUM_GROUPS, model.RESNETS.WIDTH_PER_GROUP = GROUPS, GROUP_WIDTH
    model.FPN.OUT_CHANNELS = FPN_WIDTH
    model.ROI_BOX_HEAD.FC_DIM = model.DCN.POOLER_FC_DIM = FC_WIDTH
    model.ROI_MASK_HEAD.CONV_DIM = FPN_WIDTH
    model.ROI_HEADS.NUM_CLASSES = CLASSES
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = 2 * PROPOSALS, PROPOSALS
    cfg.TEST.DETECTIONS_PER_IMAGE = DETECTIONS_WITH_MASKS if model.MASK_ON else DETECTIONS
    if pooler:
        model.ROI_BOX_HEAD.POOLER_TYPE = pooler


def thin(outputs: Outputs) -> Outputs:
    """Leaves of the FPN maps so many values as a small file can hold, and no input."""
    kept = {name: value for name, value in outputs.items() if name != "input"}
    for name in kept:
        if name in ("p2", "p3", "p4", "p5", "p6"):
            flat = kept[name].reshape(-1)
            kept[name] = flat[np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(np.int64)]
    return kept


def make(name: str, seed: int) -> bool:
    """Makes one golden file; returns False if a small change would turn a decision in it: it needs another seed."""
    import mmcv
    import mmdet
    import torch

    from benchmarks.parity import oracle, runner

    row, pooling, pooler = CASES[name]
    config = oracle.load_config(row)
    slim_mmdet(config)
    model = oracle.build(config)
    data = oracle.prepare(np.ascontiguousarray(image(seed)[:, :, ::-1]), (128, 192))
    with runner.pooled_as(pooling):
        gains, centres = oracle.calibrate(model, data, seed)
        outputs = thin(oracle.predict(model, data))
        if not _is_stable(oracle.build(config), model.state_dict(), data, outputs):
            return False
    origin = {
        "made by": "python -m tests.parity.golden",
        "versions": {"mmdet": mmdet.__version__, "mmcv": mmcv.__version__, "torch": torch.__version__.split("+")[0]},
        "case": name,
        "row": row,
        "pooling": pooling or "RoIAlign",
        "pooler": pooler,
        "seed": seed,
        "shapes": {key: list(value.shape) for key, value in model.state_dict().items()},
        "gains": gains,
    }
    if "masks" in outputs:
        outputs["masks_shape"] = np.array(outputs["masks"].shape)
        outputs["masks"] = np.packbits(outputs["masks"])
    FOLDER.mkdir(exist_ok=True)
    saved = {f"output/{key}": value for key, value in outputs.items()}
    saved |= {f"centre/{key}": value for key, value in centres.items()}
    np.savez_compressed(FOLDER / f"{name}.npz", origin=np.frombuffer(json.dumps(origin).encode(), np.uint8), **saved)
    return True


def _is_stable(model: Any, state: dict[str, Any], data: dict[str, Any], outputs: Outputs) -> bool:
    """Whether the outputs stay when all weights change by about 3e-7 of their size, thrice.

    That does more to them than the rounding of another processor.
    """
    import torch

    from benchmarks.parity import oracle

    for attempt in range(3):
        generator = torch.Generator().manual_seed(attempt)

        def disturbed(value: Any, generator: Any = generator) -> Any:
            noise = 3e-7 * torch.randn(value.shape, generator=generator)
            return value * (1 + noise) if value.is_floating_point() else value

        model.load_state_dict({key: disturbed(value) for key, value in state.items()})
        row = compare(thin(oracle.predict(model, data)), outputs)
        print(row)
        same = row["proposals_matched"] == PROPOSALS and row["boxes_px"] < 3e-3 and row["scores"] < 5e-5
        same &= row["detections_matched"] == row["detections"] == row["detections_ours"] >= 10
        if not same:
            return False
    return True


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], Outputs]:
    """Reads a golden file: its origin, centres, outputs."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    origin = json.loads(arrays.pop("origin").tobytes())
    centres = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith("centre/")}
    outputs = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith("output/")}
    if "masks" in outputs:
        shape = outputs.pop("masks_shape")
        outputs["masks"] = np.unpackbits(outputs["masks"], count=int(shape.prod())).reshape(shape).astype(bool)
    return origin, centres, outputs


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        if not any(make(case, seed) for seed in range(1, 40)):
            raise SystemExit(f"{case}: no seed gives stable outputs")

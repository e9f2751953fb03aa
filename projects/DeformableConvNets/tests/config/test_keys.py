# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY, PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.backbone import resnet
from detectron2.utils.file_io import PathManager

import dcn_d2.layers
from dcn_d2 import add_dcn_config
from dcn_d2.config.table import OUR_RULES

from ..slim import slim_config


def test_defaults_leave_detectron2_as_it_is() -> None:
    cfg, plain = get_cfg(), get_cfg()
    add_dcn_config(cfg)
    assert cfg.MODEL.DCN.NORM_EVAL is False
    assert cfg.INPUT.RESIZE_WITH == "PIL" and cfg.INPUT.CANVAS_TEST == ()
    assert cfg.SOLVER.REFERENCE_IMS_PER_BATCH == 0
    assert cfg.SOLVER.OFFSET_LR_FACTOR == 1.0
    assert cfg.SOLVER.ACCUMULATE_BATCHES == 1 and not cfg.SOLVER.EMA.ENABLED
    assert cfg.TEST.BEST_METRIC == "" and not cfg.TEST.LOSS and cfg.TEST.PATIENCE == 0
    del (
        cfg["PUBLISHED"],
        cfg["TRACKING"],
        cfg.TEST["PICTURES"],
        cfg.TEST["REPORT"],
        cfg.MODEL["DCN"],
        cfg.INPUT["RESIZE_WITH"],
        cfg.INPUT["CANVAS_TEST"],
        cfg.SOLVER["REFERENCE_IMS_PER_BATCH"],
        cfg.SOLVER["OFFSET_LR_FACTOR"],
        cfg.TEST["COCO_EVAL"],
        cfg.TEST["PANOPTIC_QUALITY"],
        cfg.SOLVER["ACCUMULATE_BATCHES"],
        cfg.SOLVER["EMA"],
        cfg.SOLVER.AMP["DTYPE"],
    )
    for key in ("BEST_METRIC", "BEST_MODE", "PATIENCE", "MIN_DELTA", "LOSS"):
        del cfg.TEST[key]
    for key in ("OWN", "CLASS_NAMES", "KEYPOINT_NAMES", "KEYPOINT_FLIP_MAP"):
        assert cfg.DATASETS.pop(key) == ()
    assert cfg == plain


def test_second_call_changes_nothing() -> None:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.MODEL.DCN.NORM_EVAL = True
    cfg.PUBLISHED.BOX_AP = 41.3
    before = cfg.dump()
    add_dcn_config(cfg)
    assert cfg.dump() == before


def test_everything_is_registered() -> None:
    add_dcn_config(get_cfg())
    for name in ("resnet", "resnet_fpn", "retinanet_resnet_fpn"):
        assert f"build_dcn_{name}_backbone" in BACKBONE_REGISTRY
    assert {"nuclei_train", "nuclei_val"} <= set(DatasetCatalog)
    assert "DCNRPN" in PROPOSAL_GENERATOR_REGISTRY
    assert "DCNROIHeads" in ROI_HEADS_REGISTRY and "DCNCascadeROIHeads" in ROI_HEADS_REGISTRY
    with pytest.raises(FileNotFoundError, match="there is no file /nowhere/a.pth"):  # the handler was asked
        PathManager.get_local_path("mmdet:///nowhere/a.pth")
    assert resnet.DeformConv is dcn_d2.layers.DeformConv
    assert resnet.ModulatedDeformConv is dcn_d2.layers.ModulatedDeformConv


def test_each_key_has_its_sentence(project: Path) -> None:
    lines = (project / "dcn_d2" / "config" / "keys.py").read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"    _add\(", line)]
    assert len(keys) == len(OUR_RULES)
    assert all(re.match(r"    # .*[.]$", lines[number - 1]) for number in keys)


# What `launch` does on another process: the config comes by pickle, and nobody calls add_dcn_config there.
UNPICKLE = """
import pickle, sys
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
cfg = pickle.loads(sys.stdin.buffer.read())
build_model(cfg)
cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"  # Detectron2's own, whose deformable blocks may lack operators
build_model(cfg)
assert len(DatasetCatalog.get("nuclei_val")) > 0
assert any(prefix.startswith("mmdet") for prefix in PathManager._path_handlers)
"""


@pytest.mark.parametrize(
    "start", ["from dcn_d2.config import register; register(); register()", "import dcn_d2.engine"]
)
def test_a_process_that_got_its_config_by_pickle_found_no_backbone(start: str) -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, False, False, True])
    subprocess.run([sys.executable, "-c", start + UNPICKLE], input=pickle.dumps(cfg), check=True)

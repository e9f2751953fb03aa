# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Values that cannot work are refused before anything is built, and keys that nothing reads are named."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.utils import logger as detectron2_logger

from dcn_d2 import add_dcn_config, model_zoo
from dcn_d2.config import ConfigError, check_config, load_config
from dcn_d2.config.access import keys_of, value_of
from dcn_d2.config.checks import find_problems, unread_keys
from dcn_d2.config.table import DETECTRON2_RULES, OUR_RULES, RULES

from ..slim import slim_config

CASCADE = "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5"
DPOOL = "faster_rcnn_R_50_FPN_1x_mdpool"
NAN, INF = math.nan, math.inf


def put(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """Sets a key as code does, without the type check of a file or an option."""
    *nodes, last = key.split(".")
    for node in nodes:
        cfg = cfg[node]
    cfg[last] = value
    return cfg


@pytest.fixture(autouse=True)
def _say_again() -> Iterator[None]:
    """Forgets which warnings have been given."""
    detectron2_logger._LOG_COUNTER.clear()
    yield
    detectron2_logger._LOG_COUNTER.clear()


class TestTable:
    def test_has_all_keys_of_ours(self) -> None:
        cfg, plain = get_cfg(), set(keys_of(get_cfg()))
        add_dcn_config(cfg)
        assert set(OUR_RULES) == set(keys_of(cfg)) - plain

    def test_has_only_keys_that_exist(self) -> None:
        assert set(keys_of(get_cfg())) >= set(DETECTRON2_RULES)

    @pytest.mark.parametrize("key", RULES)
    def test_refuses_what_no_key_can_be(self, key: str) -> None:
        for value in (NAN, "\0", ["no"], {"a": 1}, object()):
            if key.endswith((".WEIGHTS", ".LOG", ".NAME", "_DIR", "HEAD_NAME", "META_ARCHITECTURE")) and value == "\0":
                continue
            lists_of_names = (".IN_FEATURES", "DATASETS.TRAIN", "DATASETS.TEST", "CLASS_NAMES", "KEYPOINT_NAMES")
            if key.endswith(lists_of_names) and value == ["no"]:
                continue
            assert RULES[key](value) is not None, value

    @pytest.mark.parametrize("key", [key for key in RULES if key != "SOLVER.WEIGHT_DECAY_BIAS"])
    def test_none_was_accepted_for_every_key(self, key: str) -> None:
        with pytest.raises(ConfigError, match=f"{key} .*got None"):
            load_config("", [key, "None"])


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("SOLVER.OFFSET_LR_FACTOR", -1.0, "must be a finite number of at least 0, got -1.0"),
        ("SOLVER.OFFSET_LR_FACTOR", NAN, "must be a finite number of at least 0, got nan"),
        ("SOLVER.OFFSET_LR_FACTOR", INF, "must be a finite number of at least 0, got inf"),
        ("MODEL.DCN.RPN_PADDING_DIVISOR", -5, "must be a whole number of at least 0 .*, got -5"),
        ("MODEL.DCN.RPN_LOW_QUALITY_IOU", 2.0, "must be a number from 0 to 1, or -1, got 2.0"),
        ("MODEL.DCN.RPN_LOW_QUALITY_IOU", -0.5, "must be a number from 0 to 1, or -1, got -0.5"),
        ("MODEL.DCN.POOLER_FC_DIM", 0, "must be a whole number from 1 to 65536, got 0"),
        ("MODEL.DCN.POOLER_FC_DIM", 10**30, "must be a whole number from 1 to 65536, not more than .*, got 10"),
        ("MODEL.DCN.POOLER_FC_DIM", True, "must be a whole number from 1 to 65536, got True"),
        (
            "MODEL.DCN.MEMORY_FORMAT",
            "channel_last",
            "must be auto, contiguous or channels_last; did you mean 'channels_l",
        ),
        (
            "MODEL.DCN.CASCADE_LOSS_WEIGHTS",
            (1.0, -1.0),
            r"at least 0 in all its values \(number 2 is -1.0\), got \(1.0",
        ),
        ("INPUT.RESIZE_WITH", "CV2", "must be PIL or cv2; did you mean 'cv2'.*, got 'CV2'"),
        (
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
            ["no", "yes", "yes", "yes"],
            r"True or False in all its values \(number 1",
        ),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True], "needs 4 values, for res2 to res5, got"),
        ("MODEL.RESNETS.DEFORM_NUM_GROUPS", 0, "must be a whole number from 1 to 65536, got 0"),
        ("MODEL.RESNETS.DEFORM_NUM_GROUPS", -1, "must be a whole number from 1 to 65536, got -1"),
        (
            "MODEL.RESNETS.DEFORM_NUM_GROUPS",
            3,
            "must divide the 128 channels .* of res3, for example 1, 2, 4, 8.*, got 3",
        ),
        ("MODEL.RESNETS.DEPTH", 51, "must be 18, 34, 50, 101 or 152, got 51"),
        ("MODEL.RESNETS.NORM", "BNN", """must be "", BN, SyncBN.*; did you mean 'BN'\\?, got 'BNN'"""),
        ("MODEL.RESNETS.NORM", "bn", "did you mean 'BN'"),
        ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res6"], "must be stem, res2, res3, res4 or res5"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", "no", "must be True or False, got 'no'"),
        ("MODEL.BACKBONE.FREEZE_AT", 9, "must be a whole number from 0 to 5 .*, got 9"),
        ("MODEL.FPN.FUSE_TYPE", "summ", "must be sum or avg; did you mean 'sum'"),
        ("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res5"], "must be stages that follow each other"),
        ("MODEL.FPN.IN_FEATURES", [], "must be stages that follow each other"),
        (
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
            "DeformRoiPool",
            "must be .*; did you mean 'DeformRoIPool'.*got 'DeformRoiPool'",
        ),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", 0, "and NUM_CONV are both 0"),
        ("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignV3", "did you mean 'ROIAlignV2'"),
        (
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
            (0.5, 0.6),
            "BBOX_REG_WEIGHTS has 3 values, but .*IOUS says that there are 2",
        ),
        (
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
            (0.4, 0.6, 0.7),
            "must begin with MODEL.ROI_HEADS.IOU_THRESHOLDS, 0.5, got",
        ),
        ("MODEL.DCN.CASCADE_LOSS_WEIGHTS", (1.0, 0.5), "has 2 values, but .*IOUS says that there are 3 stages"),
        (
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
            False,
            "must be True with MODEL.ROI_HEADS.NAME DCNCascadeROIHeads",
        ),
        ("MODEL.DCN.CASCADE_RESAMPLE", False, "CASCADE_MASK_HEADS needs MODEL.DCN.CASCADE_RESAMPLE"),
        (
            "MODEL.RPN.IN_FEATURES",
            ["p2", "p3", "p4", "p5", "p7"],
            "has p7, but build_dcn_resnet_fpn_backbone gives only p2",
        ),
        ("MODEL.RPN.IOU_LABELS", [0, 1], "must have one value more than MODEL.RPN.IOU_THRESHOLDS .2., got 2"),
        ("MODEL.RPN.NMS_THRESH", 70.0, "must be a number from 0 to 1, got 70.0"),
        (
            "MODEL.ANCHOR_GENERATOR.SIZES",
            [[32], [64]],
            "must have a list for each of the 5 levels .*, or one for all, got 2",
        ),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [32, 64], "must be a list of values, as"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 0, "must be a whole number from 1"),
        ("MODEL.ROI_HEADS.NAME", "DCNRoIHead", "did you mean 'DCNROIHeads'"),
        ("MODEL.BACKBONE.NAME", "build_dcn_resnet_fpn", "did you mean 'build_dcn_resnet_fpn_backbone'"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "DCN_RPN", "did you mean 'DCNRPN'"),
        ("MODEL.DEVICE", "cpuu", "must name a device of torch.*did you mean 'cpu'.*got 'cpuu'"),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], r"above 0 in all its values \(number 2 is 0.0\)"),
        ("MODEL.PIXEL_STD", [1.0], "must have as many values as MODEL.PIXEL_MEAN, 3, got 1"),
        ("INPUT.FORMAT", "RBG", "must be BGR, YUV-BT.601, or a mode of PIL.*; did you mean 'RGB'"),
        ("INPUT.FORMAT", "RGBA", "MODEL.PIXEL_MEAN must have 4 values for INPUT.FORMAT RGBA, got 3"),
        ("INPUT.MIN_SIZE_TRAIN", (), "must not be empty"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "must be the least and the largest size"),
        (
            "MODEL.ROI_HEADS.IN_FEATURES",
            ["p5", "p4", "p3", "p2"],
            "must have levels that follow one another",
        ),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5", "p5"], "must have levels that follow one another"),
        ("SOLVER.STEPS", (80630, 58640), r"must be in increasing order, got \(80630"),
        ("SOLVER.STEPS", (10, 10), "must not have a value twice, got"),
        ("SOLVER.STEPS", (0,), "must be a whole number of at least 1 in all its values .number 1 is 0."),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "must be a whole number of at least 1, got 0"),
        ("SOLVER.IMS_PER_BATCH", 0, "must be a whole number of at least 1, got 0"),
        ("SOLVER.WARMUP_METHOD", "cosine", "must be linear or constant"),
        ("TEST.DETECTIONS_PER_IMAGE", 0, r"must be a whole number of at least 1, or -1 \(-1 keeps all\), got 0"),
        ("DATASETS.TRAIN", "nuclei_train", "must be a list of values, as"),
        ("OUTPUT_DIR", "", "must be a name, got ''"),
        ("OUTPUT_DIR", "~/runs/a", "must be a folder without ~"),
    ],
)
def test_a_value_that_cannot_work_was_accepted(key: str, value: Any, allowed: str) -> None:
    cfg = model_zoo.get_config(CASCADE)
    assert value_of(cfg, key) != value
    put(cfg, key, value)
    with pytest.raises(ConfigError, match=allowed) as error:
        check_config(cfg)
    assert key in str(error.value)
    if key.startswith("MODEL.") and not key.startswith(("MODEL.PIXEL", "MODEL.DEVICE", "MODEL.BACKBONE.NAME")):
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"), pytest.raises(ConfigError, match=allowed):
            build_model(cfg)


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(
        ConfigError, match=r"2 values of the config are wrong:\n.*SEED must.*\n.*VIS_PERIOD must"
    ) as error:
        load_config("", ["VIS_PERIOD", "-2", "SEED", "-2"])
    assert str(error.value).count("\n") == 2


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.OFFSET_LR_FACTOR", 1),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [0, 1, 1, 1]),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", (False, True, True, True)),
        ("SOLVER.WEIGHT_DECAY_BIAS", None),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.1),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", INF),
        ("INPUT.MIN_SIZE_TEST", 0),
        ("TEST.DETECTIONS_PER_IMAGE", -1),
        ("INPUT.FORMAT", "L"),  # a grey image takes the mean of each channel of a network for colour
        ("MODEL.DEVICE", "cuda"),
        ("MODEL.DEVICE", "meta"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"),
    ],
)
def test_equivalent_and_special_values_are_accepted(key: str, value: Any) -> None:
    cfg = model_zoo.get_config(CASCADE)
    put(cfg, key, value)
    check_config(cfg)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config("", ["MODEL.DEVICE", "cuda:9"])  # may be meant for another machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_config(cfg)  # fit_to_machine takes the CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="MODEL.DEVICE is cuda:9, but the GPUs of this machine are 0 to 1"):
        check_config(cfg)
    cfg.MODEL.DEVICE = "cuda:1"
    check_config(cfg)


def test_training_needs_data() -> None:
    cfg = load_config("")
    check_config(cfg)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is empty: nothing to train on"):
        check_config(cfg, training=True)


@pytest.mark.parametrize("name, width", [("RESNETS", 16), ("FPN", 48), ("ROI_BOX_HEAD", 48)])
def test_group_norm_names_the_width_that_does_not_fit(name: str, width: int) -> None:
    cfg = slim_config()
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = "DCNROIHeads", 1
    cfg.MODEL[name].NORM = "GN"
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 48
    with pytest.raises(ConfigError, match=f"MODEL.{name}.NORM is GN, .* must be a multiple of 32, got {width}"):
        build_model(cfg)


@pytest.mark.parametrize("head", ["ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"])
@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_a_deformable_pooler_names_the_heads_it_needs(heads: str, head: str) -> None:
    cfg = slim_config()
    cfg.MODEL.ROI_HEADS.NAME = heads
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL[head].POOLER_TYPE = "DeformRoIPool"
    message = f"MODEL.{head}.POOLER_TYPE is 'DeformRoIPool', which needs MODEL.ROI_HEADS.NAME DCNROIHeads or DCNCasc"
    with pytest.raises(ConfigError, match=message):
        build_model(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"  # nothing of dcn_d2 is built
    with pytest.raises(ConfigError, match=message):
        load_config("", [word for key in keys_of(cfg) for word in (key, value_of(cfg, key))])


def test_retinanet_names_the_backbone_with_p7() -> None:
    cfg = slim_config()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(
        ConfigError, match="IN_FEATURES has p7, but .*; p7 is in build_dcn_retinanet_resnet_fpn_backbone"
    ):
        build_model(cfg)


class TestUnread:
    @pytest.mark.parametrize("name", model_zoo.list_models())
    def test_rows_of_the_zoo_say_nothing(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        cfg = model_zoo.get_config(name)
        assert unread_keys(cfg) == [] and find_problems(cfg) == []
        check_config(cfg, training=True)
        assert not caplog.records

    def test_the_examples_and_the_defaults_say_nothing(self, project: Path) -> None:
        examples = sorted((project / "examples").glob("*_rcnn_*.yaml"))
        assert len(examples) == 2
        assert all(unread_keys(load_config(str(example))) == [] for example in examples)
        assert unread_keys(load_config("")) == []

    @pytest.mark.parametrize(
        "row, changes, unread, reason",
        [
            (
                CASCADE,
                ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN"],
                ["RPN_LOW_QUALITY_IOU", "RPN_PADDING_DIVISOR", "RPN_LOSS_PER_SAMPLE"],
                "MODEL.PROPOSAL_GENERATOR.NAME is 'RPN', and only DCNRPN reads it",
            ),
            (
                CASCADE,
                ["MODEL.ROI_HEADS.NAME", "DCNROIHeads"],
                ["AVERAGE_LOGITS", "MASK_HEADS", "RESAMPLE", "LOSS_WEIGHTS", "SCALE_GRADIENTS"],
                "MODEL.ROI_HEADS.NAME is 'DCNROIHeads', and only DCNCascadeROIHeads reads it",
            ),
            (CASCADE, ["MODEL.MASK_ON", "False"], ["CASCADE_MASK_HEADS"], "MODEL.MASK_ON is False"),
            (
                DPOOL,
                ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"],
                ["POOLER_MMDET_LEVELS"],
                "MODEL.ROI_HEADS.NAME is 'StandardROIHeads', and only DCNROIHeads and DCNCascadeROIHeads read it",
            ),
            (
                DPOOL,
                ["MODEL.DCN.POOLER_FC_DIM", "512", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"],
                ["POOLER_FC_DIM"],
                "no pooler is deformable",
            ),
            (
                CASCADE,
                ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.DCN.MEMORY_FORMAT", "contiguous"],
                ["NORM_EVAL", "MEMORY_FORMAT"],
                "MODEL.BACKBONE.NAME is 'build_resnet_fpn_backbone', and only those named build_dcn_... read it",
            ),
            (
                DPOOL,
                ["MODEL.RESNETS.DEFORM_MODULATED", "True", "MODEL.RESNETS.DEFORM_NUM_GROUPS", "4"]
                + ["SOLVER.OFFSET_LR_FACTOR", "0.1"],
                ["DEFORM_MODULATED", "DEFORM_NUM_GROUPS", "OFFSET_LR_FACTOR"],
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE makes no stage deformable",
            ),
            (CASCADE, ["SOLVER.EMA.DECAY", "0.5"], ["SOLVER.EMA.DECAY"], "SOLVER.EMA.ENABLED is False"),
            (CASCADE, ["TEST.BEST_MODE", "min"], ["TEST.BEST_MODE"], 'TEST.BEST_METRIC is ""'),
            (CASCADE, ["TEST.MIN_DELTA", "0.5"], ["TEST.MIN_DELTA"], "TEST.PATIENCE is 0"),
        ],
    )
    def test_keys_that_nothing_reads_were_ignored(
        self, row: str, changes: list[str], unread: list[str], reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        cfg = load_config(model_zoo.get_config_file(row), changes)
        assert not caplog.records  # it may be changed further
        check_config(cfg)
        check_config(cfg)
        said = [record.getMessage() for record in caplog.records]
        assert all(record.levelno == logging.WARNING for record in caplog.records)
        assert len(said) == len(unread)
        for key in unread:
            (line,) = (line for line in said if f"{key} is " in line.split(", but nothing reads it: ")[0])
            assert line.endswith(reason) or reason in line

    def test_another_architecture_reads_none_of_it(self) -> None:
        cfg = load_config(model_zoo.get_config_file(CASCADE), check=False)
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DCN.ROI_LOW_QUALITY_IOU = "RetinaNet", 0.5
        unread = {key.removeprefix("MODEL.DCN.").partition("_")[0] for key, _ in unread_keys(cfg)}
        assert unread == {"RPN", "ROI", "POOLER", "CASCADE"}

    def test_builders_say_it_too(self, caplog: pytest.LogCaptureFixture) -> None:
        cfg = slim_config()
        cfg.MODEL.DCN.POOLER_FC_DIM, cfg.MODEL.DCN.RPN_PADDING_DIVISOR = 1024, 32
        build_model(cfg)
        assert [record.getMessage().split(" is ")[0] for record in caplog.records] == ["MODEL.DCN.RPN_PADDING_DIVISOR"]

    def test_nothing_is_said_of_parts_of_others(self) -> None:
        class TheirRCNN(GeneralizedRCNN):
            pass

        META_ARCH_REGISTRY.register(TheirRCNN)
        try:
            cfg = model_zoo.get_config(CASCADE)
            cfg.MODEL.META_ARCHITECTURE = "TheirRCNN"
            cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
            assert unread_keys(cfg) == []
        finally:
            del META_ARCH_REGISTRY._obj_map["TheirRCNN"]


def test_a_part_of_ones_own_is_left_alone() -> None:
    # What an FPN of one's own reads of the config is not known; the ResNet below it is ours.
    cfg = slim_config()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.META_ARCHITECTURE = "build_their_backbone", "TheirModel"
    cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.FPN.IN_FEATURES = ["n1"], ["res4"]
    from detectron2.layers import ShapeSpec

    build = BACKBONE_REGISTRY.get("build_dcn_resnet_backbone")
    build(cfg, ShapeSpec(channels=3))
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE, cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = [False, False, True, True], 5
    with pytest.raises(ConfigError, match="DEFORM_NUM_GROUPS must divide the 64 channels .* of res4, for example"):
        build(cfg, ShapeSpec(channels=3))


def test_values_that_a_backbone_of_ones_own_reads_were_refused() -> None:
    # ResNeSt has 200 layers, others have norms and stages of their own, all in Detectron2's keys.
    cfg = slim_config(DEPTH=200, NORM="TheirNorm", OUT_FEATURES=["stage1"], RES5_DILATION=4)
    own = [f"MODEL.RESNETS.{key}" for key in ("DEPTH", "NORM", "OUT_FEATURES", "RES5_DILATION")]
    assert sorted(key for key, _ in find_problems(cfg)) == sorted(own)
    BACKBONE_REGISTRY._do_register("build_theirs", lambda cfg, shape: None)
    try:
        cfg.MODEL.BACKBONE.NAME = "build_theirs"
        assert find_problems(cfg) == []
    finally:
        del BACKBONE_REGISTRY._obj_map["build_theirs"]


class TestBoxWeights:
    def test_rotated_boxes_were_refused(self) -> None:
        cfg = slim_config()
        cfg.MODEL.ANCHOR_GENERATOR.NAME, cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RotatedAnchorGenerator", "RRPN"
        cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "RROIHeads", "ROIAlignRotated"
        cfg.MODEL.RPN.BBOX_REG_WEIGHTS = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (10, 10, 5, 5, 1)
        check_config(cfg)
        build_model(cfg)

    @pytest.mark.parametrize("node", ["RPN", "ROI_BOX_HEAD"])
    def test_another_number_failed_at_the_first_iteration(self, node: str) -> None:
        cfg = slim_config()
        cfg.MODEL[node].BBOX_REG_WEIGHTS = (10, 10, 5, 5, 1)
        with pytest.raises(ConfigError, match=f"MODEL.{node}.BBOX_REG_WEIGHTS must have 4 values, .* got "):
            check_config(cfg)

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The config keys of dcn_d2. With their defaults, everything works as in Detectron2."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode as CN


def add_dcn_keys(cfg: CN) -> None:
    """Adds dcn_d2's keys to `cfg`, without registering anything; keys that it has already keep their values."""
    _add_deformable_keys(cfg)
    _add_mmdetection_keys(cfg)
    _add_zoo_keys(cfg)
    _add_evaluation_keys(cfg)
    _add_own_data_keys(cfg)
    _add_long_run_keys(cfg)
    _add_tracking_keys(cfg)
    _add_export_keys(cfg)


def with_dcn_keys(cfg: CN) -> CN:
    """Gives `cfg` if it has all keys of dcn_d2, else a copy to which the missing ones are added with their defaults.

    Whatever reads these keys calls it, because a config may have been made without dcn_d2, or by an older one.
    """
    copy = cfg.clone()
    copy.defrost()
    add_dcn_keys(copy)
    return cfg if copy == cfg else copy


def _add(node: CN, key: str, default: Any) -> Any:
    if key not in node:
        node[key] = default
    return node[key]


def _add_deformable_keys(cfg: CN) -> None:
    """Keys of the deformable layers and poolers. Detectron2's own keys say which layers are deformable.

    Those are MODEL.RESNETS.DEFORM_ON_PER_STAGE, DEFORM_MODULATED and DEFORM_NUM_GROUPS, and MODEL.ROI_BOX_HEAD's
    POOLER_TYPE, which may also be DeformPSRoIPool, ModulatedDeformPSRoIPool, DeformRoIPool or ModulatedDeformRoIPool.
    """
    dcn = _add(cfg.MODEL, "DCN", CN())

    # Memory format of the weights of dcn_d2's backbones, and so of all feature maps: "contiguous", "channels_last", or
    # "auto", which is channels_last on CPU, where it was measured to be faster, and contiguous elsewhere. (On an H200
    # in float16, channels_last made inference of a Faster R-CNN 9 % faster and training 4 % slower.)
    # Results are the same up to rounding.
    _add(dcn, "MEMORY_FORMAT", "auto")

    # Width of the hidden layers that predict offsets and masks in the RoI poolers of dcn_d2.
    _add(dcn, "POOLER_FC_DIM", 1024)

    # Factor on the learning rate of the convolutions that predict offsets and masks; MMEngine's dcn_offset_lr_mult.
    # When a model is trained from scratch, a small factor keeps the samples near their regular positions at first.
    _add(cfg.SOLVER, "OFFSET_LR_FACTOR", 1.0)


def _add_mmdetection_keys(cfg: CN) -> None:
    """Keys that choose MMDetection's rules where they differ from Detectron2's; nothing about them is deformable.

    Models that were trained with MMDetection need them to give the same results. Most of them change only training:
    inference depends on POOLER_MMDET_LEVELS, CASCADE_AVERAGE_LOGITS, CASCADE_MASK_HEADS and INPUT.RESIZE_WITH.
    """
    dcn = _add(cfg.MODEL, "DCN", CN())

    # In training, BatchNorm layers of the ResNet normalise with their running statistics and do not update them, while
    # their weights and biases are trained (MMDetection's norm_eval). Other kinds of norms are not changed.
    _add(dcn, "NORM_EVAL", False)

    # DCNROIHeads and DCNCascadeROIHeads choose the FPN level of a box with MMDetection's formula. It differs from
    # Detectron2's formula for boxes that are a tiny bit smaller than 112, 224 or 448 pixels.
    _add(dcn, "POOLER_MMDET_LEVELS", False)

    # Minimum IoU for low-quality matches of anchors in DCNRPN. A ground truth takes the anchors of its highest IoU,
    # even if that is below IOU_THRESHOLDS, when it is at least this minimum. -1 is Detectron2's rule: there is no
    # minimum, and the anchor is matched with the ground truth of the anchor's own highest IoU.
    _add(dcn, "RPN_LOW_QUALITY_IOU", -1.0)

    # DCNRPN ignores anchors whose centre is outside the image after padding it to a multiple of this number, and
    # anchors that RPN.BOUNDARY_THRESH excludes. 0 is Detectron2's rule: all anchors of the batch are matched.
    _add(dcn, "RPN_PADDING_DIVISOR", 0)

    # The losses of DCNRPN are averaged over the sampled anchors, not summed and divided by RPN.BATCH_SIZE_PER_IMAGE.
    _add(dcn, "RPN_LOSS_PER_SAMPLE", False)

    # Minimum IoU for low-quality matches of proposals in DCNROIHeads and DCNCascadeROIHeads. -1 is Detectron2's rule:
    # there are no low-quality matches. In RPN_LOW_QUALITY_IOU, -1 means that there is no minimum.
    _add(dcn, "ROI_LOW_QUALITY_IOU", -1.0)

    # DCNCascadeROIHeads averages the logits of its stages and then takes the softmax, not the mean of probabilities.
    _add(dcn, "CASCADE_AVERAGE_LOGITS", False)

    # DCNCascadeROIHeads has one mask head for each stage, and averages their masks at test time.
    _add(dcn, "CASCADE_MASK_HEADS", False)

    # Each stage of DCNCascadeROIHeads draws a new sample from the boxes of the stage before and the ground truth.
    _add(dcn, "CASCADE_RESAMPLE", False)

    # One factor on the losses of each stage of DCNCascadeROIHeads; empty means 1 for all stages.
    _add(dcn, "CASCADE_LOSS_WEIGHTS", ())

    # Each of the S stages of DCNCascadeROIHeads passes 1 / S of its gradient on to the pooled features.
    _add(dcn, "CASCADE_SCALE_GRADIENTS", True)

    # The library that resizes images in dcn_d2's trainer and predictor: "PIL" as in Detectron2, or "cv2" as in
    # MMDetection.
    _add(cfg.INPUT, "RESIZE_WITH", "PIL")


def _add_zoo_keys(cfg: CN) -> None:
    """Keys of the rows of the zoo: the batch size of their schedule, and what is published for them."""
    # The batch size that SOLVER.BASE_LR is meant for. The trainer scales BASE_LR linearly if IMS_PER_BATCH is another
    # one, and says so. 0 leaves BASE_LR alone.
    _add(cfg.SOLVER, "REFERENCE_IMS_PER_BATCH", 0)

    # PUBLISHED does not change how a model is built or trained.
    published = _add(cfg, "PUBLISHED", CN())
    # Address of the published weights; "" if there are none.
    _add(published, "WEIGHTS", "")
    # Address of the log of their training; "" if there is none.
    _add(published, "LOG", "")
    # Box AP of the weights on COCO val2017, in percent; 0 if it is not known.
    _add(published, "BOX_AP", 0.0)
    # Mask AP of the weights on COCO val2017, in percent; 0 for a model without masks.
    _add(published, "MASK_AP", 0.0)


def _add_evaluation_keys(cfg: CN) -> None:
    """Keys of the evaluation."""
    # The package that computes COCO's AP: "pycocotools", "faster-coco-eval" (the same numbers in less time), or "auto",
    # which is faster-coco-eval where it is installed.
    _add(cfg.TEST, "COCO_EVAL", "auto")

    # On panoptic data sets, measure panoptic quality (PQ), for which the package panopticapi must be installed.
    _add(cfg.TEST, "PANOPTIC_QUALITY", True)


def _add_own_data_keys(cfg: CN) -> None:
    """Keys of data in COCO's format that the config names itself. train_net.py --train-json sets them."""
    # Data sets: [name, annotation file, folder of images] of each. DATASETS.TRAIN and DATASETS.TEST may then name them.
    _add(cfg.DATASETS, "OWN", ())

    # The names of the model's classes, in their order. The categories of DATASETS.OWN are matched with them by name.
    # Empty: each file's own order counts.
    _add(cfg.DATASETS, "CLASS_NAMES", ())

    # The names of the keypoints of DATASETS.OWN, in the order of the annotations.
    _add(cfg.DATASETS, "KEYPOINT_NAMES", ())

    # Pairs of keypoints, [left, right], that change places when an image is flipped.
    _add(cfg.DATASETS, "KEYPOINT_FLIP_MAP", ())


def _add_long_run_keys(cfg: CN) -> None:
    """Keys of long trainings: which checkpoint is the best one, when to stop, and how a step is made."""
    # Number of batches whose gradients are averaged before each step of the optimizer. IMS_PER_BATCH is the number of
    # images in one of them; MAX_ITER, STEPS and all periods count steps.
    _add(cfg.SOLVER, "ACCUMULATE_BATCHES", 1)

    ema = _add(cfg.SOLVER, "EMA", CN())
    # Keep an exponential moving average of the weights, evaluate it, and save it as the model of each checkpoint.
    _add(ema, "ENABLED", False)
    # Share of the average that each step keeps. Of 0.999, the average reaches back over some 1000 steps.
    _add(ema, "DECAY", 0.999)
    # Keep less at first, (1 + n) / (10 + n) after n steps while that is below DECAY, so that the random weights that
    # training starts from are forgotten soon.
    _add(ema, "WARMUP", True)

    # The type of mixed precision (SOLVER.AMP.ENABLED): "float16", "bfloat16", or "auto", which is float16 on a GPU, and
    # on a CPU bfloat16 where the processor gains by it.
    _add(cfg.SOLVER.AMP, "DTYPE", "auto")

    # The number of the evaluation that decides which model is kept as model_best.pth, for example "bbox/AP", with
    # several test sets "NAME/bbox/AP", or "validation_loss". "" keeps none.
    _add(cfg.TEST, "BEST_METRIC", "")
    # Whether a larger value of BEST_METRIC is better, "max", or a smaller one, "min". "auto" is "min" for losses, and
    # "max" for all else.
    _add(cfg.TEST, "BEST_MODE", "auto")
    # Training ends after so many evaluations in a row that did not improve BEST_METRIC. 0 means never.
    _add(cfg.TEST, "PATIENCE", 0)
    # An evaluation counts as better for PATIENCE only if it improves BEST_METRIC by more than this.
    _add(cfg.TEST, "MIN_DELTA", 0.0)
    # Each evaluation during training also computes the losses on the test sets, as validation_loss and its parts.
    _add(cfg.TEST, "LOSS", False)


def _add_tracking_keys(cfg: CN) -> None:
    """Keys of what shows a person how a run goes. None of them changes what is trained or measured."""
    tracking = _add(cfg, "TRACKING", CN())

    # Services that get scalars, pictures and the config beside TensorBoard: "wandb" (Weights & Biases) and "mlflow".
    # Server, user and key come from the environment variables and files of these libraries, never from a config.
    _add(tracking, "WRITERS", ())

    # The project of Weights & Biases, and the experiment of MLflow.
    _add(tracking, "PROJECT", "dcn_d2")

    # The name of the run there; "" takes the last part of OUTPUT_DIR.
    _add(tracking, "RUN_NAME", "")

    # Of so many images of each test set, detections and sampling locations are drawn at each evaluation in training,
    # for TensorBoard and for TRACKING.WRITERS. 0 draws nothing. The images are the same each time.
    _add(cfg.TEST, "PICTURES", 0)

    # Whether train_net.py writes OUTPUT_DIR/report.html when training is done.
    _add(cfg.TEST, "REPORT", True)


def _add_export_keys(cfg: CN) -> None:
    """Keys of exported models."""
    # In evaluation and prediction, images are also made to fit into (height, width): the scale is the smaller one of
    # that and of MIN_SIZE_TEST and MAX_SIZE_TEST. () sets no limit. Exported models with a fixed size set it.
    _add(cfg.INPUT, "CANVAS_TEST", ())

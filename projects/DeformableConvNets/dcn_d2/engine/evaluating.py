# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What a trainer does with a config before and beside training: it checks it, loads its data, and evaluates."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from ..config import check_config
from ..data.checks import advise_on_data, check_data, check_data_sets
from ..data.mapper import DCNDatasetMapper
from ..data.own import register_own_data
from ..evaluation import (
    Results,
    add_augmented,
    build_augmented_model,
    build_evaluator,
    check_augmentation,
    check_evaluators,
    check_expected_results,
    is_augmented,
)
from . import checks
from .long_runs import check_long_run
from .loop import StoppableTrainer
from .pictures import put_pictures
from .tracking import check_writers
from .validation import check_annotations

logger = logging.getLogger(__name__)


class EvaluatingTrainer(StoppableTrainer):
    """The methods of `DCNTrainer` that need no instance."""

    @classmethod
    def check(cls, cfg: CfgNode, train: bool = True) -> None:
        """Refuses a config that is sure to fail later, in the middle of a run or after it. Opens no data.

        Args:
            cfg: of the run.
            train: whether it trains, or only evaluates.

        Raises:
            ValueError, FileNotFoundError: The message names the key or the data set.
        """
        register_own_data(cfg)
        trains = train and cls._is_ours("build_train_loader")
        check_config(cfg, training=trains)
        if train:
            checks.check_batch_size(cfg)
            check_long_run(cfg, evaluates=cls._is_ours("test") and cls._is_ours("build_evaluator"))
            check_writers(cfg)
        elif not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: nothing to evaluate (is --config-file missing?)")
        check_expected_results(cfg)
        if cls._is_ours("test"):
            check_augmentation(cfg)
        tests = cls._is_ours("build_test_loader")
        check_data_sets([*(cfg.DATASETS.TRAIN if trains else ()), *(cfg.DATASETS.TEST if tests else ())])
        cls._check_evaluators(cfg)

    @classmethod
    def check_data(cls, cfg: CfgNode, train: bool = True) -> None:
        """Reads the data sets, and refuses what does not fit the config.

        If a subclass loads or evaluates them in its own way, it only warns.

        Args:
            cfg: of the run.
            train: whether it trains, or only evaluates.

        Raises:
            ValueError, FileNotFoundError: The message names the data set, the image and the field.
        """
        check_data(
            cfg,
            train=train and cls._is_ours("build_train_loader"),
            test=cls._is_ours("build_test_loader"),
            evaluation=cls._is_ours("build_evaluator"),
        )
        if train:
            check_annotations(cfg)
        methods = ("build_train_loader", "build_test_loader", "build_evaluator")
        advise_on_data(cfg, train, [name for name in methods if not cls._is_ours(name)])

    @classmethod
    def _check_evaluators(cls, cfg: CfgNode) -> None:
        if cls._is_ours("build_evaluator"):
            check_evaluators(cfg, cfg.DATASETS.TEST)

    @classmethod
    def _is_ours(cls, name: str) -> bool:
        """Whether a method is the one of this class, not one of a subclass."""
        ours, theirs = (getattr(owner, name) for owner in (EvaluatingTrainer, cls))
        return getattr(theirs, "__func__", theirs) is getattr(ours, "__func__", ours)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Builds Detectron2's loader, resizing images with what INPUT.RESIZE_WITH names."""
        mapper = DCNDatasetMapper(cfg, is_train=True)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """Builds the loader for evaluation, which resizes images in the same way."""
        mapper = DCNDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluates a model, as `DefaultTrainer.test` does, and with TEST.AUG.ENABLED again with augmentation.

        Args:
            cfg: with DATASETS.TEST.
            model: with its weights.
            evaluators: one for each data set; None builds them.

        Returns:
            {task: {metric: value}} of a single data set, {data set: {task: {metric: value}}} of several. The outer keys
            of results with augmentation end with "_TTA".
        """
        augment = cfg.TEST.AUG.ENABLED and len(cfg.DATASETS.TEST) > 0 and not is_augmented(model)
        if augment:
            check_augmentation(cfg)
        register_own_data(cfg)
        if evaluators is None and cfg.DATASETS.TEST:
            cls._check_evaluators(cfg)
            cls.check_data(cfg, train=False)
        results = Results(super().test(cfg, model, evaluators))
        if cls._is_ours("build_test_loader"):
            put_pictures(cfg, model)
        return add_augmented(results, cls._test_augmented(cfg, model, evaluators)) if augment else results

    @classmethod
    def _test_augmented(cls, cfg: CfgNode, model: nn.Module, evaluators: Any) -> dict[str, Any]:
        """Evaluates with test-time augmentation; it writes into OUTPUT_DIR/inference_TTA/<data set>."""
        logger.info("evaluating with test-time augmentation (TEST.AUG)")
        if evaluators is None:
            folder, ours = Path(cfg.OUTPUT_DIR) / "inference_TTA", cls._is_ours("build_evaluator")
            evaluators = [
                build_evaluator(cfg, name, folder / name) if ours else cls.build_evaluator(cfg, name)
                for name in cfg.DATASETS.TEST
            ]
        return super().test(cfg, build_augmented_model(cfg, model), evaluators)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Gives the evaluator of the data set's type, which writes into OUTPUT_DIR/inference/<data set>.

        `dcn_d2.evaluation.build_evaluator` says which types there are.
        """
        return build_evaluator(cfg, dataset_name, Path(cfg.OUTPUT_DIR) / "inference" / dataset_name)

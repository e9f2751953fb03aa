# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""COCO's evaluation, by pycocotools or by faster-coco-eval, which gives the same numbers in less time."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator, coco_evaluation

from ..config import with_dcn_keys
from .replaced import replaced

logger = logging.getLogger(__name__)


def uses_faster_coco_eval(cfg: CfgNode) -> bool:
    """Whether faster-coco-eval computes COCO's numbers, by TEST.COCO_EVAL and by what is installed.

    Raises:
        ValueError: TEST.COCO_EVAL names it, and it is not installed.
    """
    wanted = with_dcn_keys(cfg).TEST.COCO_EVAL
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if wanted == "faster-coco-eval" and not installed:
        raise ValueError(
            "TEST.COCO_EVAL is faster-coco-eval, which is not installed: pip install faster-coco-eval, or set "
            "TEST.COCO_EVAL to auto"
        )
    return installed and wanted != "pycocotools"


def build_coco_evaluator(
    cfg: CfgNode, dataset_name: str, tasks: Sequence[str] | None, output_folder: str
) -> COCOEvaluator:
    """Builds Detectron2's evaluator of COCO's measures.

    Args:
        cfg: reads TEST.COCO_EVAL and TEST.KEYPOINT_OKS_SIGMAS.
        dataset_name: of the data set.
        tasks: of "bbox", "segm" and "keypoints"; None takes what is predicted.
        output_folder: for the predictions.
    """
    faster = uses_faster_coco_eval(cfg)
    if faster:
        import faster_coco_eval

        logger.info(f"data set {dataset_name}: COCO's AP by faster-coco-eval {faster_coco_eval.__version__}")
    else:
        logger.info(f"data set {dataset_name}: COCO's AP by pycocotools (pip install faster-coco-eval is faster)")
    kind = FasterCOCOEvaluator if faster else FileOrderCOCOEvaluator
    sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
    return kind(dataset_name, tasks=tasks, kpt_oks_sigmas=sigmas, output_dir=output_folder)


class FileOrderCOCOEvaluator(COCOEvaluator):
    """Detectron2's `COCOEvaluator`, which names the AP of a category as the file of annotations does.

    COCO's evaluation lists categories by their ids in the file, and Detectron2 gives them names by their place in
    the training's list. In a file of the user's own (DATASETS.OWN) the ids may be in another order, or some missing.
    """

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is not None and class_names is not None and self._metadata.get("own", False):
            class_names = [category["name"] for category in self._coco_api.loadCats(coco_eval.params.catIds)]
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


class FasterCOCOEvaluator(FileOrderCOCOEvaluator):
    """The same, but faster-coco-eval computes the numbers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, use_fast_impl=False, **kwargs)
        self._use_fast_impl = True  # from here on it asks for COCOeval_opt, which is replaced below

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: list[Any] | None = None) -> None:
        with replaced(coco_evaluation, "COCOeval_opt", _make_faster_coco_eval()):
            super()._eval_predictions(predictions, img_ids=img_ids)


def _make_faster_coco_eval() -> Callable[..., Any]:
    from faster_coco_eval import COCOeval_faster

    class COCOeval(COCOeval_faster):
        """`COCOeval_faster` for pycocotools' `COCO`, which lacks an attribute that it reads for keypoints."""

        def __init__(self, ground_truth: Any, detections: Any, iou_type: str) -> None:
            super().__init__(None, None, iou_type, print_function=print)  # pycocotools prints its table, too
            self.cocoGt, self.cocoDt = ground_truth, detections
            self.params.imgIds = sorted(ground_truth.getImgIds())
            self.params.catIds = sorted(ground_truth.getCatIds())

    return COCOeval

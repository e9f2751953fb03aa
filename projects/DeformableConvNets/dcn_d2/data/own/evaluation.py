# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""COCO's table of AP by class for files whose categories are not those of the training, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator


class FileOrderEvaluator(COCOEvaluator):
    """A `COCOEvaluator` that names the AP of a category as the file of annotations does.

    COCO's evaluation lists categories by their ids in the file, and Detectron2 gives them names by their place in
    the training's list. In a file of the user's own (DATASETS.OWN) the ids may be in another order, or some missing.
    """

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is not None and class_names is not None and self._metadata.get("own", False):
            class_names = [category["name"] for category in self._coco_api.loadCats(coco_eval.params.catIds)]
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

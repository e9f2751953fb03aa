# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""From an entry of a data set to what a model takes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from .images import check_input_format, read_image
from .transforms import build_augmentation


class DCNDatasetMapper(DatasetMapper):
    """Detectron2's `DatasetMapper` with the images of `dcn_d2.data.images`; its errors name the image.

    Arguments are those of `DatasetMapper`. Made from a config, it resizes with what INPUT.RESIZE_WITH names.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        check_input_format(cfg)
        return super().from_config(cfg, is_train) | {"augmentations": build_augmentation(cfg, is_train)}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Gives a copy of the entry with its image and, for training, its annotations as the model takes them."""
        sample = copy.deepcopy(dataset_dict)
        image = read_image(sample["file_name"], self.image_format)
        utils.check_image_size(sample, image)
        try:
            return self._convert(sample, image)
        except (ImportError, MemoryError):  # not the image's fault
            raise
        except Exception as error:  # resizing, cropping and annotations fail in many ways, and none says where
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{sample['file_name']}: cannot be prepared for the model: {reason}") from error

    def _convert(self, sample: dict[str, Any], image: np.ndarray) -> dict[str, Any]:
        segmentation = sample.pop("sem_seg_file_name", None)
        given = T.AugInput(image)
        if segmentation is not None:
            given.sem_seg = utils.read_image(segmentation, "L").squeeze(2)  # labels, not grey levels
        transforms = self.augmentations(given)
        size = given.image.shape[:2]
        sample["image"] = torch.from_numpy(given.image.transpose(2, 0, 1).copy())
        if given.sem_seg is not None:
            sample["sem_seg"] = torch.from_numpy(given.sem_seg.astype(np.int64))
        if self.proposal_topk is not None:
            utils.transform_proposals(sample, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, size)
        return sample

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Data of the user's own, in COCO's format, that a config names: DATASETS.OWN and DATASETS.CLASS_NAMES.

- `registration`: registers them with Detectron2. Whatever takes a config calls `register_own_data`.
- `categories`: what an annotation file has, and whether its classes are those of the training.
- `keypoints`: names of keypoints, and which ones change places when an image is flipped.
- `split`: divides one file into images for training and images for tests.
- `schedule`: a number of epochs as iterations.
- `evaluation`: COCO's table of AP by class for files that list their categories in another order.
"""

from .registration import data_set_name, register_own_data

__all__ = ["data_set_name", "register_own_data"]

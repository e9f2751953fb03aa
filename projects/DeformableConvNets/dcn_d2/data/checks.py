# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Checks of data sets before anything runs."""

from __future__ import annotations

import os
from collections.abc import Iterable

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager


def check_data_sets(names: Iterable[str]) -> None:
    """Checks that the annotations and images of data sets are where Detectron2 looks for them.

    Raises:
        FileNotFoundError: One is missing; the message says where it is expected and how to say where it is.
        ValueError: No data set of that name is registered.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(f"there is no data set {name!r}; registered are {', '.join(sorted(DatasetCatalog))}")
        metadata = MetadataCatalog.get(name)
        for key, what in (("json_file", "annotations"), ("image_root", "images")):
            path = metadata.get(key, None)
            if path and not PathManager.exists(path):
                root = os.environ.get("DETECTRON2_DATASETS")
                raise FileNotFoundError(
                    f"data set {name}: its {what} are expected at {os.path.abspath(path)}, which does not exist. "
                    "Detectron2 looks for data sets below the folder that the environment variable "
                    f"DETECTRON2_DATASETS names (now {root if root else 'not set, so ./datasets'}); "
                    "COCO, for example, as coco/annotations, coco/train2017 and coco/val2017 in that folder"
                )

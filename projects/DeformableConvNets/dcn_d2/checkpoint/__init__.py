# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Reading of weights: renaming as pure functions over dictionaries, and the checkpointer that applies it."""

from .checkpointer import DCNCheckpointer
from .torchvision import convert_torchvision_resnet, is_torchvision_resnet

__all__ = ["DCNCheckpointer", "convert_torchvision_resnet", "is_torchvision_resnet"]

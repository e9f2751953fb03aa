# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What train_net.py is made of: a config that suits the machine, a trainer that runs on CPU too, and a predictor."""

from ..config import load_config
from ..data.checks import check_data_sets
from .machine import fit_to_machine, scale_learning_rate
from .predictor import DCNPredictor
from .trainer import DCNTrainer, setup

__all__ = [
    "DCNPredictor",
    "DCNTrainer",
    "check_data_sets",
    "fit_to_machine",
    "load_config",
    "scale_learning_rate",
    "setup",
]

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What train_net.py is made of: a config that suits the machine, a trainer that also runs on CPU, and a predictor.

Importing it registers everything of dcn_d2 with Detectron2 (`dcn_d2.config.register`). So a process that gets a config
from another one, by pickle, only has to import it.
"""

from ..config import load_config, register
from ..data.checks import check_data_sets
from .errors import MISTAKES, one_line
from .logs import log_traceback
from .machine import fit_to_machine, scale_learning_rate
from .places import find_place
from .predictor import DCNPredictor
from .processes import ProcessFailedError, launch
from .start import setup
from .stopping import TrainingStopped
from .torchrun import joined
from .trainer import DCNTrainer

register()

__all__ = [
    "MISTAKES",
    "DCNPredictor",
    "DCNTrainer",
    "ProcessFailedError",
    "TrainingStopped",
    "check_data_sets",
    "find_place",
    "fit_to_machine",
    "joined",
    "launch",
    "load_config",
    "log_traceback",
    "one_line",
    "scale_learning_rate",
    "setup",
]

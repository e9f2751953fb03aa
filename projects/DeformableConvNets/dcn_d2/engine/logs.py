# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The log of a run: to the console and to OUTPUT_DIR/log.txt, each line once, however often a process trains."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..files import is_local

NAMES = ("fvcore", "detectron2", "dcn_d2")
_files: dict[str, logging.FileHandler] = {}  # path -> log of this process, at most one


def _path(handler: logging.Handler) -> str:
    """Gives the file that a handler writes to; "" for a console."""
    name = getattr(getattr(handler, "stream", None), "name", None)
    return os.path.realpath(name) if isinstance(name, str) and os.path.isfile(name) else ""


def _on_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and not _path(handler)


def log_to(folder: str) -> None:
    """Sets up the loggers of Detectron2 and dcn_d2, as `default_setup` does, if nothing has set them up yet.

    A logger that already writes to the console or to log.txt in this folder gets nothing new. The log in another
    folder, in which this process trained before, is closed.

    Args:
        folder: OUTPUT_DIR.
    """
    rank = comm.get_rank()
    for name in NAMES:
        logger: Any = logging.getLogger(name)
        if not any(_on_console(handler) for handler in logger.handlers) and not logger.isEnabledFor(logging.INFO):
            setup_logger(None, distributed_rank=rank, name=name)
    if not is_local(folder):
        return
    path = os.path.realpath(os.path.join(folder, "log.txt" if rank == 0 else f"log.txt.rank{rank}"))
    handlers = {handler for name in NAMES for handler in logging.getLogger(name).handlers}
    if any(_path(handler) == path for handler in handlers):
        return
    for old in _files.values():
        for name in NAMES:
            logging.getLogger(name).removeHandler(old)
        old.close()
    _files.clear()
    os.makedirs(folder, exist_ok=True)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"))
    for name in NAMES:
        logging.getLogger(name).addHandler(file)
    _files[path] = file


def log_traceback(error: BaseException) -> None:
    """Writes the traceback of an error to the log's file and not to the console, which gets one line about it."""
    logger = logging.getLogger("dcn_d2")
    details = (type(error), error, error.__traceback__)
    record = logger.makeRecord("dcn_d2", logging.DEBUG, __file__, 0, "this error ended the job:", (), details)
    for handler in logger.handlers:
        if not _on_console(handler):
            handler.handle(record)

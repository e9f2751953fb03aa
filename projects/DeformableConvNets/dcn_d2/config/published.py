# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The published weights of a row, which PUBLISHED.WEIGHTS names."""

from __future__ import annotations

from detectron2.config import CfgNode


def use_published_weights(cfg: CfgNode, argument: str, config_file: str) -> None:
    """Makes MODEL.WEIGHTS the published weights of the row.

    Args:
        cfg: of the row; it is changed.
        argument: of the command line that asks for it, for the message.
        config_file: where `cfg` comes from, for the message.

    Raises:
        ValueError: The config names none.
    """
    if not cfg.PUBLISHED.WEIGHTS:
        raise ValueError(f"{argument}: the config {config_file!r} has no PUBLISHED.WEIGHTS")
    cfg.MODEL.WEIGHTS = f"mmdet://{cfg.PUBLISHED.WEIGHTS}"

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The zoo: each YAML file below `configs/` is a row, and its PUBLISHED node says what is published for it.

The functions are those of `detectron2.model_zoo`. Listing rows and asking for addresses imports neither torch nor
Detectron2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn


def _configs_dir() -> Path:
    """Finds `configs/`: inside a package that was installed from a wheel, or beside the package in the project."""
    package = Path(__file__).resolve().parent
    candidates = [package / "configs", package.parent / "configs"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"dcn_d2's configs are in none of {', '.join(map(str, candidates))}; reinstall dcn_d2")


def list_models() -> list[str]:
    """Gives the names of all rows of the zoo, sorted."""
    root = _configs_dir()
    names = (path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in names if not name.rpartition("/")[2].startswith("Base-"))


def get_config_file(name: str) -> str:
    """Gives the path of a row's YAML file.

    Args:
        name: the row, for example "faster_rcnn_R_50_FPN_1x_dconv_c3-c5"; ".yaml" at its end is allowed.

    Raises:
        ValueError: The zoo has no such row.
    """
    row = name.removesuffix(".yaml")
    if row not in list_models():
        raise ValueError(f"the zoo has no row {name!r}; its rows are {', '.join(list_models())}")
    return str(_configs_dir() / f"{row}.yaml")


def find_config_file(file: str) -> str:
    """Gives the path that --config-file of a command line means.

    Args:
        file: a path or an address, given back as it is, or the name of a row.

    Raises:
        ConfigError: There is no such file, and no such row; the message has the row that may be meant.
    """
    if not file or "://" in file or Path(file).expanduser().exists():
        return file
    rows = list_models()
    if (row := file.removesuffix(".yaml")) in rows:
        return get_config_file(row)
    from .config.messages import ConfigError, nearest

    raise ConfigError(f"Config file {file!r} does not exist{nearest(Path(row).name, rows)}")


def get_published(name: str) -> dict[str, Any]:
    """Gives what is published for a row: WEIGHTS and LOG (addresses), BOX_AP and, for a model with masks, MASK_AP."""
    return dict(yaml.safe_load(Path(get_config_file(name)).read_text()).get("PUBLISHED") or {})


def get_checkpoint_url(name: str) -> str:
    """Gives the address of a row's published weights.

    Raises:
        ValueError: The zoo has no such row, or nothing is published for it.
    """
    url = get_published(name).get("WEIGHTS", "")
    if not url:
        raise ValueError(f"no weights are published for {name!r}")
    return url


def get_config(name: str, trained: bool = False) -> CfgNode:
    """Gives the config of a row, with dcn_d2's keys.

    Args:
        name: the row.
        trained: sets MODEL.WEIGHTS to the published weights instead of the ImageNet weights that training starts from.
            Detectron2 fetches, checks and converts them when it loads them.
    """
    from .config import load_config

    cfg = load_config(get_config_file(name))
    if trained:
        cfg.MODEL.WEIGHTS = f"mmdet://{get_checkpoint_url(name)}"
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Builds a row's model, loads its weights, and returns it in training mode.

    Args:
        name: the row.
        trained: loads the published weights instead of the backbone's ImageNet weights.
        device: by default the GPU if there is one, else the CPU.
    """
    import torch
    from detectron2.modeling import build_model

    from .checkpoint import DCNCheckpointer

    cfg = get_config(name, trained)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(cfg)
    DCNCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model

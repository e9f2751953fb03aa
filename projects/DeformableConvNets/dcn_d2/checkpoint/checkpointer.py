# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Detectron2's checkpointer, which also knows MMDetection's and torchvision's files and refuses what does not fit."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from .conversion import convert_checkpoint, is_foreign, warn_of_v1
from .mmdet import unwrap_state_dict
from .path_handlers import register_path_handlers
from .reader import check_pickle, read_checkpoint, write_atomically

logger = logging.getLogger(__name__)

# Entries that a file may lack or have too many of: they come from the config, or nothing reads them.
_OPTIONAL = re.compile(r"pixel_mean|pixel_std|.*anchor_generator\.cell_anchors\.\d+|.*\.num_batches_tracked")


class DCNCheckpointer(DetectionCheckpointer):
    """A `DetectionCheckpointer` that recognises files by content and does not load what does not fit.

    It reads its own files, those of Detectron2, its deformable models included, detectors of MMDetection, and ResNets
    of torchvision, as `train_net.py`, a path or an address may give them. Detectron2's loads what fits and warns; here
    entries that are missing, unknown or of another shape are an error that lists them all, and nothing is loaded. A
    ResNet alone, as training starts from, has to cover the model's ResNet, offset branches aside. Checkpoints are
    written in one step: an interruption leaves no part of one. Files that hold more than weights are refused.

    Args:
        model: see `DetectionCheckpointer`, as for the rest.
        save_dir: where `save` writes.
        fine_tune: allows that heads, neck and offset branches differ, for example because the number of classes does.
            They keep their initial values, and the log lists them. Resuming is always exact.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, fine_tune: bool = False, **others: Any) -> None:
        super().__init__(model, save_dir, **others)
        register_path_handlers()
        self.fine_tune = fine_tune
        self._path = ""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a file; see `DetectionCheckpointer`."""
        self._path = path  # for messages
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 forgets it after an error and then refuses to load again

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the last checkpoint of `save_dir` if `resume` asks for it and there is one, else `path`."""
        fine_tune = self.fine_tune
        self.fine_tune = fine_tune and not (resume and self.has_checkpoint())
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self.fine_tune = fine_tune

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes model, checkpointables and `kwargs` to `name`.pth in `save_dir`, in one step."""
        if not self.save_dir or not self.save_to_disk:
            return
        if "://" in self.save_dir:  # no local folder; how its files are replaced is not known here
            super().save(name, **kwargs)
            return
        data = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with write_atomically(path) as file:
            torch.save(data | kwargs, file)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Notes which checkpoint is the last one, in one step."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            check_pickle(filename)
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        """Reads a file that is no pickle of Detectron2's zoo, which `_load_file` reads."""
        checkpoint = read_checkpoint(filename)
        weights = unwrap_state_dict(checkpoint)
        if is_foreign(weights):
            converted = convert_checkpoint(weights, filename)
            warn_of_v1(converted, filename)
            return converted
        if isinstance(checkpoint.get("model"), Mapping):
            return checkpoint | {"model": dict(weights)}
        return {"model": dict(weights)}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint["model"]
        if {"stem.conv1.weight", "res2.0.conv1.weight"} <= weights.keys():
            checkpoint = {"model": self._fit_resnet(weights)}
        elif not checkpoint.get("matching_heuristics"):  # with them only Detectron2 knows what goes where
            self._check_fit(weights)
        incompatible = super()._load_model(checkpoint)
        for names in (incompatible.missing_keys, incompatible.unexpected_keys):  # what Detectron2 goes on to report
            names[:] = [name for name in names if not _OPTIONAL.fullmatch(name)]
        return incompatible

    def _fit_resnet(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Puts the model's prefix before the names of a ResNet, and checks that it covers the model's."""
        model = self.model.state_dict()
        stems = [name for name in model if name.endswith("stem.conv1.weight")]
        if len(stems) != 1:
            raise ValueError(f"{self._path} holds a ResNet, but the model has {len(stems)} ResNets and not one")
        prefix = stems[0].removesuffix("stem.conv1.weight")
        own = {name: value for name, value in model.items() if name.startswith((f"{prefix}stem.", f"{prefix}res"))}
        found = {name: value for key, value in weights.items() if (name := prefix + key) in own}
        if not any(".conv2_offset." in name for name in found):  # an ordinary ResNet: the branches start from zero
            own = {name: value for name, value in own.items() if ".conv2_offset." not in name}
        problems = _differences(own, found)
        if problems:
            raise ValueError(_listed(f"{self._path} does not fit the model's ResNet", problems))
        rest = len([name for name in model if name not in found and not _OPTIONAL.fullmatch(name)])
        logger.info(f"{self._path} holds a ResNet: the model's {rest} other entries keep their initial values")
        return found

    def _check_fit(self, weights: Mapping[str, Any]) -> None:
        problems = _differences(self.model.state_dict(), weights)
        if not any(name.endswith(".running_mean") for name in weights):
            # Detectron2's oldest models have the statistics folded into weight and bias, as FrozenBatchNorm2d expects.
            frozen = [name for name, module in self.model.named_modules() if isinstance(module, FrozenBatchNorm2d)]
            for name in frozen:
                problems.pop(f"{name}.running_mean", None)
                problems.pop(f"{name}.running_var", None)
        fatal = problems
        if self.fine_tune:
            fatal = {name: text for name, text in problems.items() if not _may_start_afresh(name)}
        if fatal:
            raise ValueError(_listed(f"{self._path} does not fit the model", fatal))
        if problems:
            fate = "what does not fit is left out, and the model's entries keep their initial values"
            logger.warning(_listed(f"fine-tuning from {self._path}: {fate}", problems))


def _may_start_afresh(name: str) -> bool:
    """Whether training may start without an entry; the ResNet, offset branches aside, has to be there."""
    return not name.startswith("backbone.") or ".conv2_offset." in name or name.startswith("backbone.fpn_")


def _differences(model: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, str]:
    """One sentence for each entry that is missing, unknown or of another shape."""
    differences = {}
    for name in (*model, *(name for name in weights if name not in model)):
        if name not in weights and not _OPTIONAL.fullmatch(name):
            differences[name] = f"{name} is missing"
        elif name not in model and not _OPTIONAL.fullmatch(name):
            differences[name] = f"{name} is unknown"
        elif name in model and name in weights and tuple(model[name].shape) != tuple(weights[name].shape):
            theirs, mine = list(weights[name].shape), list(model[name].shape)
            differences[name] = f"{name} is {theirs}, the model's is {mine}"
    return differences


def _listed(what: str, problems: Mapping[str, str]) -> str:
    return "\n  ".join([f"{what} ({len(problems)} entries):", *problems.values()])

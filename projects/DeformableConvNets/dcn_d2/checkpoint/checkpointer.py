# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""A checkpointer that also reads files of MMDetection and torchvision, and refuses what does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from ..files import write_atomically
from .class_names import check_class_names, describe_fine_tuning
from .files import CorruptCheckpointError, remove_leftovers
from .fit import OPTIONAL, Fit, model_state, unwrap_module
from .mmdet import unwrap_name
from .names import shown
from .path_handlers import find_weights, register_path_handlers
from .provenance import CLASS_NAMES, read_class_names
from .resuming import SavedCheckpoints
from .weights import as_data, check_weights, read_weights


class UntrainedError(ValueError):
    """Weights that leave the heads of a model at their initial values.

    Attributes:
        reason: the message without the advice at its end; scripts give the one that fits their arguments.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{reason}. Load trained weights: MODEL.WEIGHTS output/model_final.pth, or "
            "for a row of the zoo, model_zoo.get_config(name, trained=True) or train_net.py --published"
        )


class DCNCheckpointer(DetectionCheckpointer):
    """A `DetectionCheckpointer` that recognises files by content and does not load what does not fit.

    It reads, from a path or an address:

    - what it has written itself,
    - files of Detectron2, its deformable models included,
    - detectors of MMDetection,
    - ResNets of torchvision.

    Detectron2's checkpointer loads what fits and warns of the rest. Here entries that are missing, unknown or of
    another shape are an error that lists them all, and nothing is loaded. A file with only a ResNet, such as training
    starts from, must have all entries of the model's ResNet except its offset branches. A file is refused if it holds
    more than data, or weights that are NaN, infinite or not floating-point numbers. Nothing in a file is ever executed.

    A checkpoint is written in one step: an interruption leaves no part of one. The names in it are those of the model
    itself, without what DistributedDataParallel, torch.compile and FSDP add.

    Args:
        model: whose weights are loaded and saved.
        save_dir: the folder that `save` writes to.
        fine_tune: allows heads, neck and offset branches to differ, for example in the number of classes, and the stem
            to take another number of image channels. What differs keeps its initial values, and the log lists it. This
            does not concern resuming, which is always exact.
        class_names: the names of the model's classes, if they are known. They are saved with the model. Weights that
            know theirs must not number these classes in another way; in fine-tuning the log says what differs.
        others: as in `DetectionCheckpointer`: `save_to_disk`, and what is saved besides the model.

    Attributes:
        averaged: where it is set, a copy of the model with an average of its weights, which `save` and `save_model`
            write in place of the model's.
        initial: names of the model's entries that the last `load` left at their initial values.
        trained_names: the names of classes that the last file says about itself; () if none.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        fine_tune: bool = False,
        class_names: Sequence[str] = (),
        **others: Any,
    ) -> None:
        super().__init__(unwrap_module(model), save_dir, **others)
        register_path_handlers()
        self.fine_tune = fine_tune
        self.class_names = list(class_names)
        self.trained_names: tuple[str, ...] = ()
        self._resuming = False  # a training goes on, whose names of classes must be the same
        self.averaged: nn.Module | None = None
        self.initial: list[str] = []
        self._path = ""
        self._heuristics = False
        self._saved = SavedCheckpoints()

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a file, as `DetectionCheckpointer` does, and sets `initial`."""
        path = os.fspath(path) if path else ""
        self.trained_names = ()
        self._path = path  # for messages
        self.initial = [name for name in model_state(self.model) if not OPTIONAL.fullmatch(name)]
        if path:
            self.logger.info(f"[DCNCheckpointer] Loading from {path} ...")
            path = self._find(path)
        # Not DetectionCheckpointer's, which takes "?" and "#" in the name of a file for parts of an address.
        return Checkpointer.load(self, path, *args, **kwargs)

    def load_trained(self, path: str, *, resume: bool = False) -> dict[str, Any]:
        """Loads weights for evaluation or prediction, and refuses those that leave a part of the model untrained.

        Args:
            path: as MODEL.WEIGHTS.
            resume: prefers the last checkpoint of `save_dir`.

        Raises:
            UntrainedError: There are none, or they are those of a ResNet alone, as training starts from.
        """
        rest = self.resume_or_load(path, resume=resume)
        if self.initial:
            what = (
                f"{self._path} holds weights for"
                if self._path
                else "MODEL.WEIGHTS is empty, so that there are weights for"
            )
            total = len([name for name in model_state(self.model) if not OPTIONAL.fullmatch(name)])
            raise UntrainedError(
                f"the heads are not trained: {what} {total - len(self.initial)} of the model's {total} entries, and "
                f"{self.initial[-1]} is not among them"
            )
        return rest

    def _find(self, path: str) -> str:
        """Local file for a path or an address."""
        self._heuristics = False
        if os.path.isfile(path):
            return path
        address = path.removesuffix("?matching_heuristics=True")
        self._heuristics = address != path
        return find_weights(address)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the newest whole checkpoint of `save_dir` if `resume` asks for it and there is one, else `path`.

        Raises:
            CorruptCheckpointError: There are checkpoints to resume from, but none is whole.
        """
        if self.save_dir and self.save_to_disk and "://" not in self.save_dir:
            for name in remove_leftovers(self.save_dir):
                self.logger.info(f"removed {name}, which a killed process has left in {self.save_dir}")
        file, problems = self._last_checkpoint() if resume else ("", [])
        if not file:
            if problems:
                listed = "\n  ".join(problems)
                raise CorruptCheckpointError(
                    f"{self.save_dir} has no whole checkpoint to resume from:\n  {listed}\nTo start afresh, choose "
                    "another OUTPUT_DIR or leave out --resume"
                )
            return self.load(path, checkpointables=[])
        for problem in problems:
            self.logger.warning(f"{problem}: resuming from {file} instead")
        fine_tune, self.fine_tune, self._resuming = self.fine_tune, False, self.fine_tune
        try:
            return self.load(file)
        finally:
            self.fine_tune, self._resuming = fine_tune, False

    def has_checkpoint(self) -> bool:
        """Whether `save_dir` has a whole checkpoint to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The checkpoint to resume from; "" if there is none.

        It is the one that the file `last_checkpoint` names. If that one is missing or damaged, it is the whole
        checkpoint with the most iterations. A whole checkpoint with more iterations that was written after
        `last_checkpoint` takes precedence: the process was killed before it could note that one.
        """
        return self._last_checkpoint()[0]

    def _last_checkpoint(self) -> tuple[str, list[str]]:
        """The file to resume from, "" if there is none, and what is wrong with the files that were passed over."""
        if "://" in self.save_dir:
            return (super().get_checkpoint_file() if super().has_checkpoint() else ""), []
        return self._saved.newest(self.save_dir) if self.save_dir else ("", [])

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes model, checkpointables and `kwargs` to `name`.pth in `save_dir`, in one step.

        Numbers and arrays of NumPy become those of Python and PyTorch; names are those of the model without wrappers.

        Raises:
            ValueError: Something is not data, or a weight is NaN or infinite, so that `load` would refuse the file.
            OSError: The file could not be written; the message says which checkpoint is whole.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self.tag_last_checkpoint(self._write(name, state | kwargs))

    def save_model(self, name: str, **kwargs: Any) -> None:
        """Writes as `save` does, but only the model and `kwargs`; training does not go on from this file."""
        if self.save_dir and self.save_to_disk:
            self._write(name, kwargs)

    def _write(self, name: str, others: dict[str, Any]) -> str:
        """Writes the model and `others`; returns the name of the file."""
        if os.path.basename(name) != name:
            raise ValueError(f"a checkpoint is called {name!r}, which is not the name of a file")
        data: dict[str, Any] = {"model": model_state(self.averaged or self.model)}
        data |= ({CLASS_NAMES: self.class_names} if self.class_names else {}) | others
        data = {key: as_data(value, key) for key, value in data.items()}
        self._check(data["model"], f"the checkpoint {name}")
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        if "://" in self.save_dir:  # no local folder; how its files are replaced is not known here
            with self.path_manager.open(path, "wb") as file:
                torch.save(data, file)
        else:
            try:
                with write_atomically(path) as file:
                    torch.save(data, file)
            except OSError as error:
                last = self.get_checkpoint_file()
                whole = f"the last whole checkpoint is {last}" if last else f"{self.save_dir} has no whole checkpoint"
                raise type(error)(*error.args[:-1], f"{error.args[-1] if error.args else error}; {whole}") from error
            self._saved.note_whole(path)
        return os.path.basename(path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Notes which checkpoint is the last one, in one step."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_weights(filename)
        self.trained_names = read_class_names(checkpoint)
        if self._heuristics:
            checkpoint["matching_heuristics"] = True
        self._check(checkpoint["model"], self._path, heuristics=bool(checkpoint.get("matching_heuristics")))
        if not self.fine_tune:
            check_class_names(self.class_names, self.trained_names, self._path, resume=self._resuming)
        elif note := describe_fine_tuning(self.class_names, self.trained_names):
            self.logger.info(f"fine-tuning from {self._path}: {note}")
        return checkpoint

    def _check(self, weights: Mapping[str, Any], origin: str, heuristics: bool = False) -> None:
        """Refuses what is not a weight. Integers are allowed where the model has some, and where nothing reads them."""
        model = model_state(self.model)
        integers = {name for name, v in model.items() if not (v.is_floating_point() or v.is_complex())}

        def may_be_integer(name: str) -> bool:
            return heuristics or name in integers or (name not in model and bool(OPTIONAL.fullmatch(name)))

        check_weights(weights, origin, may_be_integer)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint["model"]
        fit = Fit(self.model, self._path, self.fine_tune)
        if {"stem.conv1.weight", "res2.0.conv1.weight"} <= weights.keys():
            checkpoint = {"model": fit.fit_resnet(weights)}
        elif not checkpoint.get("matching_heuristics"):  # with them only Detectron2 knows what goes where
            fit.check(weights)
        wrapped = {unwrap_name(name): name for name in self.model.state_dict()}
        if not checkpoint.get("matching_heuristics"):
            checkpoint["model"] = {wrapped.get(name, name): value for name, value in checkpoint["model"].items()}
        incompatible = super()._load_model(checkpoint)
        for names in (incompatible.missing_keys, incompatible.unexpected_keys):  # what Detectron2 goes on to report
            names[:] = [name for name in names if not OPTIONAL.fullmatch(name)]
        left = {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}
        self.initial = [unwrap_name(name) for name in self.model.state_dict() if name in left]
        loaded = {name for name in model_state(self.model) if not OPTIONAL.fullmatch(name)}.difference(self.initial)
        # They count for nothing: FrozenBatchNorm2d makes up statistics that a file lacks.
        if all(name.endswith((".running_mean", ".running_var")) for name in loaded):
            raise ValueError(
                f"{self._path} does not fit the model: none of its {len(weights)} entries, such as "
                f"{shown(next(iter(weights), None))}, has a place in it"
            )
        return incompatible

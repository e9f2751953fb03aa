# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a folder a run resumes from: the newest one that is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .reader import peek, read_checkpoint

BEST = "model_best"  # the best model of a run, without what training needs to go on from it


class SavedCheckpoints:
    """Finds checkpoints of runs in local folders, and remembers which ones were found to be whole."""

    def __init__(self) -> None:
        self._whole: dict[str, tuple[tuple[int, int], str]] = {}  # path: (time, size), what is wrong with it

    def note_whole(self, path: str) -> None:
        """Notes that a checkpoint was just written, so that it need not be read to know that it is whole."""
        stat = os.stat(path)
        self._whole[path] = (stat.st_mtime_ns, stat.st_size), ""

    def newest(self, save_dir: str) -> tuple[str, list[str]]:
        """The file to resume from, "" if there is none, and what is wrong with the files that were passed over."""
        folder, tag = Path(save_dir), Path(save_dir, "last_checkpoint")
        if not folder.is_dir():
            return "", []
        problems = []
        try:
            tagged, noted = tag.read_text(errors="replace").strip(), tag.stat().st_mtime_ns
        except FileNotFoundError:
            tagged = ""
            problems.append(f"{tag} is missing")
        else:
            if not tagged or os.path.basename(tagged) != tagged or not tagged.isprintable():
                problems.append(f"{tag} names no file")
            elif problem := self._problem_of(str(folder / tagged)):
                problems.append(f"{tag} names {tagged}, and {problem}")
            else:
                return self._written_after(noted, folder / tagged)
        candidates = []
        for file in _files(folder):
            try:
                iteration = peek(file).get("iteration")
            except (OSError, ValueError) as error:
                if file.name != tagged:
                    problems.append(str(error))
                continue
            if type(iteration) is int:  # not only weights
                candidates.append((iteration, file.stat().st_mtime_ns, str(file)))
        for _, _, file_name in sorted(candidates, reverse=True):
            if not (problem := self._problem_of(file_name)):
                return file_name, problems
            if Path(file_name).name != tagged:
                problems.append(problem)
        return "", problems if candidates or len(problems) > 1 or tagged else []

    def _written_after(self, noted: int, named: Path) -> tuple[str, list[str]]:
        """As `newest`, if `last_checkpoint`, written at the time `noted`, names the whole checkpoint `named`."""
        later = [file for file in _files(named.parent) if file != named and file.stat().st_mtime_ns > noted]
        candidates = [(iteration, file) for file in later if (iteration := _iteration_of(file)) is not None]
        own = _iteration_of(named)
        for iteration, file in sorted(candidates, reverse=True):
            if own is not None and iteration > own and not self._problem_of(str(file)):
                return str(file), [f"last_checkpoint names {named.name}, but {file.name} was written after it"]
        return str(named), []

    def _problem_of(self, path: str) -> str:
        """What is wrong with a checkpoint; "" if it is whole."""
        try:
            stat = os.stat(path)
            seen = (stat.st_mtime_ns, stat.st_size)
            if path not in self._whole or self._whole[path][0] != seen:
                self._whole[path] = seen, ""
                if not isinstance(read_checkpoint(path).get("model"), Mapping):
                    self._whole[path] = seen, f"{path} holds no model"
        except FileNotFoundError:
            return f"{path} does not exist"
        except (OSError, ValueError) as error:
            self._whole[path] = seen, str(error)
        return self._whole[path][1]


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.pth") if file.stem != BEST]


def _iteration_of(path: Path) -> int | None:
    """The iteration of a checkpoint of a training run; None for other files."""
    try:
        iteration = peek(path).get("iteration")
    except (OSError, ValueError):
        return None
    return iteration if type(iteration) is int else None

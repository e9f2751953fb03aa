# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from dcn_d2.checkpoint.files import CorruptCheckpointError
from dcn_d2.checkpoint.reader import read_checkpoint

LEGACY = {"_use_new_zipfile_serialization": False}  # the format of PyTorch 1.3, when the zoo was published


def checkpoint() -> dict:
    """As MMDetection saves one."""
    meta = {"mmdet_version": "2.0.0", "config": "a = 1", "CLASSES": ("a", "b"), "epoch": 12, "time": "now"}
    return {"meta": meta, "state_dict": OrderedDict(a=torch.arange(3.0), b=torch.ones(2, 2, dtype=torch.half))}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_reads_both_formats(tmp_path: Path, options: dict) -> None:
    torch.save(checkpoint(), tmp_path / "a.pth", **options)
    found = read_checkpoint(tmp_path / "a.pth")
    assert found["meta"] == checkpoint()["meta"]
    for name, value in checkpoint()["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=0, atol=0)


class Attack:
    """Makes a folder when it is read as a pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, harm = tmp_path / "a.pth", tmp_path / "harm"
    data = checkpoint() | {"optimizer": Attack(harm)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path, **(LEGACY if form == "legacy" else {}))
    with pytest.raises(
        ValueError, match=rf"{path} is refused: it holds more than weights, namely (\w+.mkdir|torch.storage._load)"
    ):
        read_checkpoint(path)
    assert not harm.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_detectron2_hold_arrays_only(tmp_path: Path, protocol: int) -> None:
    path, harm = tmp_path / "a.pkl", tmp_path / "harm"
    arrays = OrderedDict(a=np.arange(3.0, dtype=np.float32), b=np.float64(2), c=np.zeros((2, 3), order="F"))
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision"}, protocol))
    found = read_checkpoint(path)
    assert found["__author__"] == "torchvision" and found["model"]["b"] == 2
    for name in "ac":
        assert isinstance(found["model"][name], np.ndarray) and found["model"][name].flags.writeable
        np.testing.assert_array_equal(found["model"][name], arrays[name], strict=True)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        CorruptCheckpointError, match=r"a.pkl \(\d+ bytes\) is truncated, corrupted, or not a checkpoint"
    ):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps({"model": arrays, "cfg": Attack(harm)}, protocol))
    with pytest.raises(ValueError, match=r"a.pkl is refused: it holds more than weights, namely \w+.mkdir"):
        read_checkpoint(path)
    assert not harm.exists()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.999])
def test_truncated_file_is_named(tmp_path: Path, options: dict, part: float) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(10000)}, path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(
        CorruptCheckpointError, match=rf"{path} \({path.stat().st_size} bytes\) is truncated, corrupted"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"\x80\x02}q\x00.", bytes(100)])
def test_file_that_is_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="a.pth .*not a checkpoint"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("content, what", [(torch.zeros(3), "a Tensor"), ([1], "a list"), ({}, "nothing")])
def test_file_without_names_is_no_checkpoint(tmp_path: Path, content: object, what: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CorruptCheckpointError, match=f"it holds {what} instead of named weights"):
        read_checkpoint(tmp_path / "a.pth")


def test_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "a.pth")


def test_loss_history_of_mmdetection_3_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training checkpoints hold objects of MMEngine, with NumPy arrays and bound methods in them."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history, self.methods = np.arange(3.0), {"mean": self.mean}

        def mean(self) -> float:
            raise AssertionError("code of the file's classes was run")

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    with monkeypatch.context() as patch:
        for module in ("mmengine", "mmengine.logging", name):
            patch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[name].HistoryBuffer = HistoryBuffer
        hub = {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": {"lr": np.float64(0.1)}}
        torch.save(checkpoint() | {"message_hub": hub}, tmp_path / "a.pth")
        torch.save({"a": torch.zeros(1), "b": {"c": [HistoryBuffer()]}}, tmp_path / "b.pth")
    assert "mmengine" not in sys.modules
    found = read_checkpoint(tmp_path / "a.pth")
    assert found.keys() == {"meta", "state_dict"}
    torch.testing.assert_close(found["state_dict"]["a"], torch.arange(3.0))
    with pytest.raises(ValueError, match="b.pth is refused: b.c.0 is an object of MMEngine"):
        read_checkpoint(tmp_path / "b.pth")

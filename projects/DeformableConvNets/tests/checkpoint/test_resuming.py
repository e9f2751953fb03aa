# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What is on the disk after things went wrong: full disks, killed processes, damaged and missing files."""

import errno
import fcntl
import os
import re
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcn_d2.checkpoint import CorruptCheckpointError, DCNCheckpointer
from dcn_d2.checkpoint.files import remove_leftovers
from dcn_d2.files import write_atomically


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints after 10, 20 and 30 iterations, and weights alone, written last."""
    for iteration in (9, 19, 29):
        DCNCheckpointer(net(), str(tmp_path)).save(f"model_{iteration:07d}", iteration=iteration)
    torch.save({"model": net().state_dict()}, tmp_path / "weights.pth")
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def change(path: Path) -> None:
    """Changes a value of the first layer, which only the checksum shows."""
    content = path.read_bytes()
    value = net()[0].weight.detach().numpy().tobytes()
    assert content.count(value) == 1
    path.write_bytes(content.replace(value, bytes(len(value))))


@pytest.mark.parametrize(
    "harm, iteration, said",
    [
        (lambda folder: None, 29, ""),
        (lambda folder: (folder / "last_checkpoint").unlink(), 29, "last_checkpoint is missing: resuming from"),
        (lambda folder: (folder / "last_checkpoint").write_text(""), 29, "last_checkpoint names no file"),
        (lambda folder: (folder / "last_checkpoint").write_text("../x.pth"), 29, "last_checkpoint names no file"),
        (lambda folder: (folder / "last_checkpoint").write_bytes(b"\xff\0"), 29, "last_checkpoint names"),
        (lambda folder: (folder / "model_0000029.pth").unlink(), 19, "model_0000029.pth does not exist"),
        (lambda folder: cut(folder / "model_0000029.pth"), 19, "model_0000029.pth .* is truncated"),
        (lambda folder: change(folder / "model_0000029.pth"), 19, "model_0000029.pth .*CRC"),
        (lambda folder: (folder / "last_checkpoint").write_text("model_0000009.pth"), 9, ""),
    ],
)
def test_resumes_from_the_newest_whole_checkpoint(
    harm: Any, iteration: int, said: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(folder)
    os.utime(folder / "model_0000009.pth")  # the iterations count, not the clock
    own = DCNCheckpointer(net(), str(folder))
    assert own.has_checkpoint() and own.get_checkpoint_file() == str(folder / f"model_{iteration:07d}.pth")
    assert own.resume_or_load("", resume=True)["iteration"] == iteration
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if said:
        assert re.search(said, warnings[0]) and f"model_{iteration:07d}.pth" in warnings[0]
    else:
        assert not warnings


def test_a_checkpoint_that_a_killed_process_did_not_note_is_not_lost(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tag = folder / "last_checkpoint"
    tag.write_text("model_0000009.pth")
    assert DCNCheckpointer(net(), str(folder)).get_checkpoint_file() == str(folder / "model_0000009.pth"), "by choice"
    tag.write_text("model_0000019.pth")
    os.utime(tag, ns=(0, (folder / "model_0000029.pth").stat().st_mtime_ns - 1))
    assert DCNCheckpointer(net(), str(folder)).resume_or_load("", resume=True)["iteration"] == 29
    assert "model_0000029.pth was written after it" in caplog.text
    cut(folder / "model_0000029.pth")
    assert DCNCheckpointer(net(), str(folder)).resume_or_load("", resume=True)["iteration"] == 19


def test_no_whole_checkpoint_is_an_error_and_no_fresh_start(folder: Path) -> None:
    for path in folder.glob("model_*.pth"):
        cut(path)
    own = DCNCheckpointer(net(), str(folder))
    assert not own.has_checkpoint()
    with pytest.raises(CorruptCheckpointError, match=r"no whole checkpoint to resume from:(?s:.*)leave out --resume"):
        own.resume_or_load("", resume=True)
    assert own.resume_or_load(str(folder / "weights.pth"), resume=False) == {}


def test_without_checkpoints_resuming_starts_afresh(tmp_path: Path) -> None:
    torch.save({"model": net().state_dict()}, tmp_path / "weights.pth")
    for folder in (tmp_path, tmp_path / "new"):
        own = DCNCheckpointer(net(), str(folder))
        assert not own.has_checkpoint() and own.get_checkpoint_file() == ""
        assert own.resume_or_load(str(tmp_path / "weights.pth"), resume=True) == {} and own.initial == []
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(CorruptCheckpointError, match="last_checkpoint names model_0000009.pth, and .* does not exist"):
        DCNCheckpointer(net(), str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize("code", [errno.EFBIG, errno.ENOSPC])
def test_full_disk_is_told_with_the_checkpoint_that_is_whole(
    code: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save says "enforce fail at inline_container.cc" and neither file nor cause."""
    before = sorted(os.listdir(folder))
    own = DCNCheckpointer(net(), str(folder))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            if code == errno.EFBIG:  # a limit on the size of files stands for a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            else:  # some file systems find out when they are asked to have written

                def full(descriptor: int) -> None:
                    raise OSError(code, os.strerror(code))

                patch.setattr(os, "fsync", full)
            with pytest.raises(OSError) as error:
                own.save("model_0000039", iteration=39)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == code
    assert f"{folder}/model_0000039.pth could not be written: {os.strerror(code)}" in str(error.value)
    assert f"the last whole checkpoint is {folder}/model_0000029.pth" in str(error.value)
    assert sorted(os.listdir(folder)) == before


def test_parts_of_killed_processes_are_removed_and_others_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = time.time() - 3600
    for name in (".model_0000009.pth.a1b2c3d4.part", ".last_checkpoint.a1b2c3d4.part", ".mine.part", "a.pth.part"):
        (folder / name).write_text("")
        os.utime(folder / name, (old, old))
    (folder / ".model_0000019.pth.a1b2c3d4.part").write_text("")  # just now
    (folder / ".model_0000029.pth.a1b2c3d4.part").symlink_to(folder / ".mine.part")
    with (folder / ".model_0000039.pth.a1b2c3d4.part").open("w") as file:  # another process writes it
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(file.name, (old, old))
        caplog.set_level("INFO")
        DCNCheckpointer(net(), str(folder)).resume_or_load("", resume=True)
    left = {path.name for path in folder.glob(".*")} | {path.name for path in folder.glob("*.part")}
    assert left == {
        *(".mine.part", "a.pth.part", ".model_0000019.pth.a1b2c3d4.part"),
        *(".model_0000029.pth.a1b2c3d4.part", ".model_0000039.pth.a1b2c3d4.part"),
    }
    assert "removed .model_0000009.pth.a1b2c3d4.part" in caplog.text


def test_a_file_being_written_is_locked(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "a.pth") as file:
        file.write(b"content")
        assert remove_leftovers(tmp_path, min_age=-1) == []
    assert os.listdir(tmp_path) == ["a.pth"]


def test_numbers_of_numpy_are_saved_so_that_they_can_be_read(tmp_path: Path) -> None:
    own = DCNCheckpointer(net(), str(tmp_path))
    own.save("x", best=np.float64(0.5), curve=[np.float32(1), (np.arange(3),)], counts={np.int64(2): np.bool_(True)})
    for found in (DCNCheckpointer(net()).load(str(tmp_path / "x.pth")), torch.load(tmp_path / "x.pth")):
        assert found["best"] == 0.5 and type(found["best"]) is float and found["counts"] == {2: True}
        assert found["curve"][0] == 1 and found["curve"][1][0].tolist() == [0, 1, 2]
    torch.save({"model": net().state_dict(), "best": np.float64(0.5)}, tmp_path / "y.pth")  # of an earlier version
    assert DCNCheckpointer(net()).load(str(tmp_path / "y.pth"))["best"] == 0.5


def test_saving_what_cannot_be_read_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    own = DCNCheckpointer(net(), str(tmp_path))
    with pytest.raises(ValueError, match="best cannot be saved: it is a pathlib.*Path.*Save its str"):
        own.save("x", best=tmp_path)
    with pytest.raises(ValueError, match="called '../x', which is not the name of a file"):
        own.save("../x")
    own.model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the checkpoint x is refused(?s:.*)0.weight holds NaN"):
        own.save("x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda names: [f"_orig_mod.{name}" for name in names],
        lambda names: [f"module._orig_mod.{name}" for name in names],
        lambda names: [f"_orig_mod.module.{name}" for name in names],
        lambda names: [f"_fsdp_wrapped_module.{name.replace('.', '._fsdp_wrapped_module.', 1)}" for name in names],
        lambda names: [name.replace(".", "._checkpoint_wrapped_module._orig_mod.", 1) for name in names],
    ],
)
def test_names_of_wrappers_are_taken_off(wrap: Any, tmp_path: Path) -> None:
    source = net()
    source[0].weight.data += 1
    names = list(source.state_dict())
    torch.save({"model": dict(zip(wrap(names), source.state_dict().values()))}, tmp_path / "x.pth")
    model = net()
    DCNCheckpointer(model).load(str(tmp_path / "x.pth"))
    assert torch.equal(model[0].weight, source[0].weight)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_are_saved_and_loaded_by_their_own_names(inside: bool, tmp_path: Path) -> None:
    def compiled() -> nn.Module:
        model = net()
        if not inside:
            return torch.compile(model)
        model[0] = torch.compile(model[0])
        return model

    source = compiled()
    with torch.no_grad():
        next(source.parameters()).add_(1)
    DCNCheckpointer(source, str(tmp_path)).save("x")
    assert list(torch.load(tmp_path / "x.pth")["model"]) == list(net().state_dict())
    for model in (net(), compiled()):
        own = DCNCheckpointer(model)
        own.load(str(tmp_path / "x.pth"))
        assert own.initial == [] and torch.equal(next(model.parameters()), next(source.parameters()))


@pytest.mark.parametrize("name", ["a?b.pth", "a#b.pth", "a b.pth", "a%20b.pth"])
def test_odd_names_of_local_files_are_no_addresses(name: str, tmp_path: Path) -> None:
    torch.save({"model": net().state_dict()}, tmp_path / name)
    DCNCheckpointer(net()).load(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="there is no file .*nothing.pth"):
        DCNCheckpointer(net()).load(str(tmp_path / "nothing.pth"))
    with pytest.raises(FileNotFoundError, match="there is only a folder"):
        DCNCheckpointer(net()).load(str(tmp_path))

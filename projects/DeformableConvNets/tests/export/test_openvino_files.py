# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""OpenVINO's files are written whole or not at all, and files that dcn_d2 did not write are refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dcn_d2.export.formats import open_session
from dcn_d2.export.openvino import package, writer
from dcn_d2.export.openvino.package import import_openvino

from .running import exported

pytest.importorskip("openvino", reason="openvino is not installed")

ROW = "faster_rcnn_R_50_FPN_1x_dconv_c3-c5"
# Imports OpenVINO and converts a model. Without the rest of dcn_d2, to take less time.
PROGRAM = """
import runpy, sys, torch
package = runpy.run_path(sys.argv[1])
ov = package["import_openvino"]()
with package["without_telemetry"]():
    ov.convert_model(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported file."""
    path = tmp_path_factory.mktemp("export") / "model.xml"
    exported(ROW, path, part="backbone")
    return path


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of the pair of files."""
    for suffix in (".xml", ".bin"):
        shutil.copy(small.with_suffix(suffix), tmp_path)
    return tmp_path / small.name


def test_a_missing_file_of_weights_is_told(copy: Path) -> None:
    copy.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match=r"model\.xml has no weights: model\.bin must lie beside it"):
        open_session(copy)


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_cut_files_are_refused(suffix: str, copy: Path) -> None:
    content = copy.with_suffix(suffix).read_bytes()
    copy.with_suffix(suffix).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"damaged"):
        open_session(copy)


def test_weights_of_another_model_are_refused(copy: Path) -> None:
    content = bytearray(copy.with_suffix(".bin").read_bytes())
    content[len(content) // 2] ^= 1
    copy.with_suffix(".bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.bin does not hold the weights of model\.xml"):
        open_session(copy)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    ov = import_openvino()
    parameter = ov.opset14.parameter([2], ov.Type.f32)
    ov.save_model(ov.Model([ov.opset14.relu(parameter)], [parameter]), tmp_path / "model.xml")
    with pytest.raises(ValueError, match=r"model\.xml was not written by dcn_d2"):
        open_session(tmp_path / "model.xml")
    (tmp_path / "model.xml").write_text("nothing")
    with pytest.raises(ValueError, match="are not a model of OpenVINO, or are damaged"):
        open_session(tmp_path / "model.xml")


def test_the_description_is_in_the_file(small: Path) -> None:
    description = open_session(small).description
    assert (description.part, description.size, description.batch) == ("backbone", None, None)
    assert "DEFORM_ON_PER_STAGE" in description.config


@pytest.mark.parametrize("call", [1, 2])
def test_an_interruption_leaves_no_mixed_pair(call: int, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, replace = [], os.replace

    def interrupted(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(*paths)

    model = package.get_core().read_model(copy)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        writer._save(model, copy, half=False)
    assert [path.name for path in copy.parent.iterdir()] == ["model.bin"]
    writer._save(model, copy, half=False)
    open_session(copy)


def test_a_full_disk_was_an_iostream_error(copy: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits of the sizes of files")
    model = package.get_core().read_model(copy)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.xml could not be written; is the disk full\?"):
            writer._save(model, copy, half=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["model.bin", "model.xml"]
    open_session(copy)


def test_nothing_is_sent(tmp_path: Path) -> None:
    """OpenVINO creates a number for a user of whom it sends statistics, in their home."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    environment["HOME"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, package.__file__]
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert not list(tmp_path.rglob("openvino*"))


def test_without_openvino_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match="pip install openvino"):
        import_openvino()


def test_operators_that_openvino_does_not_know_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "extensions", lambda: None)
    with pytest.raises(ValueError, match=r"OpenVINO cannot convert the model:[\s\S]*dcn_d2::batched_nms"):
        exported(ROW, tmp_path / "model.xml")
    assert not list(tmp_path.iterdir())


def test_a_signal_crashed_the_process_after_two_sessions(copy: Path) -> None:
    """Each had a core of its own, and the first one to end left a freed stack for the handlers of signals."""
    code = """
import faulthandler, os, signal, sys
faulthandler.enable()
from dcn_d2.export.formats import open_session
first, second = open_session(sys.argv[1]), open_session(sys.argv[1])
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr

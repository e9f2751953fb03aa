# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files of TorchScript and torch.export run without Python code of dcn_d2, and files that it did not write are refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dcn_d2.export.formats import open_session
from dcn_d2.ops import _library

from .running import assert_close, exported, inputs_of, run_module

ROW = "cascade_mask_rcnn_R_50_FPN_1x_dconv_c3-c5"
# What a program does that has PyTorch, torchvision and the compiled library, but not the Python code of dcn_d2.
PROGRAM = """
import sys
import numpy as np, torch, torchvision
library, model, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
run = torch.jit.load(model) if model.endswith(".ts") else torch.export.load(model).module()
with torch.inference_mode():
    results = run(*(torch.from_numpy(array) for array in np.load(inputs).values()))
np.savez(outputs, *(result.numpy() for result in results))
assert not any(name.partition(".")[0] in ("dcn_d2", "detectron2") for name in sys.modules)
"""


@pytest.mark.unsanitized
@pytest.mark.skipif(bool(_library.missing_kernels), reason="the compiled library is missing")
@pytest.mark.parametrize("suffix", [".ts", ".pt2"])
def test_a_process_with_the_compiled_library_alone_runs_it(suffix: str, tmp_path: Path) -> None:
    module = exported(ROW, tmp_path / f"model{suffix}")
    inputs = inputs_of([(100, 150), (128, 131)])
    np.savez(tmp_path / "inputs.npz", **inputs)  # type: ignore[arg-type]
    arguments = [
        _library.loaded_kernels,
        *(tmp_path / name for name in (f"model{suffix}", "inputs.npz", "outputs.npz")),
    ]
    command = [sys.executable, "-P", "-c", PROGRAM, *map(str, arguments)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    with np.load(tmp_path / "outputs.npz") as found:
        assert_close(dict(zip(module.names, found.values())), run_module(module, inputs), inputs)


@pytest.mark.parametrize("suffix", [".ts", ".pt2"])
def test_files_that_are_no_archives_are_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"model{suffix}").write_text("nothing")
    with pytest.raises(ValueError, match="is no archive of PyTorch"):
        open_session(tmp_path / f"model{suffix}")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported file of TorchScript."""
    path = tmp_path_factory.mktemp("export") / "model.ts"
    exported("faster_rcnn_R_50_FPN_1x_dconv_c3-c5", path, part="backbone")
    return path


def test_damaged_files_are_refused(small: Path, tmp_path: Path) -> None:
    content = bytearray(small.read_bytes())
    (tmp_path / "cut.ts").write_bytes(content[: len(content) // 2])
    content[len(content) // 2] ^= 1
    (tmp_path / "changed.ts").write_bytes(content)
    with pytest.raises(ValueError, match=r"cut\.ts is damaged"):
        open_session(tmp_path / "cut.ts")
    with pytest.raises(ValueError, match=r"changed\.ts is damaged: the checksum of .* is wrong"):
        open_session(tmp_path / "changed.ts")


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Twice(), torch.ones(2)), tmp_path / "model.ts")
    torch.export.save(torch.export.export(Twice(), (torch.ones(2),)), tmp_path / "model.pt2")
    for name in ("model.ts", "model.pt2"):
        with pytest.raises(ValueError, match="was not exported by dcn_d2"):
            open_session(tmp_path / name)


def test_a_file_of_another_format_under_the_suffix_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(small.read_bytes())
    with pytest.raises(ValueError, match=r"cannot load .*model\.pt2"):
        open_session(tmp_path / "model.pt2")


def test_the_description_is_read_without_running_the_file(small: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(tmp_path / "model.ts", "w") as new:
        for info in old.infolist():
            new.writestr(info, b'{"format_version": 99}' if info.filename.endswith("dcn_d2.json") else old.read(info))
    with pytest.raises(ValueError, match="format version is 99"):
        open_session(tmp_path / "model.ts")


def test_a_session_uses_as_many_threads_as_it_is_told(small: Path) -> None:
    session, before = open_session(small, threads=3), torch.get_num_threads()
    seen = []
    session._function = lambda *tensors: seen.append(torch.get_num_threads()) or tensors  # type: ignore[attr-defined]
    session.run(inputs_of([(64, 64)]))
    assert (seen, torch.get_num_threads()) == ([3], before)

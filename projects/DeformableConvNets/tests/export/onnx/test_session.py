# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the session refuses, and the file that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcn_d2.export.formats import open_session
from dcn_d2.export.onnx import Session, packages, write, writer
from dcn_d2.export.shapes import example_inputs

from .conftest import describe

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


class Tiny(nn.Module):
    """As many inputs and outputs as a detector has."""

    masks, names = "none", ["boxes"]

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor]:
        return (images.mean((2, 3)) + image_sizes.sum(1, keepdim=True).float(),)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    description = describe(Tiny())
    write(Tiny(), example_inputs(description), description, path)
    return path


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_it_runs_with_any_number_of_threads(tiny: Path, threads: int) -> None:
    session = open_session(tiny, threads)
    assert isinstance(session, Session) and session.description.class_names == ("cat", "dog")
    images, sizes = torch.rand(3, 3, 64, 32), torch.tensor([[64, 32]] * 3)
    result = session.run({"images": images.numpy(), "image_sizes": sizes.numpy()})
    torch.testing.assert_close(torch.from_numpy(result["boxes"]), Tiny()(images, sizes)[0])


def test_writing_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    description = describe(Tiny())
    write(Tiny(), example_inputs(description), description, tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_file_that_was_cut_off(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 1):
        file = tmp_path / "cut.onnx"
        file.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"cut\.onnx (is no ONNX file|was not written by dcn_d2)"):
            Session(file)


def test_a_file_of_another_program(tiny: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(tiny)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx was not written by dcn_d2"):
        Session(tmp_path / "other.onnx")


def test_a_missing_file_and_an_unknown_provider(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no exported model .*none\.onnx"):
        Session(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="has no QuantumExecutionProvider; it has .*CPUExecutionProvider"):
        Session(tiny, providers=["QuantumExecutionProvider"])


def test_an_old_onnx_runtime(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.24.1")
    with pytest.raises(ImportError, match=r'1.25 or later, and 1.24.1 is installed: pip install "onnxruntime>=1.25"'):
        Session(tiny)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = f'ONNX files need {package}, which cannot be imported .*: pip install "{package}>='
    with pytest.raises(ImportError, match=message):
        packages.load(package)


def test_weights_that_do_not_fit_into_a_file(tmp_path: Path) -> None:
    class Large(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2**29, device="meta"), requires_grad=False)

    description = describe(Tiny())
    with pytest.raises(ValueError, match=r"the weights have 2\.15 GB, and an ONNX file holds less than 2\.08 GB"):
        write(Large(), example_inputs(description), description, tmp_path / "large.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_is_not_the_described_one(tmp_path: Path) -> None:
    description = describe(Tiny())
    wrong: Any = type(description)(**{**vars(description), "outputs": describe(Tiny(), batch=3).outputs})
    with pytest.raises(AssertionError, match="boxes has a size of .*, not 3"):
        write(Tiny(), example_inputs(description), wrong, tmp_path / "wrong.onnx")
    assert list(tmp_path.iterdir()) == [] and writer.OPSET == 19

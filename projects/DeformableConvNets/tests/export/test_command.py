# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""export.py as a user runs it, and the client for ONNX in a process that has neither torch nor Detectron2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import export as command
from dcn_d2.command_line import export as command_line
from dcn_d2.engine import DCNPredictor
from dcn_d2.export import formats, request
from dcn_d2.export.detector import MASKS

from .models import images, lively_model

PROJECT = Path(__file__).resolve().parents[2]
CLIENT = PROJECT / "examples" / "deploy" / "onnx_client.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, weights and an image."""
    folder = tmp_path_factory.mktemp("model")
    opts = ["INPUT.MIN_SIZE_TEST", 128, "DATASETS.TRAIN", (), "DATASETS.TEST", ()]
    cfg, model = lively_model("mask_rcnn_R_50_FPN_1x_mdconv_c3-c5", opts=opts)
    (folder / "lively.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    Image.fromarray(images(1, 100, 150)[0].byte().permute(1, 2, 0).numpy()).save(folder / "image.png")
    return folder


def arguments(folder: Path, *others: Any) -> list[str]:
    return ["--config-file", str(folder / "lively.yaml"), "--weights", str(folder / "model.pth"), *map(str, others)]


def test_the_command_says_what_it_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a.ts"
    assert command.run(arguments(folder, "--output", output, "--size", 100, 160, "--batch", 1)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "note: the size 100 x 160 became 128 x 160: height and width must be multiples of 32"
    assert lines[1] == f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)"
    assert lines[2:6] == [
        "inputs:",
        "  images float32 (1, 3, 128, 160)",
        "  image_sizes int64 (1, 2)",
        "outputs:",
    ]
    assert "all images lie at the top left of canvases of 128 x 160, and image_sizes has their own size" in lines
    assert "one image at a time" in lines
    assert lines[-1].startswith("compared with the model: ") and "detections matched" in lines[-1]
    assert formats.open_session(output).description.row == "lively"


def stopped(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        command.run(argv)
    text = str(error.value.code)
    assert text.startswith("export.py: ") and "\n" not in text
    return text


def test_mistakes_end_in_one_line(folder: Path, tmp_path: Path) -> None:
    assert "a.ts for" not in stopped(arguments(folder, "--output", tmp_path / "none" / "a.ts"))
    assert "MODEL.KEYPOINT_ON is True" in stopped(
        arguments(folder, "--output", tmp_path / "a.ts", "MODEL.KEYPOINT_ON", True)
    )
    without = ["--config-file", str(folder / "lively.yaml"), "--output", str(tmp_path / "a.ts")]
    assert "no weights are given: --weights FILE" in stopped(without)
    row = ["--config-file", "faster_rcnn_R_50_FPN_1x_mdconv_c3-c5", "--output", str(tmp_path / "a.ts")]
    assert "export.py --config-file faster_rcnn_R_50_FPN_1x_mdconv_c3-c5 --published" in stopped(row)
    assert not list(tmp_path.iterdir())


def test_sigterm_left_half_a_file(folder: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
import export
from dcn_d2.export import torchscript

def stop(module, inputs, description, path):
    path.write_text("half of it")
    os.kill(os.getpid(), signal.SIGTERM)

torchscript.write = stop
sys.exit(export.run(sys.argv[1:]))
"""
    words = arguments(folder, "--output", tmp_path / "a.ts")
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.endswith("export.py: interrupted; no file was written\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.bin"], "its suffix is none of .onnx, .xml, .pt2, .ts"),
        (["--output", "a.onnx", "--format", "pt2"], "a file of --format pt2 ends with .pt2"),
        (["--output", "a.onnx", "--aot"], "--aot goes with --format pt2, not with onnx"),
        (["--output", "a.onnx", "--no-check", "--image", "b.png"], "--image is for the comparison"),
        (["--output", "a.onnx", "--batch", "0"], "must be at least 1, got 0"),
        (["--output", "a.onnx", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_mistyped_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.parse_arguments(["--config-file", "a.yaml", *words])
    assert message in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules.update(torch=None, detectron2=None); import export; export.run(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and "--part" in done.stdout, done.stderr


def test_choices_of_the_command_line_are_those_of_the_library() -> None:
    parser = command_line.build_parser()
    choices = {action.dest: tuple(action.choices) for action in parser._actions if action.choices}
    assert command_line.SUFFIXES == formats.SUFFIXES
    assert choices["part"] == request.PARTS and set(choices["masks"]) == set(MASKS)
    assert set(choices["dtype"]) == {dtype for dtypes in request.DTYPES.values() for dtype in dtypes}


@pytest.fixture(scope="module", params=["boxes", pytest.param("pasted", marks=pytest.mark.slow)])
def onnx_file(request: pytest.FixtureRequest, folder: Path) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = folder / f"{request.param}.onnx"
    assert command.run(arguments(folder, "--output", path, "--masks", request.param, "--no-check")) == 0
    return path


def without_torch(folder: Path) -> dict[str, str]:
    """An environment in which the packages that the client must not need cannot be imported."""
    for name in ("torch", "detectron2", "dcn_d2", "cv2"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is imported')\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def test_the_client_finds_what_the_predictor_finds(onnx_file: Path, folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "found.png"
    words = [CLIENT, onnx_file, folder / "image.png", "--confidence", "0", "--picture", picture, "--threads", "1"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=without_torch(tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cfg = command_config(folder)
    expected = DCNPredictor(cfg)(str(folder / "image.png"))["instances"]
    assert len(expected) > 20 and abs(len(found) - len(expected)) <= 2
    matched = 0
    for number in range(len(expected)):
        box, score = expected.pred_boxes.tensor[number].numpy(), float(expected.scores[number])
        partner = min(found, key=lambda each: np.abs(np.array(each["box"]) - box).max() + abs(each["score"] - score))
        if np.abs(np.array(partner["box"]) - box).max() > 1 or abs(partner["score"] - score) > 0.02:
            continue  # pixels differ by a grey level, which decides between some boxes
        matched += 1
        assert partner["class"] == str(int(expected.pred_classes[number]))
        mask = decode(partner["mask"])
        truth = expected.pred_masks[number].numpy()
        assert (mask != truth).sum() <= max(3, 0.1 * truth.sum())
    assert matched >= 0.9 * len(expected)
    assert Image.open(picture).size == (150, 100)


def test_a_mistake_with_the_client_ended_in_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<net/>")
    for model, message in (("missing.onnx", "No such file or directory: 'missing.onnx'"), ("a.xml", "a.xml cannot be")):
        words = [sys.executable, str(CLIENT), model, "photo.jpg"]
        done = subprocess.run(words, env=without_torch(tmp_path), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("onnx_client.py: ") and message in done.stderr


def decode(mask: dict[str, Any]) -> np.ndarray:
    values = np.arange(len(mask["counts"])) % 2 == 1
    return np.repeat(values, mask["counts"]).reshape(mask["size"], order="F")


def command_config(folder: Path) -> Any:
    from dcn_d2.engine import load_config

    return load_config(str(folder / "lively.yaml"), ["MODEL.WEIGHTS", str(folder / "model.pth")])

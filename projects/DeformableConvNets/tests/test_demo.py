# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""demo.py end to end, with an untrained model: pictures of held-out tiles and of image files."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from dcn_d2.engine import load_config
from dcn_d2.visualizer import record_sampling

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml"
QUICK = ["MODEL.DEVICE", "cpu", "TEST.DETECTIONS_PER_IMAGE", "5"]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "untrained.pth"
    torch.save({"model": build_model(load_config(str(CONFIG), QUICK)).state_dict()}, path)
    return path


def test_a_held_out_tile(demo: ModuleType, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pictures"
    options = ["--max-images", "1", "--points", "2", "--confidence", "0", "--output", str(output)]
    demo.main(["--config-file", str(CONFIG), "--weights", str(weights), *options, *QUICK])
    names = ["y000_x320_detections.png", "y000_x320_sampling.png"]
    assert sorted(path.name for path in output.iterdir()) == names
    assert capsys.readouterr().out == "".join(f"wrote {output / name}\n" for name in names)
    for name in names:
        picture = Image.open(output / name)
        panel = demo.PANEL if "detections" in name else demo.SMALL_PANEL
        # Side by side: ground truth and detections, or two points.
        assert 2 * panel < picture.width < 3 * panel
        if "sampling" in name:
            assert picture.height > 3 * panel, "an untrained model's boxes are small: p2 is fed by three stages"
        assert np.asarray(picture).std() > 10


def test_image_files(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "grey.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 60, 3), dtype=np.uint8)).save(image)
    output = tmp_path / "pictures"
    files = ["--input", str(image), str(image)]
    demo.main(["--config-file", str(CONFIG), *files, "--confidence", "1", "--output", str(output), *QUICK])
    printed = capsys.readouterr()
    assert "no weights given" in printed.err
    assert f"wrote {output / 'grey_detections.png'}" in printed.out
    assert "grey: no sampling to draw (13 deformable layers, 0 detections)" in printed.out
    assert Image.open(output / "grey_detections.png").width < 2 * demo.PANEL, "there is no ground truth to draw"


def test_a_missing_image_is_named(demo: ModuleType, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.png")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        demo.main(["--config-file", str(CONFIG), "--output", str(tmp_path), "--input", missing, *QUICK])


def test_the_stages_of_a_detection_follow_from_its_fpn_level(demo: ModuleType) -> None:
    model = build_model(load_config(str(CONFIG), QUICK)).eval()
    with record_sampling(model) as record, torch.no_grad():
        model([{"image": torch.zeros(3, 64, 96)}])
    predictor = SimpleNamespace(model=model)
    # FPN's rule: a side of 224 pixels belongs to level 4, and half of it to the level below.
    for stages, sides in {"res3 res4 res5": (20, 120, 223), "res4 res5": (225, 447), "res5": (449, 900)}.items():
        for side in sides:
            box = torch.tensor([0.0, 0.0, side, side])
            assert demo.stages_of(predictor, record, box) == stages.split()
    assert demo.stages_of(SimpleNamespace(model=None), record, box) == ["res3", "res4", "res5"], "no pooler"


def test_help_is_light() -> None:
    code = """
import sys, demo
try:
    demo.main(["--help"])
finally:
    print("torch" in sys.modules, "detectron2" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--config-file FILE" in result.stdout
    assert result.stdout.endswith("False False\n")

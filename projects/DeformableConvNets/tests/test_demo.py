# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""demo.py end to end, with an untrained model: pictures of held-out tiles and of image files."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageOps

from dcn_d2.engine import load_config
from dcn_d2.modeling import DCNROIPooler
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


def test_without_weights_nothing_is_drawn(demo: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "pictures"
    with pytest.raises(SystemExit, match="no weights are given: --weights FILE names those of a trained model"):
        demo.main(["--config-file", str(CONFIG), "--output", str(output), *QUICK])
    assert not list(output.glob("*.png"))


def test_image_files(demo: ModuleType, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "grey.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 60, 3), dtype=np.uint8)).save(image)
    output = tmp_path / "pictures"
    files = ["--weights", str(weights), "--input", str(image), str(image)]
    demo.main(["--config-file", str(CONFIG), *files, "--confidence", "1", "--output", str(output), *QUICK])
    printed = capsys.readouterr()
    assert f"wrote {output / 'grey_detections.png'}" in printed.out
    assert "grey: no sampling to draw (13 deformable layers, 0 detections)" in printed.out
    assert Image.open(output / "grey_detections.png").width < 2 * demo.PANEL, "there is no ground truth to draw"


def noise(path: Path, height: int = 60, width: int = 90, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def draw(demo: ModuleType, weights: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the demo on image files and gives the folder of the pictures."""

    def run(*files: Path | str, options: tuple[str, ...] = (), output: Path = tmp_path / "pictures") -> Path:
        source = ["--input", *map(str, files)] if files else []
        options = ("--weights", str(weights), "--confidence", "0", "--output", str(output), *options)
        demo.main(["--config-file", str(CONFIG), *source, *options, *QUICK])
        return output

    return run


def names_in(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix("_detections.png") for path in folder.glob("*_detections.png"))


def test_bad_images_are_left_out_and_named_at_the_end(
    draw: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, missing, output = noise(tmp_path / "good ü.jpg"), tmp_path / "missing.png", tmp_path / "pictures"
    cut = noise(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    real = tmp_path / "real.tif"
    Image.fromarray(np.ones((60, 90), np.float32)).save(real)
    with pytest.raises(SystemExit) as stopped:
        draw(missing, cut, real, good, tmp_path)  # the folder holds no others
    first, *lines = str(stopped.value.code).split("\n")
    assert first == "demo.py: 3 of 4 image(s) not drawn:"
    expected = [
        "missing.png: No such",
        "cut.jpg cannot be read: image file is trunc",
        "real.tif has the mode F",
    ]
    assert len(lines) == len(expected) and all(part in line for part, line in zip(expected, lines))
    assert names_in(output) == ["good ü"]
    assert f"wrote {output / 'good ü_sampling.png'}" in capsys.readouterr().out


def test_images_of_one_name_do_not_overwrite_each_other(
    draw: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [noise(tmp_path / name, seed=i) for i, name in enumerate(("x1/a.png", "x2/a.png", "b.png", "b.jpg"))]
    output = draw(*files, options=("--points", "1"))
    assert names_in(output) == ["a", "a_2", "b", "b_2"]
    assert f"{files[1]}: another image has the same name" in capsys.readouterr().out
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    assert len(set(written.values())) == len(written) == 8
    draw(*files, options=("--points", "1"))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == written, "the same command works again"


def test_names_that_are_no_text_are_drawn_too(
    draw: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))  # strict, as in most languages
    output = draw(noise(tmp_path / os.fsdecode(b"latin \xe4.png")), options=("--points", "1"))
    assert names_in(output) == [os.fsdecode(b"latin \xe4")]


def test_inputs_and_files_of_others_are_not_overwritten(draw: Callable[..., Path], tmp_path: Path) -> None:
    a, other, b = (noise(tmp_path / name) for name in ("a.png", "a_detections.png", "b.png"))
    foreign = noise(tmp_path / "b_sampling.png", seed=1)
    before = {path: path.read_bytes() for path in (other, foreign)}
    with pytest.raises(SystemExit, match=r"2 of 3 image\(s\) not drawn:\n.*a_detections.*\n.*b_sampling\.png exists"):
        draw(a, other, b, output=tmp_path)
    assert {path: path.read_bytes() for path in (other, foreign)} == before
    assert names_in(tmp_path) == ["a", "a_detections"]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 3), (1, 30), (40, 1)])
def test_tiny_and_narrow_images_are_drawn(draw: Callable[..., Path], tmp_path: Path, size: tuple[int, int]) -> None:
    output = draw(noise(tmp_path / "tiny.png", *size), options=("--stretch-contrast",))
    assert sorted(path.name for path in output.iterdir()) == ["tiny_detections.png", "tiny_sampling.png"]


@pytest.mark.parametrize(
    "option, message",
    [
        ("--points -1", "--points: must be at least 0, got -1"),
        ("--max-images -1", "--max-images: must be at least 1, got -1"),
        ("--max-images 0", "--max-images: must be at least 1, got 0"),
        ("--max-images x", "--max-images: invalid whole number value: 'x'"),
        ("--confidence nan", "--confidence: must be from 0 to 1, got nan"),
        ("--confidence -1", "--confidence: must be from 0 to 1, got -1"),
        ("--confidence 1.5", "--confidence: must be from 0 to 1, got 1.5"),
        ("MODEL.DEVICE", "KEY VALUE must come in pairs, got MODEL.DEVICE"),
        ("MODEL.DEVICE cpu --points 1", "--points must come before the first KEY VALUE, MODEL.DEVICE"),
    ],
)
def test_numbers_out_of_range_are_usage_errors(
    demo: ModuleType, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--config-file", "any.yaml", *option.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "nosuch.yaml"], "nosuch.yaml"),
        (["--config-file", CONFIG, "NOSUCH.KEY", "1"], "NOSUCH.KEY"),
        (["--config-file", CONFIG, "--weights", "nosuch.pth"], "nosuch.pth"),
        (["--config-file", CONFIG, "--dataset", "nosuch"], "there is no data set 'nosuch'"),
        (["--config-file", CONFIG, "--output", CONFIG], f"{CONFIG.name} is a file; a folder"),
        (["--config-file", CONFIG, "DATASETS.TEST", "()"], "with --input or --dataset"),
        (["--config-file", CONFIG, "INPUT.FORMAT", "GREY"], "INPUT.FORMAT"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    demo: ModuleType, tmp_path: Path, arguments: list[object], message: str
) -> None:
    output = [] if "--output" in arguments else ["--output", tmp_path / "pictures"]
    with pytest.raises(SystemExit) as stopped:
        demo.main([str(argument) for argument in [*output, *arguments]])
    text = str(stopped.value.code)
    assert text.startswith("demo.py: ") and message in text and "\n" not in text


@pytest.fixture
def data_set(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Registers a data set of one image with the given annotations."""

    def register(file: Path, size: tuple[int, int], *annotations: dict[str, Any]) -> str:
        entry = {"file_name": str(file), "image_id": 1, "height": size[0], "width": size[1]}
        box = {"bbox": [8, 6, 40, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        DatasetCatalog.register("drawn", lambda: [entry | {"annotations": [box | extra for extra in annotations]}])
        MetadataCatalog.get("drawn").thing_classes = ["cost in $"]
        return "drawn"

    yield register
    DatasetCatalog.remove("drawn")
    MetadataCatalog.remove("drawn")


def test_truth_for_the_stored_size_of_a_rotated_photograph_is_refused(
    draw: Callable[..., Path], data_set: Callable[..., str], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "phone.jpg", exif=exif)
    name = data_set(tmp_path / "phone.jpg", (60, 90), {})
    with pytest.raises(SystemExit, match=r"phone\.jpg, got \(60, 90\), expect \(90, 60\)"):
        draw(options=("--dataset", name))
    assert not names_in(tmp_path / "pictures")


def test_truth_is_drawn_with_and_without_masks(
    draw: Callable[..., Path], data_set: Callable[..., str], tmp_path: Path, demo: ModuleType
) -> None:
    mask = np.zeros((60, 90), np.uint8, order="F")
    mask[6:36, 8:48] = 1
    polygon = [8, 6, 48, 6, 48, 36, 8, 36]
    whole, run_lengths = pycocotools.mask.encode(mask), {"size": [60, 90], "counts": [0, 1, 60 * 90 - 1]}
    shapes = [{"segmentation": [polygon]}, {"segmentation": whole}, {"segmentation": []}, {}]
    file = noise(tmp_path / "a.png")
    output = draw(options=("--dataset", data_set(file, (60, 90), *shapes, {"segmentation": run_lengths})))
    assert names_in(output) == ["a"]
    sample = DatasetCatalog.get("drawn")[0]
    image = np.zeros((120, 180, 3), np.uint8)
    colors = []
    for annotation in sample["annotations"][:4]:
        drawn = demo.draw_truth(image, sample | {"annotations": [annotation]}, ["one"])
        colors.append(drawn[42, 56].tolist())  # in the middle of the object
    assert colors[0] == colors[1] != [0, 0, 0], "polygon and run lengths fill the same"
    assert colors[2] == colors[3] == [0, 0, 0], "an object without a mask has its box alone"


def test_annotations_that_cannot_be_drawn_are_named(
    draw: Callable[..., Path], data_set: Callable[..., str], tmp_path: Path
) -> None:
    wrong = {"size": [90, 60], "counts": [0, 90 * 60]}
    name = data_set(
        noise(tmp_path / "a.png"), (60, 90), {}, {"segmentation": pycocotools.mask.frPyObjects(wrong, 90, 60)}
    )
    with pytest.raises(SystemExit, match=r"a\.png: annotation 1 cannot be drawn: .* \(90, 60\) and not \(60, 90\)"):
        draw(options=("--dataset", name))


@pytest.mark.parametrize("box, drawn", [([1e9, 6, 40, 30], 1), ([-1e9, 6, 30, 30], 1), ([8, 6, float("nan"), 3], 0)])
def test_an_odd_box_ended_the_demo(
    draw: Callable[..., Path], data_set: Callable[..., str], tmp_path: Path, box: list[float], drawn: int
) -> None:
    options = ("--dataset", data_set(noise(tmp_path / "a.png"), (60, 90), {"bbox": box}))
    MetadataCatalog.remove("drawn")
    MetadataCatalog.get("drawn").thing_classes = ["one", "two"]  # so that there are labels
    if drawn:
        draw(options=options)
    else:
        with pytest.raises(SystemExit, match=r"a\.png: annotation 0 cannot be drawn: .* nan"):
            draw(options=options)
    assert len(names_in(tmp_path / "pictures")) == drawn


def test_truth_has_the_names_of_its_own_data_set(
    draw: Callable[..., Path],
    data_set: Callable[..., str],
    tmp_path: Path,
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = data_set(noise(tmp_path / "a.png"), (60, 90), {}, {"category_id": 1})
    MetadataCatalog.remove("drawn")
    MetadataCatalog.get("drawn").thing_classes = ["one", "two"]  # the model has one class
    labels = []
    draw_boxes = demo.draw_boxes
    monkeypatch.setattr(demo, "draw_boxes", lambda *args: labels.extend(args[3:4]) or draw_boxes(*args))
    draw(options=("--dataset", name))
    assert ["one", "two"] in labels


class TestDataSets:
    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        yield
        DatasetCatalog.remove("drawn")

    def test_what_is_no_list_is_drawn(self, draw: Callable[..., Path], tmp_path: Path) -> None:
        files = [noise(tmp_path / f"{name}.png") for name in "abc"]

        class Own(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(files)

            def __getitem__(self, index: int) -> dict[str, Any]:
                return {"file_name": str(files[index])}

        DatasetCatalog.register("drawn", Own)
        assert names_in(draw(options=("--dataset", "drawn", "--max-images", "2"))) == ["a", "b"]

    @pytest.mark.parametrize("samples, message", [([], "has no images"), ([{"image_id": 1}], "without 'file_name'")])
    def test_nothing_to_draw_is_said(self, draw: Callable[..., Path], samples: list[Any], message: str) -> None:
        DatasetCatalog.register("drawn", lambda: samples)
        with pytest.raises(SystemExit, match=f"demo.py: data set drawn .*{message}"):
            draw(options=("--dataset", "drawn"))


def test_classes_scores_and_masks_are_drawn(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Instances((60, 90))
    found.pred_boxes = Boxes(torch.tensor([[8.0, 6, 48, 36], [50, 10, 80, 50]]))
    found.scores, found.pred_classes = torch.tensor([0.876, 0.5]), torch.tensor([1, 0])
    found.pred_masks = torch.zeros(2, 60, 90, dtype=torch.bool)
    found.pred_masks[0, 6:36, 8:48] = True
    image, seen = np.zeros((120, 180, 3), np.uint8), []
    monkeypatch.setattr(Visualizer, "draw_text", lambda self, text, *_, **__: seen.append(text))
    drawn = demo.draw_detections(image, found, ["cell", "price in $"])
    assert sorted(seen) == ["cell 50%", r"price in \$ 88%"]
    inside = drawn[42, 56]
    assert inside.any() and not drawn[60, 130].any(), "only the first one has a mask"


def test_names_come_from_the_data_set_that_fits(demo: ModuleType) -> None:
    cfg = load_config(str(CONFIG), QUICK)
    args = SimpleNamespace(dataset=None)
    assert demo.class_names(args, cfg) == ["nucleus"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    assert demo.class_names(args, cfg) == ["class 0", "class 1"]


def test_contrast_is_stretched_by_choice_and_without_changing_colours(demo: ModuleType) -> None:
    image = np.random.default_rng(0).integers(10, 60, (40, 50, 3), np.uint8)
    assert np.array_equal(demo.display_image(image, False), image[:, :, ::-1])
    reds = np.zeros((40, 50, 3), np.uint8)
    reds[:, :, 2] = np.arange(50) + 100
    assert not demo.display_image(reds, True)[:, :, 1:].any(), "red stays red"
    grey = np.repeat(image[:, :, :1], 3, axis=2)
    stretched = demo.display_image(grey, True)
    assert np.array_equal(stretched, ImageOps.autocontrast(Image.fromarray(grey), cutoff=(1, 0.5)))
    assert stretched.max() == 255 and stretched.min() == 0


def test_grey_models_draw_too(demo: ModuleType, tmp_path: Path) -> None:
    grey = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[34.0]", "MODEL.PIXEL_STD", "[25.0]"]
    path = tmp_path / "grey.pth"
    torch.save({"model": build_model(load_config(str(CONFIG), [*QUICK, *grey])).state_dict()}, path)
    files = ["--input", str(noise(tmp_path / "a.png")), "--output", str(tmp_path / "pictures")]
    demo.main(["--config-file", str(CONFIG), "--weights", str(path), *files, *QUICK, *grey])
    assert names_in(tmp_path / "pictures") == ["a"]


def test_columns_without_panels_are_left_out(
    demo: ModuleType, draw: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[], ["res3", "res5"], []])  # a detection on a level above which no layer is deformable has none
    monkeypatch.setattr(demo, "stages_of", lambda *_: next(answers))
    output = draw(noise(tmp_path / "a.png"))
    assert Image.open(output / "a_sampling.png").width < 2 * demo.SMALL_PANEL


def test_columns_are_composed_side_by_side_below_their_titles(demo: ModuleType) -> None:
    colors = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    red, green, blue = (np.broadcast_to(color, (40, 50, 3)).copy() for color in colors)
    picture = np.asarray(demo.compose([[red], [green, blue]], ["a", "b"]))
    gap, bar = 12, 34
    assert picture.shape == (bar + 2 * (40 + gap), gap + 2 * (50 + gap), 3)
    for column, row, panel in ((0, 0, red), (1, 0, green), (1, 1, blue)):
        top, left = bar + row * (40 + gap), gap + column * (50 + gap)
        assert (picture[top : top + 40, left : left + 50] == panel).all()
    assert (picture[bar + 40 :, : gap + 50] == 255).all(), "the first column has one panel"
    assert (picture[:bar, : gap + 50] < 128).any() and (picture[:bar, gap + 50 + gap :] < 128).any(), "titles"
    wide = demo.compose([[red]], ["a title that is wider than its column"])
    assert wide.width > 4 * 50
    with pytest.raises(ValueError):
        demo.compose([[red], [green]], ["one title for two columns"])


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
    # MMDetection's rule lifts a box a hair smaller than 112 pixels to the next level: the pooler is asked.
    hair = torch.tensor([0.0, 0.0, 112 * (1 - 4e-7), 112 * (1 - 4e-7)])
    names = SimpleNamespace(layers=[SimpleNamespace(name=f".res{stage}.") for stage in range(2, 6)])
    for mmdet_levels, first in ((False, "res2"), (True, "res3")):
        pooler = DCNROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2", mmdet_levels=mmdet_levels)
        model = SimpleNamespace(roi_heads=SimpleNamespace(box_pooler=pooler))
        assert demo.stages_of(SimpleNamespace(model=model), names, hair)[0] == first
    assert demo.stages_of(SimpleNamespace(model=None), record, box) == ["res3", "res4", "res5"], "no pooler"


def test_an_interrupt_was_a_traceback(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "prepare", interrupt)
    with pytest.raises(SystemExit) as error:
        demo.main(["--config-file", "a.yaml", "--output", "out"])
    assert error.value.code == 130 and capsys.readouterr().err == "demo.py: interrupted\n"


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


def test_folders_lists_and_videos_are_drawn(draw: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("in/a.png", "in/b/a.png", "c.png"):
        noise(tmp_path / name)
    (tmp_path / "list.txt").write_text("c.png\n")
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for _ in range(3):
        writer.write(np.zeros((64, 96, 3), np.uint8))
    writer.release()
    inputs = (tmp_path / "in", tmp_path / "list.txt", tmp_path / "a.avi")
    output = draw(*inputs, options=("--frames", "2", "--points", "1"))
    assert names_in(output) == ["a", "a_2", "c"]
    assert names_in(output / "a_3.frames") == ["000000", "000002"]


def test_a_row_without_weights_is_refused_with_the_line_that_loads_them(demo: ModuleType, tmp_path: Path) -> None:
    row = str(ROOT / "configs" / "mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml")
    with pytest.raises(SystemExit, match=f"the heads are not trained: .*demo.py --config-file {row} --published"):
        demo.main(["--config-file", row, "--input", str(noise(tmp_path / "a.png")), "--output", str(tmp_path)])

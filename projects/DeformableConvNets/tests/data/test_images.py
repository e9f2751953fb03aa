# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What image files, arrays and PIL images become, in training, evaluation and prediction alike."""

from __future__ import annotations

import functools
import io
import logging
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.detection_utils import read_image as read_with_detectron2
from detectron2.structures import BoxMode
from detectron2.utils import logger as detectron2_logger
from PIL import Image

from dcn_d2.data.images import ImageError, check_input_format, pixels_of, read_image
from dcn_d2.data.mapper import DCNDatasetMapper
from dcn_d2.engine import DCNPredictor, DCNTrainer

from ..slim import slim_config

FORMATS = ("BGR", "RGB", "L", "YUV-BT.601")


def pixels(*shape: int, high: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape, dtype)


def config(format: str = "BGR", **keys: Any) -> CfgNode:
    cfg = slim_config()
    cfg.INPUT.FORMAT = format
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0  # so that untrained models find something
    if format == "L":
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0], [50.0]
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = 48, (48,), "none"
    for key, value in keys.items():
        cfg.INPUT[key] = value
    return cfg


def untrained(cfg: CfgNode) -> DCNPredictor:
    torch.manual_seed(0)
    return DCNPredictor(cfg, untrained=True)


def photo(mode: str) -> Image.Image:
    if mode == "P":
        return Image.fromarray(pixels(48, 64, 3)).quantize(200)
    if mode in ("1", "YCbCr"):
        return Image.fromarray(pixels(48, 64, 3)).convert(mode)
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.fromarray(pixels(48, 64, channels).squeeze(), mode)


SUFFIXES = {"1": "png", "L": "png", "LA": "png", "P": "gif", "RGB": "png", "RGBA": "png", "CMYK": "jpg", "YCbCr": "tif"}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", SUFFIXES)
def test_8_bit_files_give_exactly_what_detectron2_reads(tmp_path: Path, mode: str, format: str) -> None:
    file = tmp_path / f"ü a.{SUFFIXES[mode]}"
    photo(mode).save(file)
    expected = read_with_detectron2(str(file), format)
    read = read_image(file, format)
    assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(read, expected)
    assert np.array_equal(pixels_of(Image.open(file), format), expected)


@pytest.mark.parametrize("orientation", range(9))
def test_exif_rotation_is_detectron2s(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    photo("RGB").save(tmp_path / "a.jpg", exif=exif)
    expected = read_with_detectron2(str(tmp_path / "a.jpg"), "BGR")
    assert expected.shape[:2] == ((64, 48) if orientation > 4 else (48, 64))
    assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big_endian.tif", "a.pgm"])
def test_of_16_bit_greys_the_upper_8_are_taken(tmp_path: Path, name: str) -> None:
    values = pixels(48, 64, high=65536, dtype=np.uint16)
    values[0, :3] = 0, 255, 65535
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 64 48 65535\n" + values.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        Image.frombytes("I;16B", (64, 48), values.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(values).save(tmp_path / name)
    expected = values // 256
    assert expected[0, :3].tolist() == [0, 0, 255]
    read = read_image(tmp_path / name)
    assert read.dtype == np.uint8
    assert (read == expected[..., None]).all()
    assert (read_image(tmp_path / name, "L")[..., 0] == expected).all()
    assert np.array_equal(pixels_of(values), read)


def test_of_16_bit_colours_the_upper_8_are_taken(tmp_path: Path) -> None:
    import cv2

    values = pixels(48, 64, 3, high=65536, dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        cv2.imwrite(str(tmp_path / name), values)
        assert np.array_equal(read_image(tmp_path / name), values // 256)
    assert np.array_equal(pixels_of(values), values // 256)


def test_16_bit_training_evaluation_and_prediction_see_the_same(tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    Image.fromarray(pixels(48, 64, high=65536, dtype=np.uint16)).save(file)
    cfg = config()
    predictor = untrained(cfg)
    seen: list[dict] = []
    predictor.model = lambda inputs: seen.extend(inputs) or [{}]
    predictor(file)
    predictor(read_image(file))
    for is_train in (True, False):
        seen.append(DCNDatasetMapper(cfg, is_train)({"file_name": str(file), "annotations": []}))
    images = [sample["image"].float() for sample in seen]
    assert len(images) == 4
    assert all(torch.equal(image, images[0]) for image in images)
    assert (images[0] == torch.from_numpy(np.asarray(Image.open(file)) // 256)).all()


def test_16_bit_is_said_once_and_dark_data_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", detectron2_logger.Counter())
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels(48, 64, high=4096, dtype=np.uint16) | 15).save(tmp_path / name)
        with caplog.at_level(logging.WARNING, "dcn_d2"):
            read_image(tmp_path / name)
    (record,) = caplog.records
    assert "a.png has 16 bits a channel: of all such images the upper 8 are taken (value // 256)" in record.message
    assert "its largest value is 4095 of 65535" in record.message


def test_dark_data_are_named_after_an_image_that_is_bright(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", detectron2_logger.Counter())
    for name, high in (("a.png", 2**16), ("b.png", 4096)):
        Image.fromarray(pixels(48, 64, high=high, dtype=np.uint16)).save(tmp_path / name)
        with caplog.at_level(logging.WARNING, "dcn_d2"):
            read_image(tmp_path / name)
    assert "comes out dark" not in caplog.records[0].message
    assert "b.png" in caplog.records[1].message and "so it comes out dark" in caplog.records[1].message


def test_files_without_a_rule_are_refused_with_name_and_mode(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((48, 64), 70000, np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(ImageError, match=r"float\.tif has the mode F: only 8 bits"):
        read_image(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"int\.tif has the mode I: only 8 bits"):
        read_image(tmp_path / "int.tif")


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.png"])
def test_files_of_several_pages_are_refused(tmp_path: Path, name: str) -> None:
    pages = [Image.fromarray(np.full((48, 64), value, np.uint8)) for value in (0, 100, 200)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match=rf"{name} holds 3 pages or frames"):
        read_image(tmp_path / name)


def test_a_photograph_with_a_preview_is_read(tmp_path: Path) -> None:
    photo("RGB").save(tmp_path / "a.mpo", save_all=True, append_images=[photo("RGB").resize((16, 12))])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_with_detectron2(str(tmp_path / "a.jpg"), "BGR"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "gif", "bmp", "webp"])
def test_truncated_images_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"cut.{suffix}"
    Image.fromarray(pixels(200, 300, 3)).save(file)
    data = file.read_bytes()
    for size in (0, 1, 30, len(data) // 2, len(data) - 100):
        file.write_bytes(data[:size])
        with pytest.raises(ImageError, match=rf"cut\.{suffix} (cannot be read: |is not an image)"):
            read_image(file)


def test_too_large_images_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo("RGB").save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit is 89 million, and it refuses at twice it
    with pytest.raises(ImageError, match=r"large\.png cannot be read: Image size \(3072 pixels\) exceeds limit"):
        read_image(tmp_path / "large.png")


def test_what_is_no_image_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("<html>")
    with pytest.raises(ImageError, match=r"text\.png is not an image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ImageError, match="is a folder, an image file was expected"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read_image(tmp_path / "missing.png")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Serves tmp_path/web; gives the port."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield str(server.server_port)
        server.shutdown()


def test_images_of_the_web_were_not_read_and_those_of_two_hosts_were_one(web: str, tmp_path: Path) -> None:
    for value, host in ((10, "localhost"), (20, "127.0.0.1")):
        Image.new("RGB", (4, 3), (value,) * 3).save(tmp_path / "web" / "a.png")
        assert (read_image(f"http://{host}:{web}/a.png") == value).all()
    with pytest.raises(ImageError, match=f"http://localhost:{web}/b.png could not be fetched: .*404"):
        read_image(f"http://localhost:{web}/b.png")


def test_arrays_are_bgr_or_grey() -> None:
    bgr = pixels(6, 4, 3)
    assert np.array_equal(pixels_of(bgr), bgr)
    assert np.array_equal(pixels_of(bgr, "RGB"), bgr[:, :, ::-1])
    assert np.array_equal(pixels_of(bgr[:, ::-1]), bgr[:, ::-1])
    grey = np.asarray(Image.fromarray(bgr[:, :, ::-1]).convert("L"))
    assert np.array_equal(pixels_of(bgr, "L"), grey[:, :, None])
    for one in (grey, grey[:, :, None]):
        assert np.array_equal(pixels_of(one), np.dstack([grey] * 3))
        assert np.array_equal(pixels_of(one, "L"), grey[:, :, None])
    assert np.array_equal(pixels_of(bgr.astype(">u2") * 256), bgr)


REFUSED = {
    "bool": (np.eye(4, dtype=bool), r"bool and shape \(4, 4\) with values from False to True"),
    "floats": (np.linspace(0, 1, 48).reshape(4, 4, 3), r"float64 and shape \(4, 4, 3\) with values from 0\.0 to 1\.0"),
    "float32": (np.full((4, 4, 3), 255, np.float32), r"float32 .* from 255\.0 to 255\.0"),
    "int64": (np.full((4, 4, 3), 255), r"int64 .* from 255 to 255.*scale the values to 0\.\.255"),
    "int16": (np.full((4, 4, 3), -3, np.int16), r"int16 .* from -3 to -3"),
    "uint32": (np.full((4, 4, 3), 3, np.uint32), "uint32"),
    "RGBA": (np.zeros((4, 5, 4), np.uint8), r"uint8 and shape \(4, 5, 4\) with values from 0 to 0; expected a uint8"),
    "channels first": (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\)"),
    "batch": (np.zeros((1, 4, 5, 3), np.uint8), r"shape \(1, 4, 5, 3\)"),
    "empty": (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
    "None": (None, "the image is None, which OpenCV gives for what it cannot read"),
    "tensor": (torch.zeros(4, 5, 3, dtype=torch.uint8), "the image is a torch.Tensor"),
    "empty PIL image": (Image.new("RGB", (0, 5)), "the image has 0 x 5 pixels"),
    "list": ([[1, 2]], "the image is a builtins.list"),
}


@pytest.fixture(scope="module")
def predictor() -> DCNPredictor:
    return untrained(config(RESIZE_WITH="cv2"))


@pytest.mark.parametrize("image, message", REFUSED.values(), ids=REFUSED)
def test_predictor_refuses_what_is_no_image(predictor: DCNPredictor, image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        predictor(image)


def test_predictor_finds_the_same_in_every_kind_of_image(predictor: DCNPredictor, tmp_path: Path) -> None:
    grey = pixels(48, 64)
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected = predictor(np.dstack([grey] * 3))["instances"]
    assert len(expected) > 0
    same = [grey, grey[:, :, None], grey.astype(np.uint16) * 257, Image.fromarray(grey), tmp_path / "a.png"]
    for image in [*same, str(tmp_path / "a.png")]:
        found = predictor(image)["instances"]
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("library", ["PIL", "cv2"])
def test_predictor_refuses_what_resizing_would_leave_nothing_of(library: str) -> None:
    predictor = untrained(config(RESIZE_WITH=library))
    with pytest.raises(ImageError, match="an image of 1 x 4000 pixels would be resized to 0 x 1333"):
        predictor(np.zeros((1, 4000, 3), np.uint8))


@pytest.mark.parametrize("library", ["PIL", "cv2"])
def test_grey_models_predict_what_they_were_trained_on(tmp_path: Path, library: str) -> None:
    cfg = config("L", RESIZE_WITH=library)
    predictor = untrained(cfg)
    photo("RGB").save(tmp_path / "a.png")
    bgr = read_image(tmp_path / "a.png")
    with torch.no_grad():
        sample = DCNDatasetMapper(cfg, is_train=False)({"file_name": str(tmp_path / "a.png")})
        (expected,) = predictor.model([sample])
    assert sample["image"].shape[0] == 1
    assert len(expected["instances"]) > 0
    for image in (bgr, tmp_path / "a.png"):
        assert torch.equal(predictor(image)["instances"].scores, expected["instances"].scores)


def test_channels_that_do_not_fit_the_means_are_refused() -> None:
    cfg = config("L")
    check_input_format(cfg)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0] * 3, [1.0] * 3
    check_input_format(cfg)  # grey, repeated: weights for colour images fit it
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = "BGR", [1.0]
    for use in (untrained, lambda cfg: DCNDatasetMapper(cfg, True)):
        with pytest.raises(ValueError, match=r"MODEL\.PIXEL_MEAN .*\b1\b"):
            use(cfg)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0] * 3, [1.0] * 2
    with pytest.raises(ValueError, match="MODEL.PIXEL_STD must have as many values as MODEL.PIXEL_MEAN, 3, got 2"):
        check_input_format(cfg)
    cfg.INPUT.FORMAT = "GREY"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is 'GREY'; it may be"):
        check_input_format(cfg)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("masks", [True, False])
def test_mapper_gives_what_detectron2s_gives(
    is_train: bool, masks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg = config()
    cfg.MODEL.MASK_ON, cfg.INPUT.CROP.ENABLED = masks, not masks  # to crop polygons Detectron2 needs shapely
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    sample = DatasetCatalog.get("nuclei_val")[0]
    results = []
    for mapper in (DCNDatasetMapper(cfg, is_train), DatasetMapper(cfg, is_train)):
        np.random.seed(1)
        results.append(mapper(sample))
    mine, theirs = results
    assert list(mine) == list(theirs)
    assert torch.equal(mine["image"], theirs["image"])
    if is_train:
        assert mine["instances"].get_fields().keys() == theirs["instances"].get_fields().keys()
        assert torch.equal(mine["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
    assert "annotations" in sample, "the data set's own entry stays as it is"


def test_mapper_names_the_image_in_every_error(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    photo("RGB").save(file)
    cfg = config()
    cfg.MODEL.MASK_ON = True
    mapper = DCNDatasetMapper(cfg, is_train=True)
    box = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    with pytest.raises(ValueError, match=r"a\.png: cannot be prepared for the model: ValueError: .*segmentation"):
        mapper({"file_name": str(file), "annotations": [box | {"segmentation": {1, 2}}]})
    with pytest.raises(ValueError, match=r"a\.png: cannot be prepared for the model: KeyError: 'bbox_mode'"):
        mapper({"file_name": str(file), "annotations": [{"bbox": [1, 2, 3, 4]}]})
    with pytest.raises(SizeMismatchError, match=r"a\.png, got \(64, 48\), expect \(48, 64\)"):
        mapper({"file_name": str(file), "width": 48, "height": 64, "annotations": []})
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ImageError, match=r"a\.png cannot be read: image file is truncated"):
        mapper({"file_name": str(file), "annotations": []})


def test_a_truncated_image_is_named_by_the_workers_of_a_loader(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    photo("RGB").save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:1000])
    cfg = config()
    cfg.DATALOADER.NUM_WORKERS = 1
    DatasetCatalog.register("cut", lambda: [{"file_name": str(tmp_path / "cut.png"), "image_id": 1}])
    try:
        with pytest.raises(ImageError, match=r"cut\.png cannot be read: image file is truncated"):
            next(iter(DCNTrainer.build_test_loader(cfg, "cut")))
    finally:
        DatasetCatalog.remove("cut")

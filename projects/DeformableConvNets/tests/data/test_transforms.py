# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation as build_detectron2_augmentation
from PIL import Image

from dcn_d2.config import check_config
from dcn_d2.data.transforms import OpenCVResizeShortestEdge, OpenCVResizeTransform, build_augmentation
from dcn_d2.engine import DCNPredictor, DCNTrainer

from ..slim import slim_config


def image(height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def config(**keys: object) -> CfgNode:
    cfg = slim_config()
    cfg.INPUT.RESIZE_WITH = "cv2"
    for key, value in keys.items():
        cfg.INPUT[key] = value
    return cfg


# Shapes, and what MMDetection makes of them: mmcv.rescale_size with (1333, 800).
@pytest.mark.parametrize(
    "shape, expected",
    [
        ((480, 640), (800, 1067)),
        ((427, 640), (800, 1199)),
        ((640, 427), (1199, 800)),
        ((375, 1242), (402, 1333)),
        ((800, 1333), (800, 1333)),
        ((1600, 2666), (800, 1333)),
    ],
)
def test_sizes_of_mmdetection(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    resize = OpenCVResizeShortestEdge([800], 1333, "choice").get_transform(np.zeros(shape, np.uint8))
    assert (resize.new_h, resize.new_w) == expected


def test_sizes_differ_from_detectron2s_by_a_pixel_for_few_shapes() -> None:
    mine, theirs = OpenCVResizeShortestEdge.get_output_shape, T.ResizeShortestEdge.get_output_shape
    shapes = [(h, w) for h in range(32, 641, 3) for w in range(32, 641, 3)]
    both = [(mine(*shape, 800, 1333), theirs(*shape, 800, 1333)) for shape in shapes]
    different = [pair for pair in both if pair[0] != pair[1]]
    assert 0 < len(different) < len(shapes) / 1000
    assert all(abs(a - b) <= 1 for pair in different for a, b in zip(*pair))


def test_shrinking_does_not_smooth() -> None:
    # At a third, each new pixel's centre is an old pixel's centre.
    pixels = image(48, 60)
    assert np.array_equal(OpenCVResizeTransform(48, 60, 16, 20).apply_image(pixels), pixels[1::3, 1::3])
    assert not np.array_equal(T.ResizeTransform(48, 60, 16, 20, Image.BILINEAR).apply_image(pixels), pixels[1::3, 1::3])


def test_enlarging_differs_from_pil_by_a_grey_level_at_most() -> None:
    mine = OpenCVResizeTransform(48, 64, 80, 107).apply_image(image()).astype(int)
    theirs = T.ResizeTransform(48, 64, 80, 107, Image.BILINEAR).apply_image(image()).astype(int)
    assert np.abs(mine - theirs).max() == 1


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1), (48, 64, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_dimensions_and_types_stay(shape: tuple[int, ...], dtype: type) -> None:
    resized = OpenCVResizeTransform(48, 64, 30, 40).apply_image(np.ones(shape, dtype)[:, ::-1])
    assert resized.shape == (30, 40, *shape[2:]) and resized.dtype == dtype
    assert (resized == 1).all()


def test_segmentations_take_the_nearest_pixel() -> None:
    labels = np.random.default_rng(0).integers(0, 5, (48, 64), np.uint8)
    resized = OpenCVResizeTransform(48, 64, 96, 128).apply_segmentation(labels)
    assert np.array_equal(resized, labels.repeat(2, axis=0).repeat(2, axis=1))


def test_boxes_go_with_the_image_and_back() -> None:
    resize = OpenCVResizeTransform(48, 64, 80, 107)
    (box,) = resize.apply_box(np.array([[8.0, 12, 32, 24]]))
    assert box.tolist() == pytest.approx([8 * 107 / 64, 20, 32 * 107 / 64, 40])
    assert resize.inverse().apply_box(box[None])[0].tolist() == pytest.approx([8, 12, 32, 24])
    assert type(resize.inverse()) is OpenCVResizeTransform


def test_wrong_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the image is \(48, 64\) and not \(64, 48\)"):
        OpenCVResizeTransform(64, 48, 10, 10).apply_image(image())


def test_given_interpolation_is_detectron2s() -> None:
    kinds = (OpenCVResizeTransform, T.ResizeTransform)
    mine, theirs = (kind(48, 64, 20, 30).apply_image(image(), Image.NEAREST) for kind in kinds)
    assert np.array_equal(mine, theirs)


def test_edges_are_drawn_as_in_detectron2() -> None:
    for arguments in ([(32, 48, 64), 1333, "choice"], [(32, 64), 1333, "range"], [0, 1333]):
        transforms = []
        for kind in (OpenCVResizeShortestEdge, T.ResizeShortestEdge):
            np.random.seed(0)
            transforms.append([kind(*arguments).get_transform(image()) for _ in range(20)])
        assert [type(t) is T.NoOpTransform for t in transforms[0]] == [arguments[0] == 0] * 20
        assert [getattr(t, "new_h", 0) for t in transforms[0]] == [getattr(t, "new_h", 0) for t in transforms[1]]


@pytest.mark.parametrize("is_train", [False, True])
@pytest.mark.parametrize("crop", [False, True])
def test_default_augmentations_are_those_of_detectron2s_mapper(is_train: bool, crop: bool) -> None:
    cfg = config(RESIZE_WITH="PIL")
    cfg.INPUT.CROP.ENABLED = crop
    expected = DatasetMapper(cfg, is_train).augmentations.augs
    assert list(map(repr, build_augmentation(cfg, is_train))) == list(map(repr, expected))


def test_key_changes_the_resizing_only() -> None:
    mine, theirs = build_augmentation(config(), True), build_detectron2_augmentation(config(), True)
    assert type(mine[0]) is OpenCVResizeShortestEdge and type(mine[1]) is type(theirs[1]) is T.RandomFlip
    for name in ("short_edge_length", "max_size", "is_range"):
        assert getattr(mine[0], name) == getattr(theirs[0], name)


def test_unknown_library_is_refused() -> None:
    with pytest.raises(ValueError, match='RESIZE_WITH must be "PIL" or "cv2", got \'opencv\''):
        build_augmentation(config(RESIZE_WITH="opencv"), False)


def test_loaders_resize_with_opencv() -> None:
    cfg = config(MIN_SIZE_TEST=200, MIN_SIZE_TRAIN=(200,), RANDOM_FLIP="none")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("nuclei_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    for loader in (DCNTrainer.build_test_loader(cfg, "nuclei_val"), DCNTrainer.build_train_loader(cfg)):
        sample = next(iter(loader))[0]
        pixels = np.asarray(Image.open(sample["file_name"]).convert("RGB"))[:, :, ::-1]
        height, width = OpenCVResizeShortestEdge.get_output_shape(*pixels.shape[:2], 200, 1333)
        expected = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), expected)


@pytest.mark.parametrize("library", ["PIL", "cv2"])
def test_predictor_resizes_with_what_the_key_names(library: str) -> None:
    cfg = config(RESIZE_WITH=library, MIN_SIZE_TEST=32, FORMAT="RGB")
    predictor = DCNPredictor(cfg, untrained=True)
    seen = []
    predictor.model = lambda inputs: seen.extend(inputs) or [{}]
    predictor(image())
    rgb = np.ascontiguousarray(image()[:, :, ::-1])
    expected = {
        "PIL": lambda: np.asarray(Image.fromarray(rgb).resize((43, 32), Image.BILINEAR)),
        "cv2": lambda: cv2.resize(rgb, (43, 32), interpolation=cv2.INTER_LINEAR),
    }[library]()
    assert torch.equal(seen[0]["image"], torch.from_numpy(expected.astype(np.float32).transpose(2, 0, 1)))
    assert (seen[0]["height"], seen[0]["width"]) == (48, 64)


@pytest.mark.parametrize("library", ["PIL", "cv2"])
@pytest.mark.parametrize(
    ("shape", "least", "expected"),
    [
        ((48, 64), 24, (24, 32)),  # fits, at the config's scale
        ((48, 64), 60, (30, 40)),
        ((64, 48), 60, (36, 27)),
        ((100, 10), 0, (36, 4)),  # MIN_SIZE_TEST 0 leaves the size alone, but it has to fit
        ((20, 30), 0, (20, 30)),
    ],
)
def test_images_for_tests_fit_into_the_canvas(
    library: str, shape: tuple[int, int], least: int, expected: tuple[int, int]
) -> None:
    cfg = config(RESIZE_WITH=library, MIN_SIZE_TEST=least, CANVAS_TEST=(36, 40))
    pixels = image(*shape)
    (augmentation,) = build_augmentation(cfg, is_train=False)
    resized = augmentation.get_transform(pixels).apply_image(pixels)
    assert resized.shape == (*expected, 3)
    if library == "cv2":
        np.testing.assert_array_equal(resized, cv2.resize(pixels, expected[::-1], interpolation=cv2.INTER_LINEAR))
    elif expected != shape:
        smaller = Image.fromarray(pixels).resize(expected[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(resized, np.asarray(smaller))
    trained = build_augmentation(cfg, is_train=True)
    assert not any(hasattr(each, "height") for each in trained), "training is as without it"


@pytest.mark.parametrize("canvas", [(0, 5), (5,), "large", (4.0, 4)])
def test_a_canvas_is_a_size_or_nothing(canvas: object) -> None:
    cfg = config(CANVAS_TEST=canvas)
    with pytest.raises(ValueError, match=r"INPUT.CANVAS_TEST must be \(height, width\), whole numbers from 1 to 65536"):
        check_config(cfg)

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The predictor with many images: the results of one by one, in their order; errors; copies in other processes."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image
from torchvision.ops import boxes

from dcn_d2 import model_zoo
from dcn_d2.data.images import ImageError
from dcn_d2.engine import DCNPredictor, batching
from dcn_d2.engine.predictor import Plan

from ..slim import slim_config

SIZES = [(64, 96), (96, 64), (64, 96), (64, 96), (70, 64), (128, 192), (96, 64)]  # the sixth is resized to the first


def images(sizes: list[tuple[int, int]] = SIZES) -> list[np.ndarray]:
    """Smooth images, each of its own, in which random models find something."""
    generator = np.random.default_rng(0)
    small = [generator.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in sizes]
    return [
        np.asarray(Image.fromarray(each).resize(size[::-1], Image.Resampling.BICUBIC))
        for each, size in zip(small, sizes)
    ]


def config(kind: str = "faster", *others: Any) -> CfgNode:
    """A slim model of a kind; deformable, and with so many classes that scores differ."""
    base = None
    if kind.startswith("cascade"):
        base = model_zoo.get_config("cascade_mask_rcnn_X_101_32x4d_FPN_1x_dconv_c3-c5")
        base.MODEL.RESNETS.DEPTH, base.MODEL.RESNETS.NUM_GROUPS = 50, 1
    cfg = slim_config(base, DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_MODULATED=True)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 4, 0.05
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 7, 1
    cfg.MODEL.MASK_ON = kind in ("mask", "cascade_mask", "panoptic")
    if kind == "keypoints":
        cfg.MODEL.KEYPOINT_ON, cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = True, (16,)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    if kind == "panoptic":
        cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 5, 32
        cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.2
    cfg.merge_from_list(list(others))
    return cfg


def trained(cfg: CfgNode, folder: Path) -> CfgNode:
    """Random weights with offsets that are not zero, in a file that the config then names."""
    torch.manual_seed(1)
    model = build_model(cfg)
    for name, weight in model.state_dict().items():
        if "offset" in name:
            torch.nn.init.normal_(weight, std=0.05)
        elif name.endswith(("cls_score.weight", "bbox_pred.weight", "objectness_logits.weight")):
            weight *= 10  # else all scores are nearly equal, and rounding would decide about their order
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> CfgNode:
    return trained(config(), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def predictor(cfg: CfgNode) -> DCNPredictor:
    return DCNPredictor(cfg)


def check_equal(found: Any, expected: Any, tolerance: float = 1e-3) -> int:
    """Compares outputs of the model up to rounding; gives the number of detections."""
    close = {"rtol": tolerance, "atol": tolerance}
    assert found.keys() == expected.keys()
    if "sem_seg" in expected:
        torch.testing.assert_close(found["sem_seg"], expected["sem_seg"], **close)
        labels, wanted = found["panoptic_seg"], expected["panoptic_seg"]
        assert float((labels[0] != wanted[0]).float().mean()) < 0.001
        assert [s["category_id"] for s in labels[1]] == [s["category_id"] for s in wanted[1]] != []
    ours, theirs = found["instances"].get_fields(), expected["instances"].get_fields()
    assert ours.keys() == theirs.keys() and found["instances"].image_size == expected["instances"].image_size
    assert torch.equal(ours["pred_classes"], theirs["pred_classes"])
    torch.testing.assert_close(ours["scores"], theirs["scores"], **close)
    torch.testing.assert_close(
        ours["pred_boxes"].tensor, theirs["pred_boxes"].tensor, rtol=tolerance, atol=100 * tolerance
    )
    if "pred_masks" in theirs:
        assert ours["pred_masks"].shape[1:] == expected["instances"].image_size
        assert float((ours["pred_masks"] != theirs["pred_masks"]).float().mean()) < 0.001
    if "pred_keypoints" in theirs:
        torch.testing.assert_close(ours["pred_keypoints"], theirs["pred_keypoints"], **close)
    return len(theirs["scores"])


@pytest.mark.parametrize("kind", ["faster", "mask", "cascade", "cascade_mask", "keypoints", "panoptic"])
def test_many_images_give_what_each_gives_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nms = boxes.batched_nms  # Detectron2 gives it boxes in float32; then scores must be, too
    monkeypatch.setattr(boxes, "batched_nms", lambda rows, scores, *others: nms(rows, scores.float(), *others))
    predictor = DCNPredictor(trained(config(kind), tmp_path))
    predictor.model = predictor.model.double()  # so that rounding decides nothing
    given = images()
    expected = [predictor(image) for image in given]
    for predictor.batch_size, predictor.workers in ((3, 1), (2, 2)):
        found = predictor(given)
        assert [each["instances"].image_size for each in found] == SIZES
        assert sum(check_equal(*pair, 1e-8) for pair in zip(found, expected)) > 10


def test_batches_hold_images_of_one_size_after_resizing(cfg: CfgNode) -> None:
    predictor = DCNPredictor(cfg, batch_size=3, workers=1)
    model, shapes = predictor.model, []

    def record(inputs: list[dict[str, Any]]) -> Any:
        shapes.append([tuple(each["image"].shape[1:]) for each in inputs])
        return model(inputs)

    predictor.model = record
    predictor(images())
    assert shapes == [[(64, 96)] * 3, [(96, 64)] * 2, [(70, 64)], [(64, 96)]]


def test_every_kind_of_image_and_of_iterable_is_taken(predictor: DCNPredictor, tmp_path: Path) -> None:
    (image,) = images(SIZES[:1])
    Image.fromarray(image[:, :, ::-1]).save(tmp_path / "a.png")
    kinds = [image, Image.fromarray(image[:, :, ::-1]), tmp_path / "a.png", str(tmp_path / "a.png")]
    expected = predictor(image)
    for given in (kinds, tuple(kinds), iter(kinds), (each for each in kinds)):
        found = predictor(given)
        assert len(found) == 4 and all(check_equal(each, expected) for each in found)
    assert predictor([]) == [] and predictor(iter(())) == []
    assert isinstance(predictor([image]), list) and isinstance(predictor(image), dict)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_no_image_is_named_by_its_position(cfg: CfgNode, workers: int, tmp_path: Path) -> None:
    predictor = DCNPredictor(cfg, batch_size=2, workers=workers)
    good = images(SIZES[:1])[0]
    with pytest.raises(ImageError, match=r"image 2 of those given \(from 0\): the image is a torch.Tensor; expected"):
        predictor([good, good, torch.zeros(3, 4, 5), good])
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"image 1 of .*b\.png is not an image"):
        predictor([good, tmp_path / "b.png", None])
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        predictor([good, str(tmp_path / "missing.png")])
    with pytest.raises(TypeError, match="stream takes an iterable of images, got one str"):
        next(predictor.stream("a.png"))
    found = list(predictor.stream([None, good, tmp_path / "missing.png", good], return_errors=True))
    assert [type(each) for each in found] == [ImageError, dict, FileNotFoundError, dict]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_endless_stream_is_read_a_few_batches_ahead(cfg: CfgNode, workers: int) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        for image in itertools.cycle(images()):
            taken += 1
            yield image

    before = threading.active_count()
    stream = DCNPredictor(cfg, batch_size=2, workers=workers).stream(endless())
    for number, found in enumerate(itertools.islice(stream, 30)):
        assert found["instances"].image_size == SIZES[number % len(SIZES)]
        assert taken - number <= 4 * 2 * workers
    stream.close()
    assert threading.active_count() == before


def test_errors_of_the_model_and_of_the_iterable_end_the_call(cfg: CfgNode) -> None:
    predictor = DCNPredictor(cfg, batch_size=2, workers=2)
    before = torch.get_num_threads()

    def broken() -> Iterator[np.ndarray]:
        yield from images()
        raise RuntimeError("the camera is gone")

    with pytest.raises(RuntimeError, match="the camera is gone"):
        predictor(broken())

    def full(inputs: Any) -> Any:
        raise MemoryError("no memory")

    predictor.model = full
    for predictor.workers in (1, 2):
        with pytest.raises(MemoryError, match="no memory"):
            predictor(images())
    assert torch.get_num_threads() == before and threading.active_count() < 20


def test_the_caller_decides_how_much_runs_at_once(cfg: CfgNode) -> None:
    before = torch.get_num_threads()
    predictor = DCNPredictor(cfg, workers=2, batch_size=4)
    model, threads = predictor.model, set()

    def record(inputs: Any) -> Any:
        threads.add((threading.current_thread(), torch.get_num_threads()))
        return model(inputs)

    predictor.model = record
    try:
        torch.set_num_threads(4)
        assert predictor.plan() == Plan(batch_size=4, workers=2, threads=2)
        predictor(images() * 4)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert {number for _, number in threads} == {2} and len(threads) == 2
    for name, value in (("batch_size", 0), ("workers", 1.5), ("workers", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be a whole number from 1 on"):
            DCNPredictor(cfg, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
def test_mixed_precision_of_the_caller_reaches_the_workers(cfg: CfgNode, workers: int) -> None:
    predictor, seen = DCNPredictor(cfg, workers=workers, batch_size=1), []

    def record(inputs: Any) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return [{}]

    predictor.model = record
    with torch.autocast("cpu", torch.bfloat16):
        predictor(images()[:2])
    assert seen == [(True, torch.bfloat16)] * 2
    predictor(images()[:1])
    assert not seen[2][0]


def test_memory_limits_how_many_batches_run_at_once(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = DCNPredictor(cfg)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    each = 2 * 64 * 1333 * batching.BYTES_FOR_A_PIXEL
    for free, workers in ((0, 1), (2 * each, 1), (8 * each, 4), (1000 * each, 16)):
        monkeypatch.setattr(batching, "_free_memory", lambda free=free: free)
        assert predictor.plan() == Plan(batch_size=2, workers=workers, threads=16 // workers)
    predictor.workers = 8
    assert predictor.plan() == Plan(batch_size=2, workers=8, threads=2)
    predictor.workers, predictor.cfg.MODEL.DEVICE = None, "cuda"
    assert predictor.plan() == Plan(batch_size=2, workers=1, threads=16)


def weights_of(predictor: DCNPredictor) -> dict[str, torch.Tensor]:
    return predictor.model.state_dict()


def test_a_pickle_is_small_and_builds_the_same_predictor(
    predictor: DCNPredictor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = pickle.dumps(predictor)
    assert len(data) < 100_000
    twin = pickle.loads(data)
    assert twin._model is None  # nothing was built so far
    assert pickle.dumps(twin) == pickle.dumps(pickle.loads(data))
    for name, value in weights_of(predictor).items():
        assert torch.equal(weights_of(twin)[name], value), name
    given = images()
    for found, expected in zip(twin(given), predictor(given)):
        assert check_equal(found, expected)


def test_a_pickle_finds_weights_with_a_relative_name(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(cfg.MODEL.WEIGHTS).parent
    monkeypatch.chdir(folder)
    relative = cfg.clone()
    relative.MODEL.WEIGHTS = "model.pth"
    data = pickle.dumps(DCNPredictor(relative))
    monkeypatch.chdir(tmp_path)
    assert len(weights_of(pickle.loads(data)))


def test_a_pickle_notices_that_the_file_has_other_weights(cfg: CfgNode, tmp_path: Path) -> None:
    mine = cfg.clone()
    mine.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    weights = torch.load(cfg.MODEL.WEIGHTS)
    torch.save(weights, mine.MODEL.WEIGHTS)
    data = pickle.dumps(DCNPredictor(mine))
    weights["model"]["proposal_generator.rpn_head.conv.weight"][0, 0, 0, 0] += 1e-3
    torch.save(weights, mine.MODEL.WEIGHTS)
    twin = pickle.loads(data)
    with pytest.raises(ValueError, match=r"model.pth holds other weights than when the predictor was pickled"):
        _ = twin.model


def test_weights_that_no_file_holds_are_pickled(cfg: CfgNode) -> None:
    changed, replaced = DCNPredictor(cfg), DCNPredictor(cfg)
    with torch.no_grad():
        next(changed.model.parameters()).add_(1)
    replaced.model = copy.deepcopy(replaced.model).half()
    initial = config()
    initial.MODEL.WEIGHTS = ""
    for predictor in (changed, replaced, DCNPredictor(initial, untrained=True)):
        twin = pickle.loads(pickle.dumps(predictor))
        for name, value in weights_of(predictor).items():
            assert torch.equal(weights_of(twin)[name], value), name


def test_weights_that_were_changed_by_their_data_were_lost_or_refused_in_a_pickle(cfg: CfgNode) -> None:
    predictor = DCNPredictor(cfg)
    for _ in range(2):  # the second time, a pickle was there already
        pickle.dumps(predictor)
        next(predictor.model.parameters()).data += 1
        twin = pickle.loads(pickle.dumps(predictor))
        assert torch.equal(next(twin.model.parameters()), next(predictor.model.parameters()))


def test_changes_of_the_config_made_the_pickle_another_model(cfg: CfgNode) -> None:
    predictor = DCNPredictor(cfg)
    predictor.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.9
    twin = pickle.loads(pickle.dumps(predictor))
    assert twin.model.roi_heads.box_predictor.test_score_thresh == cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST


def test_a_pickle_from_a_machine_with_a_gpu_runs_on_one_without(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = DCNPredictor(cfg)
    predictor.cfg.MODEL.DEVICE = predictor._model_cfg.MODEL.DEVICE = "cuda"
    data = pickle.dumps(predictor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    twin = pickle.loads(data)
    assert twin.cfg.MODEL.DEVICE == "cpu" and next(twin.model.parameters()).device.type == "cpu"


def test_a_deep_copy_has_a_model_of_its_own(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = DCNPredictor(cfg)
    monkeypatch.setattr(DCNPredictor, "_build", lambda self: pytest.fail("it was read again"))
    twin = copy.deepcopy(predictor)
    assert len(pickle.dumps(twin)) < 100_000
    with torch.no_grad():
        next(twin.model.parameters()).zero_()
    assert next(predictor.model.parameters()).any()


def predict(predictor: DCNPredictor, given: list[np.ndarray], queue: Any) -> None:
    """Runs in another process."""
    torch.set_num_threads(1)
    queue.put([each["instances"].scores.tolist() for each in predictor(given)])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_another_process_finds_the_same(predictor: DCNPredictor, method: str) -> None:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=predict, args=(predictor, images(), queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    for scores, expected in zip(found, predictor(images())):
        torch.testing.assert_close(scores, expected["instances"].scores.tolist(), rtol=1e-3, atol=1e-3)


def test_a_model_that_is_loaded_is_built_without_random_weights(cfg: CfgNode) -> None:
    state = torch.get_rng_state()
    DCNPredictor(cfg)
    assert torch.equal(torch.get_rng_state(), state)
    DCNPredictor(cfg, untrained=True)
    assert not torch.equal(torch.get_rng_state(), state)

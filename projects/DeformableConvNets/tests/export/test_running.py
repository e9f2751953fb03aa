# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What runs a model also runs an exported one: the predictor, predict.py, demo.py, train_net.py and DetectorActor."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Instances

import demo
import predict
import train_net
from dcn_d2 import export
from dcn_d2.batch import DetectorActor
from dcn_d2.engine import load_config
from dcn_d2.export.predictor import ExportedPredictor
from dcn_d2.report.runs import read_runs

from .files import SIZES, SUFFIXES, Detector
from .test_model import check_equal


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture
def logs() -> Iterator[None]:
    """Leaves loggers as they were; train_net.py writes to files."""
    names = ["dcn_d2", "detectron2", "fvcore"]
    before = {name: list(logging.getLogger(name).handlers) for name in names}
    yield
    for name in names:
        logging.getLogger(name).handlers[:] = before[name]


def check_alike(found: dict[str, Instances], expected: dict[str, Instances]) -> int:
    """As `check_equal`, whatever the order of detections with equal scores."""
    ours, theirs = (each["instances"] for each in (found, expected))
    assert len(ours) == len(theirs)
    ours, theirs = (
        each[np.lexsort((each.pred_boxes.tensor[:, 0].round().numpy(), each.scores.numpy().round(4)))]
        for each in (ours, theirs)
    )
    return check_equal({"instances": ours}, {"instances": theirs})


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_loaded_file_gives_what_the_predictor_gives(format: str, detector: Detector) -> None:
    predictor = export.load(detector.export(format))
    assert predictor.class_names == ["cell", "crack"] == predictor.metadata.thing_classes
    assert predictor.description.part == "detector" and not predictor.model.training
    for path in detector.images[:2]:
        image = cv2.imread(str(path))
        assert check_alike(predictor(image), detector.predictor(image)) > 10
    files = [str(path) for path in detector.images]
    found, expected = predictor(files), detector.predictor(files)
    assert [each["instances"].image_size for each in found] == SIZES
    for pair in zip(found, expected, strict=True):
        assert check_alike(*pair) > 10
    assert list(predictor.stream(iter([None]), return_errors=True))[0].args[0].startswith("image 0 of those given")


@pytest.mark.parametrize("format", SUFFIXES)
def test_workers_share_a_session(format: str, detector: Detector) -> None:
    predictor = export.load(detector.export(format), workers=3, batch_size=1)
    files = [str(path) for path in detector.images] * 3
    for pair in zip(predictor(files), detector.predictor(files), strict=True):
        assert check_alike(*pair) > 10


def test_plans_suit_the_runtime(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    plain, runtime = export.load(detector.export()), export.load(detector.export("openvino"))
    assert plain.plan() == detector.predictor.plan() and plain.plan().workers > 1
    assert runtime.plan() == (2, 1, 4)
    runtime.workers, runtime.batch_size = 2, 3
    assert runtime.plan() == (3, 2, 2)
    assert export.load(detector.export(batch=3)).plan().batch_size == 3


def test_copies_open_the_file_when_they_need_it(
    detector: Detector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = detector.export()
    monkeypatch.chdir(path.parent)
    predictor = export.load(path.name)
    data = pickle.dumps(predictor)
    assert len(data) < 100_000
    monkeypatch.chdir(tmp_path)
    twin = pickle.loads(data)
    assert twin._model is None and pickle.dumps(pickle.loads(pickle.dumps(twin)))
    image = str(detector.images[0])
    assert check_equal(twin(image), detector.predictor(image))
    monkeypatch.setattr(ExportedPredictor, "_build", lambda self: pytest.fail("it was opened again"))
    assert check_equal(copy.deepcopy(twin)(image), detector.predictor(image))


def test_a_copy_notices_that_the_file_is_another(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    path.write_bytes(detector.export().read_bytes())
    data = pickle.dumps(export.load(path))
    path.write_bytes(detector.export(batch=3).read_bytes())
    with pytest.raises(ValueError, match=r"model\.ts holds another model than when the predictor was pickled"):
        _ = pickle.loads(data).model


def test_images_fit_into_a_fixed_size(detector: Detector) -> None:
    predictor = export.load(detector.export(size=(96, 96), batch=2))
    files = [str(path) for path in detector.images]
    shapes = [tuple(predictor._prepare(file)["image"].shape[1:]) for file in files]
    assert shapes == [(72, 96), (96, 72), (72, 96), (96, 96)]
    found = predictor(files)
    assert [each["instances"].image_size for each in found] == SIZES and all(len(each["instances"]) for each in found)
    # The model in torch, with the same key, finds the same.
    cfg = load_config(str(detector.config_file), ["INPUT.CANVAS_TEST", "(96, 96)"])
    same = type(detector.predictor)(cfg, batch_size=1, workers=1)
    square = files[3]
    assert check_alike(predictor(square), same(square))


def test_values_of_the_config_may_change_unless_the_graph_has_fixed_them(detector: Detector) -> None:
    path = detector.export()
    predictor = export.load(path, opts=["INPUT.MIN_SIZE_TEST", 64, "MODEL.DEVICE", "cpu"])
    assert predictor._prepare(str(detector.images[3]))["image"].shape == (3, 64, 64)
    for key, value in (("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5), ("INPUT.FORMAT", "RGB"), ("MODEL.DEVICE", "cuda")):
        with pytest.raises(ValueError, match=f"{key} is fixed in the exported model .*model.ts: export it again"):
            export.load(path, opts=[key, value])
    with pytest.raises(ValueError, match=r"TEST.AUG.ENABLED is True, but an exported model sees each image once"):
        export.load(path, opts=["TEST.AUG.ENABLED", True])
    with pytest.raises(ValueError, match="INPUT.MIN_SIZE_TEST must be"):
        export.load(path, opts=["INPUT.MIN_SIZE_TEST", -1])


def test_what_is_no_exported_detector_is_refused(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds the backbone of a model, which detects nothing"):
        export.load(detector.export(part="backbone"))
    with pytest.raises(FileNotFoundError, match=r"there is no exported model .*missing\.onnx"):
        export.load(tmp_path / "missing.onnx")
    with pytest.raises(ValueError, match=r"has the suffix '\.pth'; exported models have \.onnx \(onnx\)"):
        export.load(detector.weights)


def evaluate(detector: Detector, folder: Path, *arguments: str) -> dict[str, Any]:
    """What train_net.py --eval-only notes of an evaluation."""
    given = [*arguments, "OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS", "0"]
    train_net.run(["--eval-only", *given])
    return read_runs(folder)[-1]


@pytest.fixture(scope="module")
def eager_run(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate(detector, tmp_path_factory.mktemp("eager"), "--config-file", str(detector.config_file))


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize("format", SUFFIXES)
def test_the_evaluation_of_a_file_gives_the_models_ap(
    format: str, detector: Detector, eager_run: dict[str, Any], tmp_path: Path
) -> None:
    path = detector.export(format)
    run = evaluate(detector, tmp_path, "--model", str(path))
    assert run["weights"] == str(path)
    for task in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75", "AP-cell", "AP-crack"):
            expected = eager_run["results"][task][name]
            assert 20 < expected < 95 and abs(run["results"][task][name] - expected) < 0.05, (task, name)
    runtime = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "pt2": "torch.export", "torchscript": "TorchScript"}
    log = (tmp_path / "log.txt").read_text()
    assert f"evaluating ExportedModel({path}, {runtime[format]} " in log
    assert (tmp_path / "inference" / "own" / "coco_instances_results.json").is_file()


@pytest.mark.usefixtures("logs")
def test_the_data_may_be_named_on_the_command_line(
    detector: Detector, eager_run: dict[str, Any], tmp_path: Path
) -> None:
    own = ["--test-json", str(detector.annotations), "--test-images", str(detector.folder / "images")]
    run = evaluate(detector, tmp_path, "--model", str(detector.export()), *own)
    assert run["results"]["bbox"]["AP"] == pytest.approx(eager_run["results"]["bbox"]["AP"], abs=0.05)


@pytest.mark.usefixtures("logs")
def test_another_config_must_fit_the_file(
    detector: Detector, eager_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = str(detector.export()), tmp_path / "other.yaml"
    own = [["other", str(detector.annotations), str(detector.folder / "images")]]

    def changed(*opts: Any) -> list[str]:
        cfg = load_config(str(detector.config_file), opts, check=False)
        other.write_text(cfg.dump())
        return ["--model", path, "--config-file", str(other)]

    run = evaluate(detector, tmp_path / "a", *changed("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9))
    assert run["results"]["bbox"]["AP"] == pytest.approx(eager_run["results"]["bbox"]["AP"], abs=0.05)

    def refusal(*opts: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            evaluate(detector, tmp_path / "b", *changed(*opts))
        return str(stopped.value)

    more = ["cell", "crack", "hole"]
    message = refusal("MODEL.ROI_HEADS.NUM_CLASSES", 3, "DATASETS.CLASS_NAMES", more, "DATASETS.OWN", [])
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 3 in --config-file" in message and "\n" not in message
    message = refusal("DATASETS.CLASS_NAMES", ["crack", "cell"], "DATASETS.OWN", own, "DATASETS.TEST", ("other",))
    assert "crack is class 1 there, class 0 here" in message
    without = str(detector.export(masks="none"))
    with pytest.raises(SystemExit, match="MODEL.MASK_ON is True in --config-file .* gives no masks"):
        evaluate(detector, tmp_path / "b", "--model", without, "--config-file", str(detector.config_file))


def predictions(folder: Path, *arguments: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The detections that predict.py writes, and its settings."""
    assert predict.run([*map(str, arguments), "--output", str(folder)]) == 0
    return json.loads((folder / "detections.json").read_text()), json.loads((folder / "run.json").read_text())


def test_predict_writes_what_the_checkpoint_gives(detector: Detector, tmp_path: Path) -> None:
    images = ["--input", detector.folder / "images"]
    given = ["--config-file", detector.config_file, "--weights", detector.weights]
    expected, _ = predictions(tmp_path / "eager", *given, *images)
    found, settings = predictions(tmp_path / "exported", "--model", detector.export(), *images)
    assert len(found) == len(expected) > 40
    for ours, theirs in zip(
        *(sorted(each, key=lambda d: (d["image_id"], -round(d["score"], 4))) for each in (found, expected))
    ):
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)
        assert ours["segmentation"]["size"] == theirs["segmentation"]["size"]
    # Another file is another command.
    with pytest.raises(SystemExit, match=r"weights_sha256|another command"):
        predict.run(
            ["--model", str(detector.export(batch=3)), *map(str, images), "--output", str(tmp_path / "exported")]
        )


def test_predict_notes_the_weights_of_openvino_too(detector: Detector, tmp_path: Path) -> None:
    path = detector.export("openvino")
    _, settings = predictions(tmp_path / "a", "--model", path, "--input", detector.images[0])
    from dcn_d2.checkpoint.files import sha256_of

    assert json.dumps(settings).count(f"{sha256_of(path)} {sha256_of(path.with_suffix('.bin'))}") == 1


def test_demo_draws_detections_and_says_that_sampling_is_left_out(
    detector: Detector, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(detector.export()), "--output", str(tmp_path), "--confidence", "0.4"]
    demo.main([*arguments, "--input", str(detector.images[0])])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "no sampling to draw: an exported model does not show its layers; --config-file and --weights do",
        f"wrote {tmp_path / '0_detections.png'}",
    ]
    demo.main([*arguments, "--max-images", "1"])  # of the config's data set, with its ground truth
    demo.main([*arguments[:2], *arguments[2:], "--input", str(detector.images[1]), "INPUT.MIN_SIZE_TEST", "64"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0_detections.png", "1_detections.png"]


def test_actors_take_a_file(detector: Detector, tmp_path: Path) -> None:
    actor = DetectorActor(str(detector.export()), columns=["boxes", "scores", "classes", "error"])
    batch = {"path": np.array([str(path) for path in detector.images[:2]])}
    for each in (actor, pickle.loads(pickle.dumps(actor))):
        found = each(batch)
        for row, path in enumerate(detector.images[:2]):
            expected = detector.predictor(str(path))["instances"]
            np.testing.assert_allclose(np.stack(found["boxes"][row]), expected.pred_boxes.tensor.numpy(), atol=1e-2)
    with pytest.raises(ValueError, match=r"model\.ts is an exported model, on the CPU: leave out weights, device"):
        DetectorActor(str(detector.export()), weights="model.pth")
    with pytest.raises(ValueError, match="columns names 'masks', which the model does not give"):
        DetectorActor(str(detector.export(masks="none")), columns=["masks", "error"])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (train_net, ["--model", "a.onnx"], "an exported model cannot be trained, add --eval-only"),
        (train_net, ["--eval-only", "--model", "a.onnx", "--published"], "leave out --published"),
        (train_net, ["--eval-only", "--model", "a.onnx", "--resume"], "leave out --resume"),
        (train_net, ["--eval-only", "--model", ""], "--model names no file"),
        (train_net, ["--eval-only", "--model", "a.onnx", "MODEL.WEIGHTS", "b.pth"], "MODEL.WEIGHTS is fixed in the"),
        (predict, ["--output", "o", "--input", "i", "--model", "a.onnx", "--weights", "b"], "leave out --weights"),
        (predict, ["--output", "o", "--input", "i", "--model", "a.onnx", "--config-file", "b"], "leave out --config-f"),
        (predict, ["--output", "o", "--input", "i"], "--config-file FILE or --model FILE is needed"),
        (demo, ["--model", "a.onnx", "--published"], "leave out --published"),
        (demo, ["--model", "a.onnx", "TEST.DETECTIONS_PER_IMAGE", "5"], "TEST.DETECTIONS_PER_IMAGE is fixed in the"),
        (demo, [], "--config-file FILE or --model FILE is needed"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(
    script: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        (script.main if script is demo else script.run)(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error

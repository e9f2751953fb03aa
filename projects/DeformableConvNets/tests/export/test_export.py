# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""export(): what is written, what is refused before anything slow runs, and that a wrong file is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead

from dcn_d2.engine.pickling import digest
from dcn_d2.export import DifferentResultError, build, check, export, torchscript
from dcn_d2.export.compare import TOLERANCES, Comparison
from dcn_d2.export.detector import ExportableDetector
from dcn_d2.export.formats import SUFFIXES, open_session
from dcn_d2.export.request import PACKAGES, Request, check_request
from dcn_d2.export.supported import check_model

from .models import lively_model
from .sessions import TorchSession

ROW = "mask_rcnn_R_50_FPN_1x_mdconv_c3-c5"
Lively = tuple[CfgNode, Any]


@pytest.fixture(scope="module")
def lively() -> Lively:
    return lively_model(ROW, opts=["INPUT.MIN_SIZE_TEST", 128])


@pytest.fixture(scope="module")
def written(lively: Lively, tmp_path_factory: pytest.TempPathFactory) -> build.Exported:
    cfg, model = lively
    before = digest(model)
    model.train()
    path = tmp_path_factory.mktemp("exported") / "a.ts"
    exported = export(cfg, path, model=model, class_names=["x"] * 80, row=ROW)
    assert model.training and digest(model) == before, "the caller's model changed"
    model.eval()
    return exported


def test_a_file_is_written_and_compared(written: build.Exported, lively: Lively) -> None:
    assert list(written.files) == [written.path] and written.files[written.path] == written.path.stat().st_size
    assert [path.name for path in written.path.parent.iterdir()] == ["a.ts"], "something was left behind"
    comparison = written.comparison
    assert comparison is not None and comparison.matched == comparison.expected > 30
    assert comparison.mask_pixels > 1000 and comparison.threshold is None and comparison.runs == 2
    assert "detections matched in 2 runs" in str(comparison)


def test_the_file_describes_itself(written: build.Exported, lively: Lively) -> None:
    cfg, model = lively
    description = open_session(written.path).description
    assert description == written.description
    assert (description.row, description.part, description.masks) == (ROW, "detector", "boxes")
    assert description.weights_digest == digest(model) and len(description.class_names) == 80
    assert description.channel_order == cfg.INPUT.FORMAT and description.resize_with == cfg.INPUT.RESIZE_WITH
    assert [str(tensor) for tensor in description.inputs] == [
        "images float32 (batch, 3, height, width)",
        "image_sizes int64 (batch, 2)",
    ]
    assert [str(tensor) for tensor in description.outputs] == [
        "boxes float32 (batch, 100, 4)",
        "scores float32 (batch, 100)",
        "classes int64 (batch, 100)",
        "masks float32 (batch, 100, 28, 28)",
    ]


def test_the_backbone_alone(lively: Lively, tmp_path: Path) -> None:
    cfg, model = lively
    exported = export(cfg, tmp_path / "a.ts", model=model, part="backbone", size=(100, 150), batch=1)
    assert exported.notes == ("the size 100 x 150 became 128 x 160: height and width must be multiples of 32",)
    assert exported.description.size == (128, 160) and exported.description.masks == "none"
    assert [str(tensor) for tensor in exported.description.outputs][:2] == [
        "p2 float32 (1, 32, 32, 40)",
        "p3 float32 (1, 32, 16, 20)",
    ]
    assert exported.comparison is not None and 0 <= (exported.comparison.features or 0) < 1e-4


def test_maps_of_a_stride_above_the_divisibility_are_rounded_up(lively: Lively, tmp_path: Path) -> None:
    cfg, model = lively
    exported = export(cfg, tmp_path / "a.ts", model=model, part="backbone")
    *_, p5, p6 = exported.description.outputs
    assert p5.shape[2:] == ("height/32", "width/32") and p6.shape[2:] == ("ceil(height/64)", "ceil(width/64)")
    inputs = {"images": np.zeros((1, 3, 96, 160), np.float32), "image_sizes": np.array([[96, 160]])}
    assert open_session(exported.path).run(inputs)["p6"].shape[2:] == (2, 3)


def test_pasted_masks_in_fixed_batches(lively: Lively, tmp_path: Path) -> None:
    cfg, model = lively
    exported = export(cfg, tmp_path / "a.ts", model=model, masks="pasted", batch=2)
    assert str(exported.description.inputs[-1]) == "output_size int64 (2)"
    assert str(exported.description.outputs[-1]) == "masks bool (2, 100, output_height, output_width)"
    assert exported.comparison is not None and exported.comparison.mask_pixels > 10000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_leaves_the_model_as_it_is(lively: Lively, tmp_path: Path, dtype: str) -> None:
    cfg, model = lively
    exported = export(cfg, tmp_path / "a.ts", model=model, dtype=dtype, part="backbone")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert exported.comparison is not None and (exported.comparison.features or 0) > 1e-5


def test_few_detections_are_compared_with_a_lower_threshold(lively: Lively, tmp_path: Path) -> None:
    cfg, model = lively
    model = copy.deepcopy(model)
    model.roi_heads.box_predictor.test_score_thresh = 1.0
    exported = export(cfg, tmp_path / "a.ts", model=model)
    assert model.roi_heads.box_predictor.test_score_thresh == 1.0
    comparison = exported.comparison
    assert comparison is not None and comparison.threshold is not None and comparison.threshold < 1
    assert comparison.matched == comparison.expected > 10
    assert f"detections with scores above {comparison.threshold:.2g} matched" in str(comparison)
    results = open_session(exported.path).run(example(exported))
    assert (results["classes"] == -1).all(), "the graph that was compared is not the one that was kept"


def example(exported: build.Exported) -> dict[str, Any]:
    names = [tensor.name for tensor in exported.description.inputs]
    return dict(zip(names, (tensor.numpy() for tensor in build.example_inputs(exported.description))))


def right(detector: ExportableDetector) -> None:
    pass


def moved(detector: ExportableDetector) -> None:
    detector.roi_heads.box_predictor.bbox_pred.bias += 0.01


def rescored(detector: ExportableDetector) -> None:
    detector.roi_heads.box_predictor.cls_score.weight *= 1.01


def reclassified(detector: ExportableDetector) -> None:
    layer = detector.roi_heads.box_predictor.cls_score
    layer.weight[:80] = layer.weight[:80].roll(1, 0)
    layer.bias[:80] = layer.bias[:80].roll(1, 0)


def masked(detector: ExportableDetector) -> None:
    detector.roi_heads.mask_head.predictor.bias += 0.5


def emptied(detector: ExportableDetector) -> None:
    detector.roi_heads.box_predictor.test_score_thresh = 1.0


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (right, None),
        (moved, "boxes: .* px, at most 0.01 was expected"),
        (rescored, "scores: .*, at most 0.0001 was expected|have no partner"),
        (reclassified, "have no partner"),
        (masked, "the share of differing pixels inside of masks: .*, at most 0.001 was expected"),
        (emptied, "have no partner"),
    ],
)
def test_a_wrong_file_is_noticed_and_not_kept(
    lively: Lively,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[ExportableDetector], None],
    message: str | None,
) -> None:
    cfg, model = lively
    files: dict[str, TorchSession] = {}

    def write(module: ExportableDetector, inputs: Any, description: Any, path: Path) -> None:
        module = copy.deepcopy(module)
        mistake(module)
        files[str(path)] = TorchSession(module, description)
        path.touch()

    monkeypatch.setattr(torchscript, "write", write)
    monkeypatch.setattr(check, "open_session", lambda path: files[str(path)])
    if message is None:
        assert export(cfg, tmp_path / "a.ts", model=model).path.exists()
        return
    with pytest.raises(DifferentResultError, match=message):
        export(cfg, tmp_path / "a.ts", model=model)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_only_replaced_if_asked(lively: Lively, tmp_path: Path) -> None:
    cfg, model = lively
    path = tmp_path / "a.ts"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="a.ts exists: --overwrite"):
        export(cfg, path, model=model)
    assert path.read_text() == "mine"
    exported = export(cfg, path, model=model, overwrite=True, check=False, part="backbone")
    assert exported.comparison is None and open_session(path).description.part == "backbone"


def test_openvino_replaced_a_file_of_the_name_of_its_weights(lively: Lively, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    cfg, model = lively
    (tmp_path / "a.bin").write_text("mine")
    with pytest.raises(FileExistsError, match="a.bin exists: --overwrite"):
        export(cfg, tmp_path / "a.xml", model=model)
    assert (tmp_path / "a.bin").read_text() == "mine"


def test_a_file_that_another_program_wrote_meanwhile_was_replaced(
    lively: Lively, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, model = lively

    def write_slowly(module: Any, inputs: Any, description: Any, path: Path) -> None:
        path.write_text("mine")
        (tmp_path / "a.ts").write_text("theirs")

    monkeypatch.setattr(torchscript, "write", write_slowly)
    with pytest.raises(FileExistsError, match="a.ts exists"):
        export(cfg, tmp_path / "a.ts", model=model, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ts"]
    assert (tmp_path / "a.ts").read_text() == "theirs"


def test_a_name_as_long_as_the_system_allows(lively: Lively, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, model = lively
    path = tmp_path / f"{'a' * 252}.ts"
    monkeypatch.setattr(torchscript, "write", lambda module, inputs, description, path: path.write_text("model"))
    assert export(cfg, path, model=model, check=False).path.read_text() == "model"


def test_a_folder_named_onnx_was_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder_of_models").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGES, "pt2", ("folder_of_models",))
    with pytest.raises(ImportError, match="pt2 needs folder_of_models: pip install folder_of_models"):
        check_request(Request(tmp_path / "a.pt2"))


def test_an_old_onnxruntime_was_refused_only_after_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES["onnx"]:
        pytest.importorskip(package)
    monkeypatch.setattr("onnxruntime.__version__", "1.24.4")
    with pytest.raises(ImportError, match=r'1\.24\.4 is installed: pip install "onnxruntime>=1\.25"'):
        check_request(Request(tmp_path / "a.onnx"))


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("a.engine", {}, "suffix '.engine'; exported models have .onnx"),
        ("a.onnx", {"format": "pt2"}, "a file of the format pt2 has the suffix .pt2"),
        ("a.ts", {"format": "tflite"}, "format is 'tflite'; it may be onnx, openvino, pt2, torchscript"),
        ("a.ts", {"part": "neck"}, "part is 'neck'; it may be detector, backbone"),
        ("a.ts", {"masks": "polygons"}, "masks is 'polygons'; it may be boxes, pasted, none"),
        ("a.ts", {"part": "backbone", "masks": "pasted"}, "masks is 'pasted', but a backbone has no masks"),
        ("a.ts", {"dtype": "int8"}, "dtype is 'int8'; with torchscript it may be float32, float16, bfloat16"),
        ("a.onnx", {"dtype": "bfloat16"}, "with onnx it may be float32, float16: ONNX's DeformConv has no bfloat16"),
        ("a.xml", {"dtype": "bfloat16"}, "with openvino it may be float32, float16: OpenVINO keeps"),
        ("a.ts", {"batch": 0}, "batch is 0; it must be at least 1"),
        ("a.ts", {"size": (16, 640)}, "size is 16 x 640; height and width must be at least 32 pixels"),
        ("a.ts", {"batch": "2"}, "batch is '2'; it must be a whole number"),
        ("a.ts", {"size": 256}, r"size is 256; it must be \(height, width\)"),
        ("a.ts", {"size": ("256", "256")}, r"size is \('256', '256'\); it must be \(height, width\)"),
        ("a.ts", {"aot": True}, "the format torchscript has no option 'aot'; it has freeze"),
        ("missing/a.ts", {}, "the folder .*missing for a.ts does not exist"),
        ("folder.ts", {}, "folder.ts is a folder"),
        ("a.ts", {"image": "missing.jpg"}, "missing.jpg"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lively: Lively,
    path: str,
    arguments: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(build, "DCNPredictor", lambda cfg: pytest.fail("the model is built"))
    (tmp_path / "folder.ts").mkdir()
    with pytest.raises((ValueError, OSError), match=message):
        export(lively[0], tmp_path / path, **arguments)


def test_the_name_of_a_config_file_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cfg is 'config.yaml'; it must be a config: dcn_d2.engine.load_config"):
        export("config.yaml", tmp_path / "a.ts")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], {}, "META_ARCHITECTURE is RetinaNet.*--part backbone"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], {}, "META_ARCHITECTURE is PanopticFPN.*--part backbone"),
        (["MODEL.KEYPOINT_ON", True], {}, "MODEL.KEYPOINT_ON is True"),
        (["MODEL.LOAD_PROPOSALS", True], {}, "MODEL.LOAD_PROPOSALS is True"),
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True], {}, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True"),
        (
            ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIPool"],
            {"format": "openvino"},
            "ROI_MASK_HEAD.POOLER_TYPE is ROIPool, which cannot be exported to openvino",
        ),
        (["MODEL.MASK_ON", False], {"masks": "pasted"}, "MODEL.MASK_ON is False: the model has no masks"),
        (["TEST.AUG.ENABLED", True], {}, "TEST.AUG.ENABLED is True: test-time augmentation"),
        (["TEST.DETECTIONS_PER_IMAGE", -1], {}, "TEST.DETECTIONS_PER_IMAGE is -1; a graph has a fixed number"),
    ],
)
def test_models_that_cannot_be_exported_are_refused_by_their_config(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lively: Lively,
    changes: list[Any],
    arguments: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(build, "DCNPredictor", lambda cfg: pytest.fail("the model is built"))
    cfg = lively[0].clone()
    cfg.merge_from_list(changes)
    with pytest.raises(ValueError, match=message):
        export(cfg, tmp_path / f"a{SUFFIXES[arguments.get('format', 'torchscript')]}", **arguments)


class ScoresOfAnotherKind(FastRCNNOutputLayers):
    def predict_probs(self, predictions: Any, proposals: Any) -> Any:
        return super().predict_probs(predictions, proposals)


class MasksOfAnotherKind(MaskRCNNConvUpsampleHead):
    def forward(self, x: Any, instances: Any) -> Any:
        return super().forward(x, instances)


def change_class(kind: type, *names: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name in names[:-1]:
            model = getattr(model, name)
        getattr(model, names[-1]).__class__ = kind

    return change


def set_method_of_object(model: Any) -> None:
    model.roi_heads.box_predictor.predict_probs = lambda predictions, proposals: []


def set_hook(model: Any) -> None:
    model.roi_heads.mask_head.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2, inputs[1]))


def set_topk(model: Any) -> None:
    model.roi_heads.box_predictor.test_topk_per_image = -1


def set_keypoints(model: Any) -> None:
    model.roi_heads.keypoint_on = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_class(ScoresOfAnotherKind, "roi_heads", "box_predictor"),
            "box predictor ScoresOfAnotherKind cannot be exported: its predict_probs differ from those of FastRCNN",
        ),
        (
            change_class(MasksOfAnotherKind, "roi_heads", "mask_head"),
            "mask head MasksOfAnotherKind cannot be exported: its forward differ",
        ),
        (change_class(torch.nn.Module, "proposal_generator"), "proposal generator Module cannot be exported; RPN can"),
        (change_class(torch.nn.Module, "roi_heads", "mask_pooler"), "mask pooler Module cannot be exported"),
        (set_method_of_object, "FastRCNNOutputLayers cannot be exported: its predict_probs differ"),
        (set_hook, "MaskRCNNConvUpsampleHead has forward hooks, which a file cannot run"),
        (set_topk, "test_topk_per_image of the box predictor is -1"),
        (set_keypoints, "have a keypoint head"),
    ],
)
def test_models_with_other_parts_are_refused(lively: Lively, change: Callable[[Any], None], message: str) -> None:
    model = copy.deepcopy(lively[1])
    check_model(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        check_model(model)
    check_model(model, "backbone")


class ProposalsOfAnotherKind(CascadeROIHeads):
    def _create_proposals_from_boxes(self, boxes: Any, image_sizes: Any) -> Any:
        return super()._create_proposals_from_boxes(boxes, image_sizes)


def test_a_cascade_with_other_steps_between_its_stages_is_refused() -> None:
    _, model = lively_model("cascade_rcnn_R_50_FPN_1x_dconv_c3-c5", opts=["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"])
    model.roi_heads.__class__ = ProposalsOfAnotherKind
    with pytest.raises(ValueError, match="its _create_proposals_from_boxes differ from those of CascadeROIHeads"):
        check_model(model)


@pytest.mark.parametrize("part", ["detector", "backbone"])
def test_a_model_in_half_precision_is_refused(lively: Lively, part: str) -> None:
    with pytest.raises(ValueError, match="backbone.* of the model is float16, but a float32 model is exported"):
        check_model(copy.deepcopy(lively[1]).half(), part)


@pytest.mark.parametrize("order", [1, -1])
def test_feature_maps_with_nan_are_not_taken_for_equal(order: int) -> None:
    """Such as those of a backbone that overflows in half precision."""
    comparison = Comparison()
    for value in [torch.nan, 1.0][::order]:
        comparison.add_features({"p2": torch.ones(1, 1, 2, 2)}, {"p2": np.full((1, 1, 2, 2), value, np.float32)})
    assert comparison.problems(TOLERANCES["float16"])


def test_a_backbone_that_pads_otherwise_than_its_divisibility_says_is_refused(lively: Lively) -> None:
    model = copy.deepcopy(lively[1])
    kind = type(model.backbone)
    model.backbone.__class__ = type("Padded", (kind,), {"padding_constraints": {"size_divisibility": 64}})
    with pytest.raises(ValueError, match="Padded pads images to multiples of 64 .* and of 32"):
        check_model(model)

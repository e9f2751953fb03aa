# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Files hold what TensorRT's importer takes, in float32 and float16, and the check finds what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dcn_d2.export.onnx import Session, find_tensorrt_problems

from ..models import detect_eagerly
from .conftest import Write
from .test_rows import BATCHES, MASK_ROW, SHORT, run

onnx = pytest.importorskip("onnx")


def test_tensorrt_takes_float32(written: Write) -> None:
    assert find_tensorrt_problems(written(MASK_ROW, opts=SHORT).path) == []


@pytest.mark.slow
def test_tensorrt_takes_the_pooling_rows(written: Write) -> None:
    assert find_tensorrt_problems(written("faster_rcnn_R_50_FPN_1x_mdpool", opts=SHORT).path) == []


def test_float16_is_throughout_convolutions_and_not_in_boxes(written: Write) -> None:
    _, path, _ = written(MASK_ROW, opts=SHORT, dtype="float16")
    assert find_tensorrt_problems(path) == []
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
    types |= {value.name: value.data_type for value in graph.initializer}
    seen = set()
    for node in graph.node:
        found = {types[name] for name in node.input if name}
        if node.op_type in ("Conv", "DeformConv", "ConvTranspose", "Gemm"):
            assert found == {half}, node.name
            seen.add(node.op_type)
        elif node.op_type in ("NonMaxSuppression", "RoiAlign", "Exp", "Softmax", "TopK"):
            assert half not in found, node.name
            seen.add(node.op_type)
    assert {"DeformConv", "NonMaxSuppression", "Exp"} <= seen
    assert half not in {types[value.name] for value in [*graph.input, *graph.output]}
    assert single in {types[value.name] for value in graph.output}


def test_float16_finds_nearly_the_same(written: Write) -> None:
    """ONNX Runtime's CPU computes a float16 graph in float32 and rounds in between."""
    float32, (_, path, description) = written(MASK_ROW, opts=SHORT), written(MASK_ROW, opts=SHORT, dtype="float16")
    assert description.dtype == "float16"
    matched = number = 0
    canvases, sizes = BATCHES[1]
    for result, expected in zip(
        run(Session(path, threads=1), canvases, sizes), detect_eagerly(float32.model, *BATCHES[1])
    ):
        near = np.abs(result["boxes"][:, None] - expected.pred_boxes.tensor.numpy()).max(-1) < 3
        near &= result["classes"][:, None] == expected.pred_classes.numpy()
        near &= np.abs(result["scores"][:, None] - expected.scores.numpy()) < 0.1
        matched, number = matched + int(near.any(0).sum()), number + len(expected)
    assert number > 20 and matched > 0.7 * number, (matched, number)


HEAD = '<ir_version: 9, opset_import: ["" : 19]>\n'
CONVOLUTION = (
    "g (float[1,4,8,8] x, float[4,4,3,3] w, {0}[1,18,8,8] o, {0}[1,9,8,8] m) => (float[1,4,8,8] y) "
    "{{ y = DeformConv<pads = {1}>(x, w, o, {2}, m) }}"
)
PROBLEMS = {
    "g (double[4] x) => (double[4] y) { y = Sin(x) }": "Sin does not take DOUBLE",
    "g (int32[4] x) => (int32[4] y) { y = BitwiseNot(x) }": "BitwiseNot is not supported",
    "g (float[5000] x, int64[1] k) => (float[n] v, int64[n] i) { v, i = TopK(x, k) }": "K of TopK must be a constant",
    "g (float[5000] x) => (float[4000] v, int64[4000] i) <int64[1] k = {4000}> { v, i = TopK(x, k) }": (
        "K of TopK must be less than 3840, and is 4000"
    ),
    "g (float[50] x) => (float[4] v, int64[4] i) { k = Constant<value_ints = [4]>() v, i = TopK<sorted = 0>(x, k) }": (
        "TopK must sort"
    ),
    "g (float[4,4] x, int64[1,1] i, float[1,4] u) => (float[4,4] y) "
    '{ y = ScatterND<reduction = "add">(x, i, u) }': "ScatterND must have no reduction",
    "g (float[1,9000,4] b, float[1,1,9000] s) => (int64[n,3] y) { y = NonMaxSuppression(b, s) }": (
        "NonMaxSuppression considers 5000 boxes, and gets 9000"
    ),
    "g (float[1,1,8,8] x) => (float[1,1,6,6] y) { y = MaxPool<kernel_shape = [2, 2], dilations = [2, 2]>(x) }": (
        "MaxPool must not be dilated"
    ),
    CONVOLUTION.format(
        "float16", "[1,1,1,1]", "w"
    ): "the inputs of DeformConv must have one type, and have FLOAT, FLOAT16",
    CONVOLUTION.format(
        "float", "[0,0,2,2]", "w"
    ): "must be the same at the beginning and the end, and are [0, 0, 2, 2]",
    CONVOLUTION.format("float", "[1,1,1,1]", ""): "DeformConv with a mask needs a bias too",
}


def save(text: str, folder: Path, **changes: Any) -> Path:
    model = onnx.parser.parse_model(HEAD + text)
    if "opset" in changes:
        model.opset_import[0].version = changes["opset"]
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("text", PROBLEMS, ids=lambda text: PROBLEMS[text])
def test_what_tensorrt_refuses(text: str, tmp_path: Path) -> None:
    problems = find_tensorrt_problems(save(text, tmp_path))
    assert any(PROBLEMS[text] in problem for problem in problems), problems


def test_an_opset_that_tensorrt_does_not_read(tmp_path: Path) -> None:
    path = save("g (float[4] x) => (float[4] y) { y = Sin(x) }", tmp_path, opset=22)
    assert find_tensorrt_problems(path) == ["it uses the operators  22; TensorRT reads ai.onnx 9 to 20"]


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"not an ONNX file")
    with pytest.raises(ValueError, match=r"a\.onnx is no ONNX file"):
        find_tensorrt_problems(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError):
        find_tensorrt_problems(tmp_path / "b.onnx")

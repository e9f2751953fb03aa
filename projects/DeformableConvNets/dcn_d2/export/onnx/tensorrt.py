# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What TensorRT's importer of ONNX files would refuse, found from the file alone, without a GPU.

The rules are those of TensorRT 10.1, the first that has DeformConv: docs/operators.md and the importers of the
repository onnx/onnx-tensorrt. A file without such problems may still fail to build, for example for want of memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .packages import load

OPSETS = range(9, 21)
_REAL = "FLOAT FLOAT16 BFLOAT16"
_NUMBERS = f"{_REAL} INT32 INT64"
# The types of the first input that operators take. The others are not imported. Recurrent layers, quantization, random
# numbers, and what later names have replaced are left out.
_OPERATORS = {
    "FLOAT FLOAT16": "DeformConv GridSample Mish NonMaxSuppression RoiAlign",
    _REAL: "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Conv ConvTranspose Cos Cosh "
    "CumSum Dropout Einsum Elu Erf Exp Floor Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization "
    "HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LRN "
    "LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization Pow PRelu Reciprocal Resize Round Selu Sigmoid "
    "Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu",
    _NUMBERS: "Abs Add ArgMax ArgMin Clip DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max "
    "Mean Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
    "ReduceProd ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    "BOOL": "And Not Or Xor",
    f"{_NUMBERS} BOOL": "Cast Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND "
    "Identity If Loop NonZero OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu "
    "Unsqueeze Where",
}
TYPES = {operator: types.split() for types, operators in _OPERATORS.items() for operator in operators.split()}
# Inputs that must be constants, by their place.
_REDUCTIONS = [name for name in TYPES if name.startswith("Reduce")]
CONSTANTS = {
    **dict.fromkeys(["CumSum", "Squeeze", "Unsqueeze", *_REDUCTIONS], {1: "axes"}),
    "TopK": {1: "K"},
    "OneHot": {1: "depth"},
    "Pad": {3: "axes"},
    "Slice": {3: "axes"},
}
MOST_OF_TOP_K = 3840  # K is less
MOST_BOXES = 5000  # of a row of NonMaxSuppression; TensorRT drops the others without a word


@dataclass(frozen=True)
class _Graph:
    """A graph, with what is known about its tensors by their names."""

    nodes: list[Any]
    types: dict[str, str]
    shapes: dict[str, list[int]]  # -1 for a size that is free
    constants: dict[str, Any]


def find_tensorrt_problems(path: str | os.PathLike[str]) -> list[str]:
    """Lists what TensorRT 10.1 would refuse in an ONNX file, a line each; [] if there is nothing.

    Raises:
        ImportError: the package onnx is missing.
        ValueError: it is no ONNX file.
    """
    (onnx,) = load("onnx")
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except OSError:
        raise
    except Exception as error:  # protobuf's and onnx's errors share no class but this
        raise ValueError(f"{os.fspath(path)} is no ONNX file: {str(error).splitlines()[0]}") from error
    problems = [
        f"it uses the operators {opset.domain} {opset.version}; TensorRT reads ai.onnx {OPSETS[0]} to {OPSETS[-1]}"
        for opset in model.opset_import
        if opset.domain or opset.version not in OPSETS
    ]
    if model.functions:
        problems.append("it has functions of its own")
    graph = _read(onnx, model.graph)
    return problems + [
        f"node {node.name or node.output[0]}: {problem}" for node in graph.nodes for problem in _problems(graph, node)
    ]


def _read(onnx: Any, graph: Any) -> _Graph:
    names = {number: name for name, number in onnx.TensorProto.DataType.items()}
    types, shapes, constants = {}, {}, {}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        tensor = value.type.tensor_type
        types[value.name] = names[tensor.elem_type]
        if tensor.HasField("shape"):
            shapes[value.name] = [size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim]
    for value in graph.initializer:
        types[value.name], shapes[value.name] = names[value.data_type], list(value.dims)
        constants[value.name] = value
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.helper.get_attribute_value(node.attribute[0])
    return _Graph(list(graph.node), types, shapes, constants)


def _problems(graph: _Graph, node: Any) -> Iterator[str]:
    if node.domain or node.op_type not in TYPES:
        yield f"{node.domain}{'::' if node.domain else ''}{node.op_type} is not supported"
        return
    first = [name for name in [*node.input, *node.output] if name][0]
    # The condition of Where is a truth value; what counts is what it chooses from.
    tensor = node.input[1] if node.op_type == "Where" else first
    if graph.types.get(tensor, "UNDEFINED") not in TYPES[node.op_type]:
        yield f"{node.op_type} does not take {graph.types.get(tensor, 'an unknown type')}"
    for place, name in CONSTANTS.get(node.op_type, {}).items():
        if len(node.input) > place and node.input[place] and node.input[place] not in graph.constants:
            yield f"{name} of {node.op_type} must be a constant"
    if node.op_type in _RULES:
        yield from _RULES[node.op_type](graph, node)


def _attributes(node: Any) -> dict[str, Any]:
    (onnx,) = load("onnx")
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _check_deform_conv(graph: _Graph, node: Any) -> Iterator[str]:
    types = {graph.types.get(name, "UNDEFINED") for name in node.input if name}
    if len(types) > 1:
        yield f"the inputs of DeformConv must have one type, and have {', '.join(sorted(types))}"
    if "" in node.input:
        yield "DeformConv with a mask needs a bias too"
    if len(graph.shapes.get(node.input[0], [])) != 4:
        yield f"DeformConv needs maps of 4 axes, and gets {graph.shapes.get(node.input[0], 'an unknown shape')}"
    pads = list(_attributes(node).get("pads", []))
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        yield f"the pads of DeformConv must be the same at the beginning and the end, and are {pads}"


def _check_top_k(graph: _Graph, node: Any) -> Iterator[str]:
    (onnx,) = load("onnx")
    number = graph.constants.get(node.input[1])
    if isinstance(number, onnx.TensorProto):
        number = onnx.numpy_helper.to_array(number).item()
    elif isinstance(number, list):
        (number,) = number
    if number is not None and number >= MOST_OF_TOP_K:
        yield f"K of TopK must be less than {MOST_OF_TOP_K}, and is {number}"
    if not _attributes(node).get("sorted", 1):
        yield "TopK must sort"


def _check_suppression(graph: _Graph, node: Any) -> Iterator[str]:
    shape = graph.shapes.get(node.input[0], [])
    if len(shape) == 3 and shape[1] > MOST_BOXES:
        yield f"NonMaxSuppression considers {MOST_BOXES} boxes, and gets {shape[1]}"


def _check_scatter(graph: _Graph, node: Any) -> Iterator[str]:
    if any(attribute.name == "reduction" for attribute in node.attribute):
        yield f"{node.op_type} must have no reduction"


def _check_sampling(graph: _Graph, node: Any) -> Iterator[str]:
    if len(graph.shapes.get(node.input[0], [])) != 4:
        yield "GridSample needs maps of 4 axes"


def _check_pooling(graph: _Graph, node: Any) -> Iterator[str]:
    if len(node.output) > 1:
        yield "MaxPool must not give indices"
    if set(_attributes(node).get("dilations", [])) - {1}:
        yield f"{node.op_type} must not be dilated"


_RULES = {
    "DeformConv": _check_deform_conv,
    "TopK": _check_top_k,
    "NonMaxSuppression": _check_suppression,
    "ScatterND": _check_scatter,
    "GridSample": _check_sampling,
    "MaxPool": _check_pooling,
    "AveragePool": _check_pooling,
}

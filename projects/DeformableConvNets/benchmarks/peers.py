# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Other implementations: their names, and how to call those that may not be installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Other implementations, by the first word of their contestants' names.
CONVOLUTION_PEERS = ("torchvision", "autocast", "deformops", "onnxruntime", "openvino")
PEERS = (*CONVOLUTION_PEERS, "roi_align")


@cache
def deformops() -> Callable[..., Any] | None:
    """The operator of the package deformops with torchvision's arguments; None, and a printed reason, if it is missing.

    On a GPU it runs its Triton kernels, unless told otherwise: it needs a C compiler for Triton, but neither nvcc nor
    the network. The first call for a shape and dtype tries 24 kernels forward and 16 backward, each of which takes
    about 10 s to compile.
    """
    try:
        from deformops.integrations.torchvision import deform_conv2d
    except Exception as error:  # its syntax is too new for an older Python, and it may not fit this torch
        print(f"deformops takes no part: {type(error).__name__}: {error}", flush=True)
        return None

    def call(x: Any, offset: Any, weight: Any, bias: Any, stride: int, padding: int, dilation: int, mask: Any) -> Any:
        pairs = [(number, number) for number in (stride, padding, dilation)]
        return deform_conv2d(x, offset, weight, bias, *pairs, mask)

    return call


def onnx_runtime(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, stride: int, groups: int, deform_groups: int
) -> Callable[[], object] | None:
    """A call of ONNX Runtime's DeformConv (1.25 or newer), or None where it is not installed."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError:
        return None
    feeds = {"X": x, "W": weight, "offset": offset}
    names = ["X", "W", "offset"]
    if mask is not None:
        feeds["mask"] = mask
        names += ["", "mask"]  # no bias
    node = onnx.helper.make_node(
        "DeformConv",
        names,
        ["Y"],
        strides=[stride] * 2,
        pads=[1] * 4,
        group=groups,
        offset_group=deform_groups,
    )
    value = onnx.helper.make_tensor_value_info
    inputs = [value(name, onnx.TensorProto.FLOAT, list(t.shape)) for name, t in feeds.items()]
    graph = onnx.helper.make_graph([node], "layer", inputs, [value("Y", onnx.TensorProto.FLOAT, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning while the next contestant is timed, which then has fewer cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    arrays = {name: t.numpy() for name, t in feeds.items()}
    return lambda: session.run(None, arrays)


def openvino_runtime(
    x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, stride: int, groups: int, deform_groups: int
) -> Callable[[], object] | None:
    """A call of OpenVINO's DeformableConvolution on its CPU plugin, or None where it is not installed."""
    try:
        from dcn_d2.export.openvino.package import get_core, import_openvino

        openvino = import_openvino()
        from openvino import opset8
    except ImportError:
        return None
    feeds = [t for t in (x, offset, weight, mask) if t is not None]
    inputs = [opset8.parameter(list(t.shape), np.float32) for t in feeds]
    node = opset8.deformable_convolution(
        *inputs[:3],
        strides=[stride] * 2,
        pads_begin=[1] * 2,
        pads_end=[1] * 2,
        dilations=[1] * 2,
        mask=None if mask is None else inputs[3],
        group=groups,
        deformable_group=deform_groups,
        bilinear_interpolation_pad=True,  # samples on the border mix with zeros, as in torchvision
    )
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # no other contestant's threads are bound to cores
        "INFERENCE_PRECISION_HINT": "f32",  # it takes bfloat16 by itself where the processor has it
    }
    compiled = get_core().compile_model(openvino.Model([node], inputs), "CPU", options)
    request, arrays = compiled.create_infer_request(), [t.numpy() for t in feeds]
    return lambda: [request.infer(arrays, share_inputs=True, share_outputs=True)[0]]

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Writes ONNX files of standard operators.

The opset is 19. It is the first with DeformConv, so all runtimes that have DeformConv know it. ONNX Runtime (tried
1.32) has no RoiAlign of opset 22. TensorRT 10.1, the first with DeformConv, reads opsets up to 20.

The exporter is the one of PyTorch on `torch.export`. The older one, on TorchScript, is deprecated, and writes sizes
that were computed in Python while tracing as constants, without a word. This one refuses them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import __version__
from ...files import write_atomically
from ...ops import portable_operators
from ..description import KEY, Description, TensorInfo
from ..shapes import dynamic_shapes
from .packages import load
from .translations import translations

OPSET = 19
# A file of protobuf ends at 2 GiB. The graph beside the weights is some MB.
LARGEST = 2**31 - 2**26
MOST_ZEROS = 4096


def write(
    module: nn.Module, inputs: tuple[Tensor, ...], description: Description, path: str | os.PathLike[str]
) -> None:
    """Writes a module, `ExportableDetector` or `ExportableBackbone`, into an ONNX file.

    Args:
        module: in evaluation mode.
        inputs: examples, as `dcn_d2.export.shapes.example_inputs` makes them.
        description: says which sizes are free, names inputs and outputs, and goes into the file.
        path: of the file.

    Raises:
        ImportError: a package is missing.
        ValueError: the weights do not fit into a file.
    """
    _check_size(module)
    model = translate(
        module,
        inputs,
        [tensor.name for tensor in description.inputs],
        [tensor.name for tensor in description.outputs],
        dynamic_shapes(description),
    )
    _describe(model, description)
    with write_atomically(Path(path)) as file:
        file.write(model.SerializeToString())


def translate(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: list[str],
    output_names: list[str],
    free_sizes: tuple[dict[int, Any], ...] | None = None,
) -> Any:
    """Gives a module as an `onnx.ModelProto` of standard operators.

    Args:
        module: in evaluation mode.
        inputs: examples.
        input_names, output_names: of the graph.
        free_sizes: of the inputs, as `torch.export.export` takes them; None if all sizes are those of the examples.

    Raises:
        ImportError: a package is missing.
    """
    onnx, _ = load("onnx", "onnxscript")
    with _silence(), portable_operators(), torch.no_grad():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=free_sizes,
            custom_translation_table=translations(),
            external_data=False,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    model = _simplify(program.model)
    for node in model.graph.node:
        if node.op_type == "ScatterND":  # TensorRT refuses the attribute also where it says "none", the default
            kept = [each for each in node.attribute if (each.name, each.s) != ("reduction", b"none")]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.checker.check_model(model)
    return model


def _check_size(module: nn.Module) -> None:
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    if size > LARGEST:
        raise ValueError(
            f"the weights have {size / 1e9:.2f} GB, and an ONNX file holds less than {LARGEST / 1e9:.2f} GB of them; "
            "with dtype float16 they have half of it"
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps the exporter's messages about its steps from the terminal. Errors are raised all the same."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _simplify(model: Any) -> Any:
    """Computes what is constant, keeps equal values once, drops what is not used, and which code made each node.

    The exporter's own optimization also looks for groups of operators to fuse. That takes it as long as all the rest
    for some rows of the zoo, and the runtimes do it themselves.
    """
    import onnx_ir
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    common.InlinePass()(model)
    fold_constants(model, should_fold=_is_small)
    steps = [
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    ]
    return onnx_ir.to_proto(passes.Sequential(*steps)(model).model)


def _is_small(node: Any) -> bool | None:
    """Also computes ConstantOfShape, such as zeros for a bias, unless they would fill the file. Others: as always."""
    if node.op_type != "ConstantOfShape":
        return None
    shape = node.inputs[0].const_value
    return shape is not None and bool(shape.numpy().prod() <= MOST_ZEROS)


def _describe(model: Any, description: Description) -> None:
    """Writes what the file says about itself, for programs and for people, and names the free sizes."""
    model.producer_name, model.producer_version = KEY, __version__
    model.doc_string = (
        f"{description.part} {description.row}. Inputs: {'; '.join(map(str, description.inputs))}. "
        f"Outputs: {'; '.join(map(str, description.outputs))}."
    )
    del model.metadata_props[:]
    for key, value in ((KEY, description.to_json()), ("class_names", json.dumps(description.class_names))):
        model.metadata_props.add(key=key, value=value)
    for values, tensors in ((model.graph.input, description.inputs), (model.graph.output, description.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            _name_sizes(value, tensor)
    # The exporter's names of free sizes, such as s34, would contradict these.
    del model.graph.value_info[:]


def _name_sizes(value: Any, tensor: TensorInfo) -> None:
    sizes = value.type.tensor_type.shape.dim
    if len(sizes) != len(tensor.shape):
        raise AssertionError(f"{value.name} has {len(sizes)} axes in the graph and {len(tensor.shape)} in {tensor}")
    for size, known in zip(sizes, tensor.shape):
        if isinstance(known, str):
            size.dim_param = known
        elif size.dim_value != known:
            raise AssertionError(f"{value.name} has a size of {size.dim_value or size.dim_param}, not {known}")

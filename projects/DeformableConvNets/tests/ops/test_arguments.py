# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What the operators take as arguments, and what they say of what they do not take."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dcn_d2.ops
from dcn_d2.layers import DeformConv, DeformPSRoIPool, DeformRoIPool, ModulatedDeformConv

from .samples import OPERATORS, ConvSample, RoiSample, operands_of

parametrize_operators = pytest.mark.parametrize("name", OPERATORS)


def good(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of a call that succeeds."""
    sample: ConvSample | RoiSample = RoiSample("good") if "roi" in name else ConvSample("good")
    return operands_of(name, sample, dtype) | sample.arguments


def call(name: str, **changes: Any) -> Tensor:
    return getattr(dcn_d2.ops, name)(**good(name) | changes)


def integers(name: str) -> dict[str, Any]:
    """The arguments that take integers, with the value that good() or the default gives them."""
    if name == "deform_roi_pool":
        return {"output_size": (3, 2), "sampling_ratio": 0}
    if name == "deform_psroi_pool":
        return {"output_size": (3, 2), "part_size": (3, 2), "group_size": 1, "sample_per_part": 4}
    return {"stride": 1, "padding": 1, "dilation": 1}


INTEGER_ARGUMENTS = [(name, argument) for name in OPERATORS for argument in integers(name)]
KINDS: dict[str, Callable[[int], Any]] = {
    "int64": np.int64,
    "uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "argument"), INTEGER_ARGUMENTS)
def test_integers_of_any_kind_are_taken(name: str, argument: str, kind: str) -> None:
    value, make = integers(name)[argument], KINDS[kind]
    pairs = [value] if isinstance(value, tuple) else [value, (value, value)]
    expected = call(name)
    for each in pairs if argument not in ("sampling_ratio", "group_size", "sample_per_part") else [value]:
        given = tuple(map(make, each)) if isinstance(each, tuple) else make(each)
        assert torch.equal(call(name, **{argument: given}), expected)
    if isinstance(value, tuple):
        whole = np.array(value) if kind == "array" else torch.tensor(value)
        assert torch.equal(call(name, **{argument: whole}), expected)


@pytest.mark.parametrize("bad", [1.5, 1.0, "1", b"1", True, np.bool_(True), (1, 1.5), (1, None), {}, torch.ones(())])
@pytest.mark.parametrize(("name", "argument"), INTEGER_ARGUMENTS)
def test_what_is_no_integer_is_refused_by_name(name: str, argument: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*, got {re.escape(repr(bad))}$"):
        call(name, **{argument: bad})


@pytest.mark.parametrize(("name", "argument"), [pair for pair in INTEGER_ARGUMENTS if pair[1] != "part_size"])
def test_none_is_no_integer(name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*, got None$"):
        call(name, **{argument: None})


FLOATS = {"deform_roi_pool": ["spatial_scale", "gamma"], "deform_psroi_pool": ["spatial_scale", "trans_std"]}


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name in FLOATS for argument in FLOATS[name]])
def test_numbers_of_any_kind_are_taken(name: str, argument: str) -> None:
    expected = call(name, **{argument: 0.5})
    assert torch.equal(call(name, **{argument: np.float32(0.5)}), expected)
    assert torch.equal(call(name, **{argument: torch.tensor(0.5)}), expected)
    for bad in ("0.5", None, True, (0.5,)):
        with pytest.raises(ValueError, match=f"^{argument} must be a number, got {re.escape(repr(bad))}$"):
            call(name, **{argument: bad})


@parametrize_operators
def test_what_is_no_tensor_is_refused_by_name(name: str) -> None:
    for operand, value in good(name).items():
        if not isinstance(value, Tensor):
            continue
        optional = operand in ("bias", "mask") or (operand == "offset" and "roi" in name)
        kind = "a tensor or None" if optional else "a tensor"
        for bad, typename in ((value.tolist(), "list"), (value.numpy(), "numpy.ndarray"), (1, "int")):
            with pytest.raises(
                TypeError, match=f"^{name}: {operand} must be {kind}, got a {typename}; torch.as_tensor"
            ):
                call(name, **{operand: bad})
        if not optional:
            with pytest.raises(TypeError, match=f"^{name}: {operand} must be a tensor, got None$"):
                call(name, **{operand: None})


LAYERS: list[tuple[Callable[..., Any], tuple[Any, ...], list[str]]] = [
    (DeformConv, (4, 6, 3), ["stride", "padding", "dilation", "groups", "deformable_groups"]),
    (ModulatedDeformConv, (4, 6, 3), ["stride", "padding", "dilation", "groups", "deformable_groups"]),
    (DeformRoIPool, (3, 0.25, 4, 8), ["sampling_ratio"]),
    (DeformPSRoIPool, (3, 0.25, 4, 8), ["sampling_ratio"]),
]


@pytest.mark.parametrize(("layer", "arguments", "names"), LAYERS)
def test_layers_check_their_arguments(layer: Callable[..., Any], arguments: tuple[Any, ...], names: list[str]) -> None:
    plain, of_numpy = layer(*arguments), layer(*(np.float64(a) if type(a) is float else np.int64(a) for a in arguments))
    assert repr(plain) == repr(of_numpy)
    for name in names:
        assert repr(layer(*arguments, **{name: np.int64(1)})) == repr(layer(*arguments, **{name: 1}))
        for bad in (1.5, None, "1", True):
            with pytest.raises(ValueError, match=f"^{name} must be .*, got {re.escape(repr(bad))}$"):
                layer(*arguments, **{name: bad})
    first = "kernel_size" if "Conv" in layer.__name__ else "output_size"
    with pytest.raises(ValueError, match=f"^{first} must be a number or a pair of numbers, got 1.5$"):
        layer(
            **dict(zip(("in_channels", "out_channels"), (4, 6)))
            if first == "kernel_size"
            else {"spatial_scale": 1.0, "in_channels": 4},
            **{first: 1.5},
        )


@parametrize_operators
def test_an_error_is_the_message_alone(name: str) -> None:
    """Not after the C++ function, and the file on the machine that built the library."""
    with pytest.raises(RuntimeError) as caught:
        call(name, input=torch.zeros(2, 4, 7))
    assert str(caught.value) == f"{name}: input must have 4 dimensions, got [2, 4, 7]"
    backward = getattr(torch.ops.dcn_d2, f"{name}_backward").default
    values = good(name) | dict.fromkeys(("need_input", "need_offset", "need_weight", "deterministic"), True)
    values |= {"grad": torch.zeros(1), "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    defaults = {a.name: a.default_value for a in getattr(torch.ops.dcn_d2, name).default._schema.arguments}
    with pytest.raises(RuntimeError) as caught:
        backward(*((defaults | values)[argument.name] for argument in backward._schema.arguments))
    assert str(caught.value) == f"{name}_backward: grad must have 4 dimensions, got [1]"


@pytest.mark.unsanitized
def test_a_bad_instruction_set_is_the_message_alone() -> None:
    code = """
import torch
from dcn_d2.ops import deform_conv2d
try:
    deform_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 1, 1))
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DCN_CPU_CAPABILITY": "sse9"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "DCN_CPU_CAPABILITY must be default, avx2, avx512 or amx, got sse9\n"


@parametrize_operators
def test_operands_on_another_device_are_named_in_words(name: str) -> None:
    operand = "weight" if "conv" in name else "mask"
    moved = good(name)[operand].to("meta")
    with pytest.raises(RuntimeError, match=f"^{name}: {operand} is on meta, but input is on cpu$"):
        getattr(torch.ops.dcn_d2, name).default._op_dk(
            torch._C.DispatchKey.CPU,
            *(
                (good(name) | {operand: moved, "padding": [1, 1]}).get(a.name, a.default_value)
                for a in getattr(torch.ops.dcn_d2, name).default._schema.arguments
            ),
        )


NOT_DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
}


@pytest.mark.parametrize("kind", NOT_DENSE)
@parametrize_operators
def test_tensors_that_are_not_dense_are_refused_in_words(name: str, kind: str) -> None:
    """Without a warning before that there were no kernels, and not by an error of torch's."""
    for operand, value in good(name).items():
        if not isinstance(value, Tensor):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(
                RuntimeError, match=f"^{name}: {operand} must be a dense tensor, got a torch._?{kind} one"
            ):
                call(name, **{operand: NOT_DENSE[kind](value)})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_refused_in_words() -> None:
    image = torch.quantize_per_tensor(good("deform_conv2d")["input"], 0.1, 0, torch.qint8)
    with pytest.raises(RuntimeError, match=r"^deform_conv2d: input must be a dense tensor, got a quantized one"):
        call("deform_conv2d", input=image)


@parametrize_operators
def test_messages_name_what_the_caller_passed(name: str) -> None:
    operand = {"modulated_deform_conv2d": "offset_and_mask"}.get(name, "offset")
    value = good(name)[operand]
    for bad in (value[:, :, :-1], value[:, :-1], value.double(), value[0]):
        messages = set()
        for device in ("cpu", "meta"):
            operands = {
                k: v.to(device) if isinstance(v, Tensor) else v for k, v in (good(name) | {operand: bad}).items()
            }
            with pytest.raises(RuntimeError, match=f"^{name}: {operand} (has|must have) ") as caught:
                getattr(dcn_d2.ops, name)(**operands)
            messages.add(str(caught.value))
        assert len(messages) == 1, messages


@pytest.mark.filterwarnings("ignore:dcn_d2")
@pytest.mark.parametrize("name", ["deform_roi_pool", "deform_psroi_pool"])
def test_a_batch_index_between_two_images_is_refused(name: str) -> None:
    rois = torch.tensor([[0, 1.0, 1, 9, 9], [0.5, 1, 1, 9, 9]])
    for function in (getattr(dcn_d2.ops, name), None):
        with pytest.raises(RuntimeError, match=rf"^{name}: rois\[1\] names image 0.5, but input has 2 images$"):
            if function:
                function(torch.rand(2, 3, 5, 5), rois, None, 2)
            else:
                getattr(torch.ops.dcn_d2, name).default._op_dk(
                    torch._C.DispatchKey.CompositeExplicitAutograd, torch.rand(2, 3, 5, 5), rois, None, [2, 2]
                )

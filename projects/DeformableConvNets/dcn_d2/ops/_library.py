# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The operator library `torch.ops.dcn_d2`: loads the compiled kernels and registers what Python adds to them.

The environment variable DCN_LIBRARY names another build of the kernels to load in place of dcn_d2._C, such as the one
that dev/sanitize.sh makes.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ._arguments import check_layout

LIBRARY = torch.library.Library("dcn_d2", "FRAGMENT")  # the compiled library defines the namespace
_warned: set[str] = set()
loaded_kernels = ""  # the file that the kernels came from


def _load_kernels() -> str:
    """Loads `dcn_d2._C` and notes its file in `loaded_kernels`. Returns "" or, where there is none, the reason.

    Where the process has loaded the kernels already, by `torch.ops.load_library` or from C++, these are used: two
    copies of the library would both define the operators, and stop the process.

    Raises:
        OSError: the library that DCN_LIBRARY names does not load. It was asked for, so nothing replaces it.
    """
    global loaded_kernels
    if hasattr(torch.ops.dcn_d2, "deform_conv2d"):
        loaded_kernels = "a file that was loaded before dcn_d2 was imported"
        return ""
    if named := os.environ.get("DCN_LIBRARY"):
        try:
            torch.ops.load_library(named)
        except OSError as error:
            raise OSError(
                f"the library {named} that DCN_LIBRARY names does not load: {_reason(error)}. Name another one, or "
                "unset DCN_LIBRARY to use the installed one"
            ) from error
        loaded_kernels = named
        return ""
    try:
        spec = importlib.util.find_spec("dcn_d2._C")
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return (
            "the compiled library dcn_d2._C was not found. Build it with `pip install --no-build-isolation -e "
            "projects/DeformableConvNets` (a C++ compiler is needed; for CUDA also nvcc, and FORCE_CUDA=1 where "
            "no GPU is visible)"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"the compiled library {spec.origin} does not load: {_reason(error)}. Build it again for this PyTorch"
    loaded_kernels = spec.origin
    return ""


def _reason(error: BaseException) -> str:
    """What the system's loader said. torch's message names only the file; the loader's is in the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error)
    if torch.version.cuda is None and any(name in reason for name in ("torch_cuda", "c10_cuda", "cudart")):
        reason += f" (it was built with CUDA kernels, but PyTorch {torch.__version__} here has no CUDA)"
    return reason


missing_kernels = _load_kernels()


def has_kernel(name: str, key: str) -> bool:
    """Whether something, such as the compiled library, has registered a kernel of an operator for a dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"dcn_d2::{name}", key)


def define(schema: str) -> None:
    """Defines an operator, or compares the definition with that of the compiled library, which brings the kernels.

    Raises:
        ImportError: the compiled library has another definition or none, so it belongs to other Python code.
    """
    name = schema.partition("(")[0]
    if missing_kernels:
        LIBRARY.define(schema)
    packet = getattr(torch.ops.dcn_d2, name, None)
    expected, found = (
        torch._C.parse_schema(f"dcn_d2::{schema}"),
        None if packet is None else packet.default._schema,
    )
    if packet is None or found != expected:
        raise ImportError(
            f"the compiled library {loaded_kernels} was built from another version of dcn_d2: it defines "
            f"{found or f'no operator {name}'}, but {expected} is needed. Build it again with `pip install "
            "--no-build-isolation -e projects/DeformableConvNets`"
        )
    # The strides of results follow from those of operands. So compiled code must pass operands with the strides with
    # which it was traced. That is also torch's default, and so it holds without Python, where nothing can set tags.
    packet.default.tags.extend((torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _define_query(name: str) -> None:
    """Defines an operator without arguments that tells something about the compiled library, "" where it cannot."""
    define(f"{name}() -> str")
    if missing_kernels:
        LIBRARY.impl(name, lambda: "", "CompositeExplicitAutograd")


# The instruction set that the CPU kernels use, as DCN_CPU_CAPABILITY names it: default, avx2, avx512 or amx.
_define_query("capability")
# The GPU architectures that the CUDA kernels were compiled for, for example "8.0 9.0"; "" without CUDA kernels.
_define_query("cuda_architectures")


def _allows_tf32() -> bool:
    """Whether torch may round float32 operands of convolutions to TF32."""
    # torch.backends.cudnn.allow_tf32 is the older name of this setting. Reading it fails where the new one was set.
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


# The CUDA kernels call this operator, as C++ cannot read the setting through torch's stable ABI. The compiled library
# has a kernel of it that answers with torch's default. Calls without tensors come to the key BackendSelect first, so
# this one is before it and replaces nothing.
define("_allows_tf32() -> bool")
LIBRARY.impl("_allows_tf32", _allows_tf32, "BackendSelect")


def _with_all_arguments(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `function`, which takes all arguments of an operator in order, callable as torch's dispatcher calls.

    The dispatcher leaves out arguments that equal their defaults.
    """
    schema = getattr(torch.ops.dcn_d2, name).default._schema

    def call(*args: Any, **kwargs: Any) -> Any:
        rest = schema.arguments[len(args) :]
        return function(*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest))

    return call


def register_without_kernel(name: str, function: Callable[..., Any]) -> None:
    """Registers what runs on devices for which no kernel was compiled, and for tensors that are not dense.

    Those are refused here in words: no kernel exists that could refuse them.

    Args:
        name: the operator's.
        function: takes all of the operator's arguments, in order.
    """
    names = [argument.name for argument in getattr(torch.ops.dcn_d2, name).default._schema.arguments]

    def checked(*arguments: Any) -> Any:
        for argument, value in zip(names, arguments):
            if isinstance(value, torch.Tensor):
                check_layout(name, argument, value)
        return function(*arguments)

    LIBRARY.impl(name, _with_all_arguments(name, checked), "CompositeExplicitAutograd")


def register_fallback(name: str, reference: Callable[..., Any]) -> None:
    """Runs `reference` on devices for which no kernel was compiled, and warns once for each."""

    def fallback(*arguments: Any) -> Any:
        device = next(a for a in arguments if isinstance(a, torch.Tensor)).device.type
        if device not in _warned:
            _warned.add(device)
            reason = missing_kernels or f"the compiled library dcn_d2._C has no kernels for {device}"
            warnings.warn(
                f"dcn_d2: {name} on {device} runs in Python, which is right, but hundreds of times slower: {reason}.",
                stacklevel=2,
            )
        return reference(*arguments)

    register_without_kernel(name, fallback)


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Registers what stands in for the kernels where tensors have shapes but no values.

    torch.compile, torch.export and tensors on the device "meta" call it. Without it a model with the operator cannot be
    traced. It checks operands as the kernels do, and gives empty results. Compiled code reads the kernels' results with
    the strides of these, so both must follow `is_channels_last`.

    Args:
        name: the operator's.
        fake: takes all of the operator's arguments, in order.
    """
    torch.library.register_fake(f"dcn_d2::{name}", _with_all_arguments(name, fake))


def register_autocast(name: str, keep_float32: tuple[str, ...] = (), float32_on_cpu: tuple[str, ...] = ()) -> None:
    """Under autocast, casts the operands to autocast's dtype, as torch does for its own convolutions.

    torch knows nothing of our operators. Without a rule of their own they would get operands of mixed dtypes, and
    refuse them. float64 operands stay as they are, as in torch's own rules.

    Args:
        name: the operator's.
        keep_float32: arguments that become float32 instead.
        float32_on_cpu: arguments that stay float32 on CPU if they are so, where the kernels take them so.
    """
    operator = getattr(torch.ops.dcn_d2, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def cast(value: Any, dtype: torch.dtype) -> Any:
        castable = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if castable else value

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def autocast(*args: Any, _device_type: str = device_type, _keys: Any = keys, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(_device_type)
            arguments = dict(zip(names, args)) | kwargs
            for key, value in arguments.items():
                kept = (
                    _device_type == "cpu" and key in float32_on_cpu and getattr(value, "dtype", None) == torch.float32
                )
                arguments[key] = cast(value, torch.float32 if kept or key in keep_float32 else dtype)
            with torch._C._ExcludeDispatchKeyGuard(_keys):
                return operator(**arguments)

        LIBRARY.impl(name, autocast, key)

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What runs here, for bug reports and new machines.

python -m dcn_d2.info            versions, compiled library, instruction set, GPU architectures, devices, folders
python -m dcn_d2.info --check    also compares every operator with its slow reference on every device, in a few seconds;
                                 exits with 1 if one differs
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from . import __version__

try:
    from . import ops
except (OSError, ImportError) as error:  # the library that DCN_LIBRARY names does not load, or an older one was built
    if __name__ != "__main__":
        raise
    sys.exit(f"dcn_d2.info: {error}")
from .ops import _library, reference

Operator = Callable[..., Tensor]

# Largest difference that is allowed, relative to the largest expected value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def version_of(module: str) -> str:
    """Version of the package that a module belongs to, whatever its distribution is called."""
    names = metadata.packages_distributions().get(module, [])
    return ", ".join(f"{name} {metadata.version(name)}" for name in dict.fromkeys(names)) or "not installed"


def describe() -> dict[str, str]:
    """What a bug report needs: facts by their names."""
    cache = os.path.expanduser(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache"))
    facts = {
        "dcn_d2": f"{__version__}, in {os.path.dirname(__file__)}",
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, built for CUDA {torch.version.cuda or '-'}",
        "torchvision": version_of("torchvision"),
        "Detectron2": version_of("detectron2"),
        "kernels": _library.missing_kernels or f"compiled, in {_library.loaded_kernels}",
        "kernels for": ", ".join(compiled_devices()) or "no device: the slow reference runs",
        "CPU": f"torch uses {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "CPU kernels": f"{instruction_set()}, DCN_CPU_CAPABILITY {os.environ.get('DCN_CPU_CAPABILITY', 'not set')}",
        "CUDA kernels": "compiled for " + architectures if (architectures := cuda_architectures()) else "none",
        "data sets": os.environ.get("DETECTRON2_DATASETS", "./datasets (DETECTRON2_DATASETS is not set)"),
        "cache": cache,
    }
    if not torch.cuda.device_count():
        facts["GPU"] = "none that torch can see"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        facts[f"cuda:{index}"] = (
            f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
            f"{what_is_missing_for(capability, architectures)}"
        )
    return facts


def ask_library(name: str) -> str:
    """What a query of the compiled library says, "" where the library does not have it, or why it fails."""
    try:
        return str(getattr(torch.ops.dcn_d2, name)())
    except AttributeError:  # the library is older than the query
        return ""
    except RuntimeError as error:  # such as a wrong DCN_CPU_CAPABILITY
        return f"unknown: {(str(error).strip().splitlines() or [''])[0]}"


def instruction_set() -> str:
    """The instruction set that the CPU kernels use."""
    if "cpu" not in compiled_devices():
        return "none"
    return ask_library("capability") or "unknown instruction set"


def cuda_architectures() -> str:
    """The GPU architectures in the compiled library, such as "8.0 9.0"; "" if it has no CUDA kernels."""
    return (ask_library("cuda_architectures") or "unknown architectures") if "cuda" in compiled_devices() else ""


def what_is_missing_for(capability: tuple[int, int], architectures: str) -> str:
    """Says whether CUDA kernels run on a GPU: "" if they do or if it is not known.

    Code for one architecture also runs on later ones of the same major number.

    Args:
        capability: the GPU's compute capability.
        architectures: those that the library was compiled for, as `cuda_architectures` gives them.
    """
    major, minor = capability
    build = f"build the library again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    if not architectures:
        return f"; the library has no CUDA kernels, so the slow reference runs there: {build}"
    numbers = re.findall(r"(\d+)\.(\d+)", architectures)
    if numbers and not any(int(a) == major and int(b) <= minor for a, b in numbers):
        return f"; the library was not compiled for it, but for {architectures}: {build}"
    return ""


def compiled_devices() -> list[str]:
    """Types of devices for which the compiled library has kernels."""
    keys = (("cpu", "CPU"), ("cuda", "CUDA"))
    return [
        device
        for device, key in keys
        if torch._C._dispatch_has_kernel_for_dispatch_key("dcn_d2::deform_conv2d_backward", key)
    ]


def layouts_of(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of a 4-d tensor, as they may lie in memory."""
    yield "contiguous", tensor
    yield "channels_last", tensor.contiguous(memory_format=torch.channels_last)
    wider = torch.cat([tensor, tensor], 1)
    yield "half of the channels of a contiguous tensor", wider[:, : tensor.shape[1]]
    wider = wider.contiguous(memory_format=torch.channels_last)
    yield "half of the channels of a channels_last tensor", wider[:, : tensor.shape[1]]
    yield "height and width exchanged", tensor.mT.contiguous().mT
    yield "every second pixel", tensor.repeat_interleave(2, dim=3)[..., ::2]


def samples(
    dtype: torch.dtype, device: str
) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Any]]]:
    """For each operator: the operator, its reference, and three operands, by which gradients are taken if not None."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    image, weight, branch = normal(2, 16, 9, 11), normal(8, 16, 3, 3) / 8, normal(2, 27, 9, 11)
    rois = torch.tensor([[0, 2.3, 3.1, 9.7, 8.9], [1, -2.0, 1.0, 6.5, 12.0]], dtype=torch.float64).to(device)
    rois = rois.to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)
    shift = normal(2, 2, 3, 3)

    def in_parts(x: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
        mask = branch[:, 18:].sigmoid()
        return reference.deform_conv2d(x, branch[:, :18], weight, None, (1, 1), (1, 1), (1, 1), mask)

    return {
        "deform_conv2d": (
            lambda x, o, w: ops.deform_conv2d(x, o, w, padding=1),
            lambda x, o, w: reference.deform_conv2d(x, o, w, None, (1, 1), (1, 1), (1, 1), None),
            [image, branch[:, :18].contiguous(), weight],
        ),
        "modulated_deform_conv2d": (
            lambda x, b, w: ops.modulated_deform_conv2d(x, b, w, padding=1),
            in_parts,
            [image, branch, weight],
        ),
        "deform_roi_pool": (
            lambda x, o, _: ops.deform_roi_pool(x, rois, o, 3),
            lambda x, o, _: reference.deform_roi_pool(x, rois, o, (3, 3)),
            [image, shift, None],
        ),
        "deform_psroi_pool": (
            lambda x, o, _: ops.deform_psroi_pool(x, rois, o, 3),
            lambda x, o, _: reference.deform_psroi_pool(x, rois, o, (3, 3)),
            [image, shift, None],
        ),
    }


def run(operator: Operator, operands: list[Any]) -> list[Tensor]:
    """Output of an operator, and the gradients of the sum of its squares."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    output = operator(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), wanted)]


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest expected value of each tensor; infinite for NaN."""
    worst = 0.0
    for a, e in zip(actual, expected):
        ratio = float((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-6))
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def strides_of_fake(operator: Operator, operands: list[Any]) -> tuple[int, ...]:
    """Strides that the operator promises to torch.compile."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return operator(*(None if t is None else mode.from_tensor(t) for t in operands)).stride()


def check(device: str) -> list[str]:
    """Compares every operator with its reference on a device, for all dtypes and layouts; one line for each fault."""
    faults = []
    allow_tf32 = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        for dtype, tolerance in TOLERANCE.items():
            for name, (operator, oracle, operands) in samples(dtype, device).items():
                expected = run(oracle, [None if t is None else t.double() for t in operands])
                for layout, image in layouts_of(operands[0]):
                    laid = [image, *operands[1:]]
                    what = f"{name} in {str(dtype).removeprefix('torch.')} on {device}, input {layout}"
                    actual = run(operator, laid)
                    if (worst := difference(actual, expected)) > tolerance:
                        faults.append(f"{what}: differs from the reference by {worst:.1e}, allowed is {tolerance:.0e}")
                    promised = strides_of_fake(operator, laid)
                    if actual[0].stride() != promised:
                        faults.append(f"{what}: the output's strides are {actual[0].stride()}, promised are {promised}")
    finally:
        torch.backends.cudnn.conv.fp32_precision = allow_tf32  # type: ignore[attr-defined]
    return faults


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dcn_d2.info", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare every operator with its reference")
    args = parser.parse_args(arguments)
    for name, value in describe().items():
        print(f"{name:12}  {value}")
    if not args.check:
        return
    failed = False
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        try:
            faults = check(device)
        except RuntimeError as error:  # a wrong DCN_CPU_CAPABILITY, or a GPU without kernels for it
            faults = [str(error).strip()]
        failed |= bool(faults)
        print(
            f"check on {device}: {f'{len(faults)} fault(s)' if faults else 'all operators agree with their references'}"
        )
        for fault in faults:
            print(f"  {fault}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

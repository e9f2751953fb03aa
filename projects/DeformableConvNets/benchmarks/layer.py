# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""One 3x3 convolution of a ResNet-50: its operands, and all implementations that run it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import on_cuda
from benchmarks import peers as other
from benchmarks.failures import Failures, attempt
from benchmarks.measure import Calls, prepare
from dcn_d2.layers import split_offset_and_mask
from dcn_d2.ops import deform_conv2d, modulated_deform_conv2d


@dataclass(frozen=True)
class Shape:
    """One 3x3 layer: `channels` in and out, `height` x `width` of the output."""

    name: str
    channels: int
    height: int
    width: int
    batch: int = 1
    stride: int = 1
    groups: int = 1
    deform_groups: int = 1
    mask: bool = True


STAGES = [Shape("c3", 128, 100, 152), Shape("c4", 256, 50, 76), Shape("c5", 512, 25, 38)]


def shapes(device: str, quick: bool, stages: list[Shape]) -> list[Shape]:
    """The shapes to measure: the stages as they are, and each stage with one thing changed."""
    changes: list[dict[str, Any]] = [{}]
    if not quick:
        changes += [{"mask": False}, {"deform_groups": 4}, {"stride": 2}, {"groups": 32}, {"batch": 2}]
    if device == "cuda":
        changes = [{"batch": 2}, {"batch": 16}]
        if not quick:
            changes += [{"mask": False}, {"deform_groups": 4}, {"stride": 2}, {"groups": 32}]
            changes += [{"batch": 16, "groups": 32}]
    return [replace(stage, **change) for change in changes for stage in stages]


def as_tensors(result: Any) -> list[Tensor]:
    """What a call returns as a list: of one output, or of the gradients of all operands."""
    return [torch.as_tensor(r) for r in (result if isinstance(result, (tuple, list)) else [result])]


class Layer:
    """The operands of one shape, and the contestants that run it."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        self.shape = shape
        self.on_gpu = device == "cuda"
        rows, columns = shape.height * shape.stride, shape.width * shape.stride
        channels, group_channels = shape.channels, shape.channels // shape.groups
        self.input = normal(shape.batch, channels, rows, columns)
        self.weight = normal(channels, group_channels, 3, 3) * (9 * group_channels) ** -0.5
        self.offset = normal(shape.batch, 18 * shape.deform_groups, shape.height, shape.width) * 2
        self.mask = (
            normal(shape.batch, 9 * shape.deform_groups, shape.height, shape.width).sigmoid() if shape.mask else None
        )
        self.grad = normal(shape.batch, channels, shape.height, shape.width)

    def tensors(self) -> dict[str, Tensor]:
        """The operands and the output's gradient by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def in_other_memory(self) -> Layer:
        """The same layer with copies of all tensors."""
        other = copy.copy(self)
        vars(other).update({name: tensor.clone() for name, tensor in self.tensors().items()})
        return other

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution without offsets."""
        return F.conv2d(x, weight, stride=self.shape.stride, padding=1, groups=self.shape.groups)

    def deformable(self, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """An operator with torchvision's arguments as a function of this layer's operands."""

        def call(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
            return operator(x, offset, weight, None, self.shape.stride, 1, 1, mask)

        return call

    def moved(self) -> tuple[Tensor, ...]:
        """The offset, and the mask if there is one."""
        return (self.offset,) if self.mask is None else (self.offset, self.mask)

    def torchvision(self, x: Tensor, weight: Tensor, *moved: Tensor) -> Tensor:
        """Torchvision's operator in the dtype of the operands."""
        import torchvision  # here, so that one that does not load costs only its own numbers

        return self.deformable(torchvision.ops.deform_conv2d)(x, weight, *moved)

    def theirs(self, x: Tensor, weight: Tensor, *moved: Tensor) -> Tensor:
        """Torchvision's operator. It has no kernels for bfloat16: there it computes in float32."""
        operands = [t.float() if x.dtype == torch.bfloat16 else t for t in (x, weight, *moved)]
        return self.torchvision(*operands).to(x.dtype)

    def reference(self, backward: bool) -> list[Tensor]:
        """What torchvision computes in float32: in float16 its coordinates are float16 too, off by some hundredths."""
        operands = [t.float() for t in (self.input, self.weight, *self.moved())]
        with on_cuda.without_tf32():
            return as_tensors(prepare(self.torchvision, tuple(operands), self.grad.float(), backward)())

    def by_branch(self, x: Tensor, weight: Tensor, branch: Tensor) -> Tensor:
        """Our operator that takes an offset branch's output as it is."""
        return modulated_deform_conv2d(x, branch, weight, None, self.shape.stride, 1)

    def by_split_branch(self, x: Tensor, weight: Tensor, branch: Tensor) -> Tensor:
        """Our operator after the branch's output was split into offset and mask."""
        offset, mask = split_offset_and_mask(branch)
        return deform_conv2d(x, offset, weight, None, self.shape.stride, 1, 1, mask)

    def contestants(
        self, backward: bool, peers: Collection[str] = other.CONVOLUTION_PEERS, failed: Failures | None = None
    ) -> Calls:
        """Our implementations and those of `peers` that run this shape, ready to be called.

        What cannot be made ready is noted in `failed`.
        """
        failed = {} if failed is None else failed
        plain, last = (self.input, self.weight), (self.input.contiguous(memory_format=torch.channels_last), self.weight)
        last_weight, last_grad = (t.contiguous(memory_format=torch.channels_last) for t in (self.weight, self.grad))
        ours, moved = self.deformable(deform_conv2d), self.moved()
        found = {
            "conv NCHW": prepare(self.plain, plain, self.grad, backward),
            "conv NHWC": prepare(self.plain, (last[0], last_weight), last_grad, backward),
            "dcn_d2 NCHW": prepare(ours, (*plain, *moved), self.grad, backward),
            "dcn_d2 NHWC": prepare(ours, (*last, *moved), last_grad, backward),
        }
        if "torchvision" in peers:
            found["torchvision"] = prepare(self.theirs, (*plain, *moved), self.grad, backward)
        if self.on_gpu:
            return found | self._on_gpu(found["dcn_d2 NHWC"], backward, peers, failed)
        runtimes = {"onnxruntime": other.onnx_runtime, "openvino": other.openvino_runtime}
        if not backward and self.input.dtype == torch.float32:
            shape = (self.shape.stride, self.shape.groups, self.shape.deform_groups)
            operands = (self.input, self.weight, self.offset, self.mask)
            ready = {n: attempt(failed, n, make, *operands, *shape) for n, make in runtimes.items() if n in peers}
            found |= {name: call for name, call in ready.items() if call}
        return found

    def _on_gpu(self, ours: Callable[[], object], backward: bool, peers: Collection[str], failed: Failures) -> Calls:
        """Contestants that exist on a GPU only."""
        plain, moved = (self.input, self.weight), self.moved()
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (self.input, self.grad))
        more = {}
        if backward and attempt(failed, "deterministic NHWC", on_cuda.has_deterministic_mode, ours):
            more["deterministic NHWC"] = on_cuda.deterministic(ours)
        if self.mask is not None:
            branch = torch.cat([self.offset, self.mask.logit()], 1).contiguous(memory_format=torch.channels_last)
            for name, call in (("branch NHWC", self.by_branch), ("split branch NHWC", self.by_split_branch)):
                more[name] = prepare(call, (x, self.weight, branch), grad, backward)
        if "autocast" in peers and self.input.dtype in (torch.float16, torch.bfloat16):
            autocast = on_cuda.under_autocast(self.torchvision, self.input.dtype)
            more["autocast torchvision"] = prepare(autocast, (*plain, *moved), self.grad, backward)
        deformops = other.deformops() if "deformops" in peers else None
        if deformops:
            theirs = self.deformable(deformops)
            more["deformops NCHW"] = prepare(theirs, (*plain, *moved), self.grad, backward)
            more["deformops NHWC"] = prepare(theirs, (x, self.weight, *moved), grad, backward)
        return more

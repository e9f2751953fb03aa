# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The price of deformability: deform_conv2d against a plain convolution of the same shape, and against its peers.

    python benchmarks/deform_conv2d.py                       the CPU, 1 thread and all threads
    python benchmarks/deform_conv2d.py --device cuda         the GPU; --dtype tf32, --buffers hot rotated
    python benchmarks/deform_conv2d.py --quick               one row a stage, forward and forward+backward
    python benchmarks/deform_conv2d.py --memory              peak extra memory
    python benchmarks/deform_conv2d.py --check FILE...       which goals hold

Shapes are those of a ResNet-50's stages at 800 x 1216. All contestants are timed in turns in one process; the table
shows medians, and the file under results/ has their spread. A price is the time over that of the plain convolution in
its faster memory format. On the GPU a call's operands may be those of the call before (hot) or others that are in no
cache (rotated), and there take part too: the deterministic mode, torchvision's operator under autocast, and the two
ways from an offset branch's output to the operator, as it is ("branch") and by a split and a sigmoid ("split branch").
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import goals
import measure
import on_cuda
import torch
import torch.nn.functional as F
import torchvision
from measure import LAST, prepare
from torch import Tensor

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
    """The rows of the table: the stages, each also with one thing changed."""
    changes: list[dict[str, Any]] = [{}]
    if not quick:
        changes += [{"mask": False}, {"deform_groups": 4}, {"stride": 2}, {"groups": 32}, {"batch": 2}]
    if device == "cuda":
        changes = [{"batch": 2}, {"batch": 16}]
        if not quick:
            changes += [{"mask": False}, {"deform_groups": 4}, {"stride": 2}, {"groups": 32}]
            changes += [{"batch": 16, "groups": 32}]
    return [replace(stage, **change) for change in changes for stage in stages]


class Layer:
    """The operands of one shape, and the contestants that run it."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(dtype)

        self.shape = shape
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
        return F.conv2d(x, weight, stride=self.shape.stride, padding=1, groups=self.shape.groups)

    def deformable(self, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
            return operator(x, offset, weight, None, self.shape.stride, 1, 1, mask)

        return call

    def theirs(self, x: Tensor, weight: Tensor, *moved: Tensor) -> Tensor:
        """Torchvision's operator; in float32 and back where it has no kernel, for bfloat16 on CPU."""
        missing = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        operands = [t.float() if missing else t for t in (x, weight, *moved)]
        return self.deformable(torchvision.ops.deform_conv2d)(*operands).to(x.dtype)

    def by_branch(self, x: Tensor, weight: Tensor, branch: Tensor) -> Tensor:
        return modulated_deform_conv2d(x, branch, weight, None, self.shape.stride, 1)

    def by_split_branch(self, x: Tensor, weight: Tensor, branch: Tensor) -> Tensor:
        offset, mask = split_offset_and_mask(branch)
        return deform_conv2d(x, offset, weight, None, self.shape.stride, 1, 1, mask)

    def contestants(self, backward: bool) -> dict[str, Callable[[], object]]:
        """Every implementation that runs this shape, ready to be called."""
        moved = [t for t in (self.offset, self.mask) if t is not None]
        plain, last = (self.input, self.weight), (self.input.contiguous(memory_format=LAST), self.weight)
        last_weight = self.weight.contiguous(memory_format=LAST)
        found = {
            "conv NCHW": prepare(self.plain, plain, self.grad, backward),
            "conv NHWC": prepare(
                self.plain, (last[0], last_weight), self.grad.contiguous(memory_format=LAST), backward
            ),
            "dcn_d2 NCHW": prepare(self.deformable(deform_conv2d), (*plain, *moved), self.grad, backward),
            "dcn_d2 NHWC": prepare(
                self.deformable(deform_conv2d), (*last, *moved), self.grad.contiguous(memory_format=LAST), backward
            ),
            "torchvision": prepare(self.theirs, (*plain, *moved), self.grad, backward),
        }
        if self.input.device.type == "cuda":
            found |= self._on_cuda(found, backward)
        if not backward and self.input.device.type == "cpu" and self.input.dtype == torch.float32:
            onnx_runtime = self._onnx_runtime()
            if onnx_runtime:
                found["onnxruntime"] = onnx_runtime
        return found

    def _on_cuda(self, found: dict[str, Callable[[], object]], backward: bool) -> dict[str, Callable[[], object]]:
        """Contestants that there are only on a GPU; `found` has the others."""
        moved = [t for t in (self.offset, self.mask) if t is not None]
        more = {}
        if backward and on_cuda.has_deterministic_mode(found["dcn_d2 NHWC"]):
            more["deterministic NHWC"] = on_cuda.deterministic(found["dcn_d2 NHWC"])
        if self.mask is not None:
            branch = torch.cat([self.offset, self.mask.logit()], 1)
            x, joint, grad = (t.contiguous(memory_format=LAST) for t in (self.input, branch, self.grad))
            for name, call in (("branch NHWC", self.by_branch), ("split branch NHWC", self.by_split_branch)):
                more[name] = prepare(call, (x, self.weight, joint), grad, backward)
        if self.input.dtype in (torch.float16, torch.bfloat16):
            more["autocast torchvision"] = on_cuda.under_autocast(found["torchvision"], self.input.dtype)
        theirs = on_cuda.deformops()
        if theirs is not None:
            for layout, memory_format in (("NCHW", torch.contiguous_format), ("NHWC", LAST)):
                x, grad = (t.contiguous(memory_format=memory_format) for t in (self.input, self.grad))
                operands = (x, self.weight, *moved)
                more[f"deformops {layout}"] = prepare(self.deformable(theirs), operands, grad, backward)
        return more

    def _onnx_runtime(self) -> Callable[[], object] | None:
        """ONNX Runtime's DeformConv (1.25 or newer), or None where it is not installed."""
        try:
            import onnx
            import onnxruntime
        except ModuleNotFoundError:
            return None
        feeds = {"X": self.input, "W": self.weight, "offset": self.offset}
        names = ["X", "W", "offset"]
        if self.mask is not None:
            feeds["mask"] = self.mask
            names += ["", "mask"]  # no bias
        node = onnx.helper.make_node(
            "DeformConv",
            names,
            ["Y"],
            strides=[self.shape.stride] * 2,
            pads=[1] * 4,
            group=self.shape.groups,
            offset_group=self.shape.deform_groups,
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


def check_equal(layer: Layer) -> None:
    """Refuses to time implementations that do not compute the same."""
    calls = layer.contestants(backward=False)
    expected = torch.as_tensor(calls["torchvision"]()).float()
    for name in set(calls) & {"dcn_d2 NCHW", "dcn_d2 NHWC", "onnxruntime", "deformops NHWC", "branch NHWC"}:
        actual: Any = calls[name]()
        actual = torch.as_tensor(actual[0] if isinstance(actual, list) else actual).float()
        error = float((actual - expected.to(actual.device)).abs().max() / expected.abs().max())
        tf32 = layer.input.device.type == "cuda" and torch.backends.cudnn.allow_tf32
        if not error <= (3e-2 if layer.input.dtype != torch.float32 else 5e-3 if tf32 else 1e-4):
            raise RuntimeError(f"{name} differs from torchvision by {error} (relative) at {layer.shape}")


def measure_time(arguments: argparse.Namespace, stages: list[Shape]) -> list[dict[str, Any]]:
    """Times every shape, pass and number of threads; prints a line for each."""
    rows = []
    cuda = arguments.device == "cuda"
    dtype = on_cuda.set_precision(arguments.dtype) if cuda else getattr(torch, arguments.dtype)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in shapes(arguments.device, arguments.quick, stages):
            layer = Layer(shape, arguments.device, dtype)
            check_equal(layer)
            for direction, buffers in itertools.product(("forward", "forward+backward"), arguments.buffers):
                calls = layer.contestants(direction != "forward")
                if buffers == "rotated":
                    calls = on_cuda.rotating(layers_in_other_memory(layer, direction != "forward"))
                timings = measure.interleave(calls, arguments.device, arguments.repeats, ahead=cuda)
                rows.append(
                    {"shape": asdict(shape), "pass": direction, "dtype": arguments.dtype, "threads": threads}
                    | ({"buffers": buffers} if cuda else {})
                    | {"milliseconds": {name: asdict(timing) for name, timing in timings.items()}}
                )
                print(describe(rows[-1]), flush=True)
    return rows


def layers_in_other_memory(layer: Layer, backward: bool) -> list[dict[str, Callable[[], object]]]:
    """Contestants of as many copies of a layer as it takes to be in no cache."""
    copies = on_cuda.copies_needed(sum(tensor.nbytes for tensor in layer.tensors().values()))
    return [layer.in_other_memory().contestants(backward) for _ in range(copies)]


def describe(row: dict[str, Any]) -> str:
    """One line: the shape's differences from the default, the price, and the factor over each peer."""
    shape = row["shape"]
    varied = [f"{k}={v}" for k, v in shape.items() if k in ("batch", "stride", "groups", "deform_groups") and v != 1]
    varied += [] if shape["mask"] else ["no mask"]
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    conv, ours = min(times["conv NCHW"], times["conv NHWC"]), min(times["dcn_d2 NCHW"], times["dcn_d2 NHWC"])
    names = ("torchvision", "autocast torchvision", "deformops NHWC", "onnxruntime")
    peers = ", ".join(f"{times[n] / ours:.2f}x {n}" for n in names if n in times)
    label = " ".join([shape["name"], *varied])
    where = f"{row['dtype']} {row['buffers']}" if "buffers" in row else f"{row['threads']} thread(s)"
    return (
        f"{where} {row['pass']:16s} {label:24s} conv {conv:8.2f} ms  dcn_d2 {ours:8.2f} ms  "
        f"price {ours / conv:5.2f}  speed: {peers}"
    )


def measure_memory(arguments: argparse.Namespace, stages: list[Shape]) -> list[dict[str, Any]]:
    """Peak extra memory of every contestant: on CPU with one thread, of the process; on CUDA what torch allocates.

    On CUDA a row also has what a channels_last copy of the input takes, with backward of its gradient too: "copies".
    """
    cuda = arguments.device == "cuda"
    torch.set_num_threads(1)
    dtype = on_cuda.set_precision(arguments.dtype) if cuda else torch.float32
    peak = on_cuda.peak_extra_mib if cuda else measure.peak_extra_mib
    rows: list[dict[str, Any]] = []
    for shape in shapes(arguments.device, arguments.quick, stages):
        layer = Layer(shape, arguments.device, dtype)
        for direction in ("forward", "forward+backward"):
            calls = layer.contestants(direction != "forward")
            extra = {name: peak(call) for name, call in calls.items()}
            if cuda:
                extra["copies"] = round(layer.input.nbytes * (1 if direction == "forward" else 2) / 2**20, 2)
            rows.append({"shape": asdict(shape), "pass": direction, "threads": 1})
            rows[-1] |= {"dtype": arguments.dtype if cuda else "float32", "peak_extra_mib": extra}
            print(direction, shape.name, extra, flush=True)
    return rows


def main(arguments: list[str] | None = None, stages: list[Shape] = STAGES) -> None:
    """Measures what the arguments say and writes the results."""
    options = measure.parser(__doc__ or "", "only the three plain stage shapes", repeats=9)
    options.add_argument("--memory", action="store_true", help="measure peak extra memory instead of time")
    options.add_argument("--buffers", nargs="+", choices=on_cuda.BUFFERS, default=["hot"], help="CUDA only")
    parsed = measure.parse(options, arguments)
    if parsed.device == "cpu" and parsed.buffers != ["hot"]:
        options.error("--buffers rotated: only for --device cuda")
    if parsed.check:
        print(goals.report(parsed.check))
        return
    if parsed.memory and parsed.device == "cpu" and os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    rows = measure_memory(parsed, stages) if parsed.memory else measure_time(parsed, stages)
    name = "deform_conv2d_memory" if parsed.memory else "deform_conv2d"
    measure.write(parsed.output, name, parsed.device, rows)


if __name__ == "__main__":
    main()

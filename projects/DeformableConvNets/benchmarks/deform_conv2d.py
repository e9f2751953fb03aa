# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The price of deformability: deform_conv2d against a plain convolution of the same shape, and against its peers.

    python benchmarks/deform_conv2d.py                       the CPU, 1 thread and all threads
    python benchmarks/deform_conv2d.py --device cuda         the GPU; --dtype tf32, --buffers hot rotated
    python benchmarks/deform_conv2d.py --quick               one row a stage, forward and forward+backward
    python benchmarks/deform_conv2d.py --memory              peak extra memory
    python benchmarks/deform_conv2d.py --peers none          without other implementations
    python benchmarks/deform_conv2d.py --check FILE...       which goals hold

Shapes are those of a ResNet-50's stages at 800 x 1216. All contestants are timed in turns in one process; the table
shows medians, and the file under results/ has their spread. A price is the time over that of the plain convolution in
its faster memory format. On the GPU a call's operands may be those of the call before (hot) or others that are in no
cache (rotated), and there take part too: the deterministic mode, torchvision's operator under autocast, and the two
ways from an offset branch's output to the operator, as it is ("branch") and by a split and a sigmoid ("split branch").

Before a shape is timed all implementations run once and are compared with torchvision in float32. One that raises or
computes something else drops out, and the row says why; if it is one of ours the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import goals
import measure
import on_cuda
import torch
import torch.nn.functional as F
from measure import LAST, Failures, attempt, prepare
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


# Other implementations, by the first word of their contestants' names.
PEERS = ("torchvision", "autocast", "deformops", "onnxruntime")
# How far values may be from those of float32, relative to the largest one.
TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 2e-2}
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
        return F.conv2d(x, weight, stride=self.shape.stride, padding=1, groups=self.shape.groups)

    def deformable(self, operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
            return operator(x, offset, weight, None, self.shape.stride, 1, 1, mask)

        return call

    def moved(self) -> tuple[Tensor, ...]:
        """The offset, and the mask if there is one."""
        return (self.offset,) if self.mask is None else (self.offset, self.mask)

    def torchvision(self, x: Tensor, weight: Tensor, *moved: Tensor) -> Tensor:
        import torchvision  # here, so that one that does not load costs only its own numbers

        return self.deformable(torchvision.ops.deform_conv2d)(x, weight, *moved)

    def theirs(self, x: Tensor, weight: Tensor, *moved: Tensor) -> Tensor:
        """Torchvision's operator; in float32 and back for bfloat16, for which it has no kernels."""
        operands = [t.float() if x.dtype == torch.bfloat16 else t for t in (x, weight, *moved)]
        return self.torchvision(*operands).to(x.dtype)

    def reference(self, backward: bool) -> list[Tensor]:
        """What torchvision computes in float32: in float16 it has coordinates in float16, off by some hundredths."""
        operands = [t.float() for t in (self.input, self.weight, *self.moved())]
        with on_cuda.without_tf32():
            return _tensors(prepare(self.torchvision, tuple(operands), self.grad.float(), backward)())

    def by_branch(self, x: Tensor, weight: Tensor, branch: Tensor) -> Tensor:
        return modulated_deform_conv2d(x, branch, weight, None, self.shape.stride, 1)

    def by_split_branch(self, x: Tensor, weight: Tensor, branch: Tensor) -> Tensor:
        offset, mask = split_offset_and_mask(branch)
        return deform_conv2d(x, offset, weight, None, self.shape.stride, 1, 1, mask)

    def contestants(
        self, backward: bool, peers: Collection[str] = PEERS, failed: Failures | None = None
    ) -> dict[str, Callable[[], object]]:
        """Our implementations and those of `peers` that run this shape, ready to be called.

        What cannot be made ready is noted in `failed`.
        """
        failed = {} if failed is None else failed
        plain, last = (self.input, self.weight), (self.input.contiguous(memory_format=LAST), self.weight)
        last_weight, last_grad = (t.contiguous(memory_format=LAST) for t in (self.weight, self.grad))
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
        if "onnxruntime" in peers and not backward and self.input.dtype == torch.float32:
            onnx_runtime = attempt(failed, "onnxruntime", self._onnx_runtime)
            if onnx_runtime:
                found["onnxruntime"] = onnx_runtime
        return found

    def _on_gpu(
        self, ours: Callable[[], object], backward: bool, peers: Collection[str], failed: Failures
    ) -> dict[str, Callable[[], object]]:
        """Contestants that there are only on a GPU."""
        plain, moved = (self.input, self.weight), self.moved()
        x, grad = (t.contiguous(memory_format=LAST) for t in (self.input, self.grad))
        more = {}
        if backward and attempt(failed, "deterministic NHWC", on_cuda.has_deterministic_mode, ours):
            more["deterministic NHWC"] = on_cuda.deterministic(ours)
        if self.mask is not None:
            branch = torch.cat([self.offset, self.mask.logit()], 1).contiguous(memory_format=LAST)
            for name, call in (("branch NHWC", self.by_branch), ("split branch NHWC", self.by_split_branch)):
                more[name] = prepare(call, (x, self.weight, branch), grad, backward)
        if "autocast" in peers and self.input.dtype in (torch.float16, torch.bfloat16):
            autocast = on_cuda.under_autocast(self.torchvision, self.input.dtype)
            more["autocast torchvision"] = prepare(autocast, (*plain, *moved), self.grad, backward)
        deformops = on_cuda.deformops() if "deformops" in peers else None
        if deformops:
            theirs = self.deformable(deformops)
            more["deformops NCHW"] = prepare(theirs, (*plain, *moved), self.grad, backward)
            more["deformops NHWC"] = prepare(theirs, (x, self.weight, *moved), grad, backward)
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


def _tensors(result: Any) -> list[Tensor]:
    """What a call returns as a list: of one output, or of the gradients of all operands."""
    return [torch.as_tensor(r) for r in (result if isinstance(result, (tuple, list)) else [result])]


def check_equal(
    layer: Layer, tolerance: float, failed: Failures, backward: bool, peers: Collection[str] = PEERS, seconds: float = 0
) -> None:
    """Notes in `failed` who does not compute what torchvision does in float32, or raises.

    Torchvision itself is not compared with itself, and plain convolutions compute something else. A peer may take
    `seconds`, if these are given.
    """
    expected = attempt(failed, "reference", layer.reference, backward)
    calls = layer.contestants(backward, peers, failed)
    for name, call in calls.items():
        if measure.dropped(failed, name) or name.startswith("conv "):
            continue
        actual = attempt(failed, name, call, seconds=seconds if measure.is_peer(name) else 0)
        if actual is not None and expected and name != "torchvision":
            reason = attempt(failed, name, _difference, _tensors(actual), expected, tolerance, "branch" in name)
            if reason:
                measure.note(failed, name, reason)


def _difference(actual: list[Tensor], expected: list[Tensor], tolerance: float, branch: bool) -> str:
    """Says what differs by more than the tolerance; gradients of a branch's outputs are not compared."""
    names = ["input's gradient", "weight's gradient", "offset's gradient", "mask's gradient"]
    names = (names[:2] if branch else names[: len(expected)]) if len(expected) > 1 else ["output"]
    for name, a, e in zip(names, actual, expected):
        distance, size = (a.to(e.device).float() - e).abs(), e.abs()
        # Where a sample lies exactly on the border of what contributes, torchvision's offset has another one-sided
        # derivative than ours. These are few, but in 16 bits there are some.
        error = float(distance.mean() / size.mean() if name == "offset's gradient" else distance.max() / size.max())
        if not error <= tolerance:
            return f"its {name} differs from torchvision's in float32 by {error:.3g} (relative)"
    return ""


def measure_time(arguments: argparse.Namespace, stages: list[Shape], results: measure.Results) -> None:
    """Times every shape, pass and number of threads; a row and a line for each."""
    cuda = arguments.device == "cuda"
    dtype = on_cuda.set_precision(arguments.dtype) if cuda else getattr(torch, arguments.dtype)
    too_slow: Failures = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape in shapes(arguments.device, arguments.quick, stages):
            wrong = dict(too_slow)
            layer = attempt(wrong, "operands", Layer, shape, arguments.device, dtype)
            for direction in ("forward", "forward+backward"):
                if layer:
                    check = (layer, TOLERANCES[arguments.dtype], wrong, direction != "forward", arguments.peers)
                    attempt(wrong, "operands", check_equal, *check, arguments.peer_seconds if cuda else 0)
                for buffers in arguments.buffers:
                    row = {"shape": asdict(shape), "pass": direction, "dtype": arguments.dtype, "threads": threads}
                    row |= ({"buffers": buffers} if cuda else {}) | {"milliseconds": {}}
                    failed = dict(wrong)
                    if layer:
                        row |= attempt(failed, "operands", time_layer, layer, row, arguments, failed) or {}
                    results.add(row, failed, describe)
            too_slow = measure.too_slow(wrong)


def time_layer(
    layer: Layer, row: dict[str, Any], arguments: argparse.Namespace, failed: Failures
) -> dict[str, dict[str, Any]]:
    """The times that belong into a row."""
    backward = row["pass"] != "forward"
    hot = row.get("buffers") == "hot"
    if row.get("buffers") == "rotated":
        copies = on_cuda.copies_needed(sum(tensor.nbytes for tensor in layer.tensors().values()))
        layers = [layer.in_other_memory() for _ in range(copies)]
        calls = on_cuda.rotating([copy.contestants(backward, arguments.peers, failed) for copy in layers])
    else:
        calls = layer.contestants(backward, arguments.peers, failed)
    return measure.interleave(
        calls, arguments.device, arguments.repeats, failed, ahead=arguments.device == "cuda", hot=hot
    )


def describe(row: dict[str, Any]) -> str:
    """One line: the shape's differences from the default, the price, and the factor over each peer."""
    shape = row["shape"]
    varied = [f"{k}={v}" for k, v in shape.items() if k in ("batch", "stride", "groups", "deform_groups") and v != 1]
    varied += [] if shape["mask"] else ["no mask"]
    times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    conv, ours = (measure.fastest(row, name) for name in ("conv", "dcn_d2"))
    names = ("torchvision", "autocast torchvision", "deformops NHWC", "onnxruntime")
    peers = ", ".join(f"{measure.quotient(times[n], ours)}x {n}" for n in names if n in times)
    label = " ".join([shape["name"], *varied])
    where = f"{row['dtype']} {row['buffers']}" if "buffers" in row else f"{row['threads']} thread(s)"
    return (
        f"{where} {row['pass']:16s} {label:24s} conv {measure.duration(conv):>8s}  "
        f"dcn_d2 {measure.duration(ours):>8s}  price {measure.quotient(ours, conv):>5s}  speed: {peers or '-'}"
    )


def measure_memory(arguments: argparse.Namespace, stages: list[Shape], results: measure.Results) -> None:
    """Peak extra memory of every contestant: on CPU with one thread, of the process; on CUDA what torch allocates.

    On CUDA a row also has what a channels_last copy of the input takes, with backward of its gradient too: "copies".
    """
    cuda = arguments.device == "cuda"
    torch.set_num_threads(1)
    dtype = on_cuda.set_precision(arguments.dtype) if cuda else torch.float32
    peak = on_cuda.peak_extra_mib if cuda else measure.peak_extra_mib
    too_slow: Failures = {}
    for shape in shapes(arguments.device, arguments.quick, stages):
        for direction in ("forward", "forward+backward"):
            failed = dict(too_slow)
            extra: dict[str, float] = {}
            layer = attempt(failed, "operands", Layer, shape, arguments.device, dtype)
            parts = (direction != "forward", arguments.peers, failed)
            calls = attempt(failed, "operands", layer.contestants, *parts) if layer else None
            for name, call in (calls or {}).items():
                if not measure.dropped(failed, name):
                    seconds = arguments.peer_seconds if cuda and measure.is_peer(name) else 0
                    extra[name] = attempt(failed, name, peak, call, seconds=seconds)
            extra = {name: mib for name, mib in extra.items() if mib is not None}
            if cuda and layer:
                extra["copies"] = round(layer.input.nbytes * (1 if direction == "forward" else 2) / 2**20, 2)
            row = {"shape": asdict(shape), "pass": direction, "threads": 1}
            row |= {"dtype": arguments.dtype if cuda else "float32", "peak_extra_mib": extra}
            results.add(row, failed, lambda row: f"{row['pass']} {row['shape']['name']} {row['peak_extra_mib']}")
            too_slow = measure.too_slow(failed)


def main(arguments: list[str] | None = None, stages: list[Shape] = STAGES) -> int:
    """Measures what the arguments say and writes the results; returns the exit status."""
    options = measure.parser(__doc__ or "", "only the three plain stage shapes", repeats=9)
    options.add_argument("--memory", action="store_true", help="measure peak extra memory instead of time")
    options.add_argument("--buffers", nargs="+", choices=on_cuda.BUFFERS, default=["hot"], help="CUDA only")
    choices = ("all", "none", *PEERS)
    options.add_argument("--peers", nargs="+", choices=choices, default=["all"], help="other implementations to time")
    options.add_argument(
        "--peer-seconds",
        type=float,
        default=20,
        help="on CUDA, how long a peer's first call may take, compilers included; default: %(default)s",
    )
    parsed = measure.parse(options, arguments)
    if parsed.device == "cpu" and parsed.buffers != ["hot"]:
        options.error("--buffers rotated: only for --device cuda")
    if len(parsed.peers) > 1 and {"all", "none"} & {*parsed.peers}:
        options.error("--peers: all or none or some names")
    parsed.peers = {"all": PEERS, "none": ()}.get(parsed.peers[0], parsed.peers)
    if parsed.check:
        print(goals.report(parsed.check))
        return 0
    if parsed.memory and parsed.device == "cpu" and os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    results = measure.Results(parsed.output, f"deform_conv2d{'_memory' if parsed.memory else ''}", parsed.device)
    (measure_memory if parsed.memory else measure_time)(parsed, stages, results)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())

# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Compares the compiled operators with another implementation, on random calls of every kind.

    python dev/campaign/operators.py --cases 50000 --output campaign.json   # about 20 minutes on one core
    python dev/campaign/operators.py --replay SEED                          # one case again, as a report names it

A case follows from its seed alone: operator, dtype, shapes, groups, geometry, how each operand lies in memory, offsets
on the borders of the map and far off it, NaN and infinite ones, which gradients are wanted, how many threads compute,
and how many Python threads call at once. Compared are values and gradients (see exact.py), dtypes, shapes, and the
strides that the fake kernels promise. The cases are shared out over the instruction sets that the processor has.

Under the sanitizers: `dev/sanitize.sh --run python dev/campaign/operators.py --cases 2000`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
if str(PROJECT) not in sys.path:
    sys.path.insert(0, str(PROJECT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import dcn_d2.ops  # noqa: E402
from dev.campaign import exact  # noqa: E402
from tests.ops.layouts import arrange, as_tuple, describe, promised  # noqa: E402

OPERATORS = ("deform_conv2d", "modulated_deform_conv2d", "deform_roi_pool", "deform_psroi_pool")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Which operand each result of the backward operators belongs to.
GRADIENTS = {
    "deform_conv2d": ("input", "offset", "weight", "mask"),
    "modulated_deform_conv2d": ("input", "offset_and_mask", "weight"),
    "deform_roi_pool": ("input", "offset", "mask"),
    "deform_psroi_pool": ("input", "offset", "mask"),
}
# Errors as a share of the magnitudes that exact.py gives: some units in the last place of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Values that float16 rounds to zero.
LEAST = {torch.float64: 1e-300, torch.float32: 1e-35, torch.float16: 1e-6, torch.bfloat16: 1e-35}
WILD = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e4, -1e4)


@dataclass
class Case:
    """One call. `values` are operands and geometry by the names of the schemas, `grad` the output's gradient."""

    seed: int
    operator: str
    dtype: torch.dtype
    values: dict[str, Any]
    needed: dict[str, bool]
    threads: int
    callers: int
    trusted: bool = True  # whether float32 computes the positions of samples exactly
    mismatches: list[str] = field(default_factory=list)
    worst: float = 0.0

    def describe(self) -> str:
        """Describes the case, for whoever reads about a failure."""
        lines = [f"seed {self.seed}: {self.operator}, {self.dtype}, {self.threads} threads, {self.callers} callers"]
        for name, value in self.values.items():
            shown = f"{list(value.shape)}, strides {value.stride()}" if isinstance(value, Tensor) else value
            lines.append(f"  {name}: {shown}")
        return "\n".join([*lines, f"  needed: {self.needed}"])


class Maker:
    """Makes the case of a seed."""

    def __init__(self, seed: int, threads: Sequence[int]) -> None:
        self.seed, self.threads = seed, threads
        self.choose = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = torch.float64

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def make(self, operator: str | None = None) -> Case:
        """The case; of another operator than its own where one is named."""
        choose = self.choose
        own = choose.choice(OPERATORS)
        operator = operator or own
        self.dtype = choose.choice(DTYPES)
        callers = choose.choice([1] * 9 + [3])
        threads = choose.choice(list(self.threads))
        trusted = True
        if "conv" in operator:
            values = self.convolution(joint=operator.startswith("modulated"))
        else:
            values, trusted = self.pooling(operator)
        half = self.dtype in (torch.float16, torch.bfloat16)
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(torch.float32 if half and name == "rois" else self.dtype)
        values = arrange(values, choose, choose.choice([None, None, None, "contiguous", "channels_last"]))
        if "offset_and_mask" in values:  # logits that repeat offsets: a modulation that is NaN makes all it meets NaN
            joint = values["offset_and_mask"]
            if bool(joint[:, joint.shape[1] // 3 * 2 :].isnan().any()):
                joint.new_empty(0).set_(joint.untyped_storage()).nan_to_num_()
        if "rois" in values:  # images must exist, whatever repeats
            assert bool(torch.isin(values["rois"][:, 0], torch.arange(values["input"].shape[0])).all())
        needed = {name: choose.random() < 0.8 for name in ("need_input", "need_offset", "need_weight")}
        return Case(self.seed, operator, self.dtype, values, needed, threads, callers, trusted)

    def offsets(self, *shape: int, spread: float | None = None) -> Tensor:
        """Multiples of 1/64, which every dtype adds to pixels without rounding: also whole ones, and wild ones."""
        spread = self.choose.choice([0.0, 0.4, 2.0, 8.0]) if spread is None else spread
        values = (self.normal(*shape) * spread * 64).round() / 64
        if self.choose.random() < 0.4:  # on pixels and on the borders of the map
            whole = torch.rand(*shape, generator=self.generator) < 0.5
            values = torch.where(whole, values.round(), values)
        if self.choose.random() < 0.3:
            wild = torch.rand(*shape, generator=self.generator) < 0.1
            values = torch.where(wild, torch.tensor(self.choose.choice(WILD), dtype=torch.float64), values)
        return values

    def convolution(self, joint: bool) -> dict[str, Any]:
        choose = self.choose
        groups, deform_groups = choose.choice([1, 1, 2, 3, 4, 8]), choose.choice([1, 1, 2, 3, 4])
        channels = groups * deform_groups * choose.choice([1, 1, 2, 4])
        out_channels = groups * choose.choice([0, 1, 1, 2, 3, 5])
        if choose.random() < 0.2:  # many small groups, which have kernels of their own
            deform_groups = choose.choice([1, 2])
            groups, width = choose.choice([(2, 8), (4, 8), (8, 4), (16, 2), (32, 1), (2, 16), (4, 4)])
            channels = out_channels = groups * width
        elif choose.random() < 0.2:  # past the widths of vectors and tiles
            groups, deform_groups = 1, 1
            channels, out_channels = choose.choice([15, 17, 31, 33, 48, 65]), choose.choice([1, 15, 33, 64, 70])
        kernel = [choose.choice([1, 2, 3, 3]) for _ in range(2)]
        stride, dilation = ([choose.choice([1, 1, 2, 3]) for _ in range(2)] for _ in range(2))
        padding = [choose.randint(0, 2) for _ in range(2)]
        least = [max(d * (k - 1) + 1 - 2 * p, 0) for d, k, p in zip(dilation, kernel, padding)]
        size = [low + choose.choice([0, 1, 2, 4, 7]) for low in least]
        batch = choose.choice([0, 1, 1, 2, 2, 3])
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(size, padding, dilation, kernel, stride)]
        taps = kernel[0] * kernel[1]
        values: dict[str, Any] = {
            "input": self.normal(batch, channels, *size),
            "weight": self.normal(out_channels, channels // groups, *kernel),
            "bias": self.normal(out_channels) if choose.random() < 0.5 else None,
            "grad": self.normal(batch, out_channels, *out),
        }
        offset = self.offsets(batch, 2 * deform_groups * taps, *out)
        mask = self.normal(batch, deform_groups * taps, *out)
        if joint:
            values["offset_and_mask"] = torch.cat([offset, mask * choose.choice([1, 10])], dim=1)
        else:
            values |= {"offset": offset, "mask": mask.sigmoid() if choose.random() < 0.6 else None}
        return values | {"stride": stride, "padding": padding, "dilation": dilation}

    def pooling(self, operator: str) -> tuple[dict[str, Any], bool]:
        choose = self.choose
        batch, height, width = choose.choice([1, 2, 3]), choose.choice([1, 3, 6, 9]), choose.choice([1, 4, 7, 12])
        classes = choose.choice([1, 1, 1, 2, 3])
        channels = classes * choose.choice([0, 1, 1, 2, 5])
        if choose.random() < 0.2:
            channels, classes = choose.choice([16, 17, 33, 40]), 1
        group_size = choose.choice([1, 1, 2, 3]) if operator == "deform_psroi_pool" and channels < 16 else 1
        # Powers of two, so that float32 computes positions without rounding; or any, and then what lies near a jump of
        # the function is left out of comparisons.
        trusted = choose.random() < 0.5
        powers = [1, 2, 4]
        output_size = [choose.choice(powers if trusted else [1, 2, 3, 5, 7]) for _ in range(2)]
        scale = choose.choice([1.0, 0.5, 0.25] if trusted else [0.3, 0.0625, 1.0])
        gamma = choose.choice([0.125, 0.5] if trusted else [0.1, 0.7])
        samples = choose.choice(powers if trusted else [1, 2, 3, 4])
        count = choose.choice([0, 1, 2, 3, 4])
        rois = torch.zeros(count, 5, dtype=torch.float64)
        adaptive = operator == "deform_roi_pool" and not trusted and choose.random() < 0.6
        for roi in rois:
            roi[0] = choose.randrange(batch)
            sizes = torch.tensor([width, height, width, height], dtype=torch.float64) / scale
            corners = (torch.rand(4, generator=self.generator, dtype=torch.float64) * 1.6 - 0.3) * sizes
            if choose.random() < 0.85:
                corners = torch.cat([corners.reshape(2, 2).amin(0), corners.reshape(2, 2).amax(0)])
            corners = (corners * 2).round() / 2 if trusted else corners
            if choose.random() < 0.1:
                corners[2:] = corners[:2]  # a point
            if choose.random() < 0.15:
                # No arithmetic says where the samples of a RoI fall that is 1e30 pixels long.
                far = [1e4, -1e4] if trusted else []
                corners[choose.randrange(4)] = choose.choice([*WILD[:3], *far])
            roi[1:] = corners
        values: dict[str, Any] = {
            "input": self.normal(batch, channels * group_size**2, height, width),
            "rois": rois,
            "mask": self.normal(count, 1, *output_size).sigmoid() if choose.random() < 0.6 else None,
            "grad": self.normal(count, channels, *output_size),
            "output_size": output_size,
            "spatial_scale": scale,
        }
        part_size = output_size
        if operator == "deform_roi_pool":
            values |= {"sampling_ratio": 0 if adaptive else samples, "gamma": gamma}
            classes = 1
        else:
            values |= {"group_size": group_size, "sample_per_part": samples, "trans_std": gamma}
            if choose.random() < 0.4:
                part_size = values["part_size"] = [choose.randint(1, 4) for _ in range(2)]
            # A RoI of the smallest size, 0.1 pixels, which floating point cannot represent.
            trusted = trusted and bool((rois[:, 3:] >= rois[:, 1:3]).all())
        offset = self.offsets(count, 2 * classes, *part_size, spread=choose.choice([0.0, 0.3, 2.0]))
        values["offset"] = offset if choose.random() < 0.8 else None
        return values, trusted


def arguments_of(operator: Any, case: Case) -> list[Any]:
    """A call's arguments in the order of the schema; those that the case does not have take the forward's defaults."""
    forward = getattr(torch.ops.dcn_d2, case.operator).default
    defaults = {a.name: a.default_value for a in forward._schema.arguments}
    given = defaults | case.values | case.needed | {"deterministic": False}
    return [given[argument.name] for argument in operator._schema.arguments]


def expected_of(case: Case) -> exact.Results:
    """Gives the results of the other implementation, for the operands after rounding to their dtype."""
    values = {
        name: value.resolve_neg().double().numpy() for name, value in case.values.items() if isinstance(value, Tensor)
    }
    geometry = {name: value for name, value in case.values.items() if value is not None and name not in values}
    with np.errstate(all="ignore"):
        if "conv" in case.operator:
            return getattr(exact, case.operator)(values, **geometry)
        if case.operator == "deform_psroi_pool":
            geometry = {"part_size": geometry["output_size"]} | geometry
        return getattr(exact, case.operator)(values, **geometry, trusted=case.trusted)


def compare(case: Case, name: str, actual: Tensor, expected: tuple[Any, Any, Any]) -> None:
    """Notes where a result differs from the exact values by more than rounding explains."""
    values, sizes, sure = expected
    found = actual.double().numpy()
    if found.shape != values.shape:
        case.mismatches.append(f"{name} has shape {found.shape}, not {values.shape}")
        return
    error = np.abs(found - values)
    allowed = TOLERANCE[case.dtype] * sizes + LEAST[case.dtype] * (1 + sizes)
    share = np.where(np.isfinite(error), error / allowed, np.inf)
    # Values that are too large for the dtype may be infinite.
    most = torch.finfo(case.dtype).max
    share = np.where((np.abs(values) + allowed >= most) & (found * np.sign(values) >= 0.9 * most), 0, share)
    if sure is not None:
        share = np.where(sure, share, 0)
    if not share.size:
        return
    worst = np.unravel_index(int(share.argmax()), share.shape)
    case.worst = max(case.worst, float(share[worst]))
    if share[worst] > 1:
        case.mismatches.append(
            f"{name}[{', '.join(map(str, worst))}] is {found[worst]}, not {values[worst]}; "
            f"rounding explains {allowed[worst]:.1e}"
        )


Run = Callable[[Any, list[Any]], Any]


def call(operator: Any, arguments: list[Any]) -> Any:
    """Runs an operator. The campaign calls operators only here, so that tests can replace one by a wrong one."""
    return operator(*arguments)


def check(case: Case, run: Run = call) -> Case:
    """Runs a case and notes its mismatches."""
    forward = getattr(torch.ops.dcn_d2, case.operator).default
    backward = getattr(torch.ops.dcn_d2, f"{case.operator}_backward").default
    expected = expected_of(case)
    torch.set_num_threads(case.threads)
    try:
        for operator in (forward, backward):
            arguments = arguments_of(operator, case)
            results = as_tuple(run(operator, arguments))
            for result, (shape, strides, dtype) in zip(results, promised(operator, arguments)):
                if describe(result) != (shape, strides, dtype):
                    case.mismatches.append(f"{operator}: {describe(result)}, but promised was {shape, strides, dtype}")
            names = ["output"] if operator is forward else list(GRADIENTS[case.operator])
            for name, result in zip(names, results):
                wanted = operator is forward or case.needed[f"need_{NEED.get(name, name)}"]
                if wanted and case.values.get(name, True) is not None:
                    compare(case, name, result, expected[name])
                elif result.numel():
                    case.mismatches.append(f"{name} was not wanted, but has {list(result.shape)}")
            if case.callers > 1:
                compare_callers(case, operator, arguments, results, run)
        if case.seed % 8 == 0:
            compare_autograd(case, expected)
    except Exception as error:  # whatever it is, the campaign goes on and reports it
        case.mismatches.append(f"{type(error).__name__}: {error}")
    return case


# The gradient by a mask comes with the offset's.
NEED = {"mask": "offset", "offset_and_mask": "offset"}


def compare_autograd(case: Case, expected: exact.Results) -> None:
    """The public function, differentiated by autograd, gives the same values."""
    operands = {
        name: value.detach().requires_grad_(name != "rois") if isinstance(value, Tensor) else value
        for name, value in case.values.items()
        if name != "grad"
    }
    leaves = {name: value for name, value in operands.items() if isinstance(value, Tensor) and value.requires_grad}
    output = getattr(dcn_d2.ops, case.operator)(**operands)
    compare(case, "output", output.detach(), expected["output"])
    gradients = torch.autograd.grad(output, list(leaves.values()), case.values["grad"])
    for name, gradient in zip(leaves, gradients):
        compare(case, name, gradient, expected[name])


def compare_callers(case: Case, operator: Any, arguments: list[Any], results: Sequence[Tensor], run: Run) -> None:
    """Several Python threads at once must get the same bits as one."""

    def again(_: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(case.threads)  # it holds for the thread that sets it
        return as_tuple(run(operator, arguments))

    with concurrent.futures.ThreadPoolExecutor(case.callers) as pool:
        for others in pool.map(again, range(case.callers)):
            if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results, others)):
                case.mismatches.append(f"{operator}: {case.callers} Python threads at once got other bits than one")


def run_cases(
    seeds: Sequence[int],
    operators: Sequence[str] = OPERATORS,
    threads: Sequence[int] = (1, 2, 5),
    seconds: float = float("inf"),
    run: Run = call,
) -> dict[str, Any]:
    """Checks the cases of these seeds in this process. Gives a summary, ready for JSON."""
    begin, before = time.monotonic(), torch.get_num_threads()
    done: dict[str, dict[str, dict[str, Any]]] = {}
    findings: list[dict[str, Any]] = []
    capability = os.environ.get("DCN_CPU_CAPABILITY", "best")
    try:
        for index, seed in enumerate(seeds):
            if time.monotonic() - begin > seconds:
                break
            case = Maker(seed, threads).make(
                None if len(operators) == len(OPERATORS) else operators[index % len(operators)]
            )
            check(case, run)
            entry = done.setdefault(case.operator, {}).setdefault(str(case.dtype).removeprefix("torch."), {})
            entry["cases"] = entry.get("cases", 0) + 1
            entry["worst_error"] = max(entry.get("worst_error", 0.0), case.worst * TOLERANCE[case.dtype])
            if case.mismatches:
                replay = ["--replay", str(seed), "--capabilities", capability]
                replay += [] if len(operators) == len(OPERATORS) else ["--operators", case.operator]
                findings.append(
                    {
                        "what": "; ".join(case.mismatches),
                        "case": case.describe(),
                        "seed": seed,
                        "capability": capability,
                        "replay": f"python dev/campaign/operators.py {' '.join(replay)}",
                    }
                )
                print("\n  ".join([case.describe(), *case.mismatches, findings[-1]["replay"]]), flush=True)
    finally:
        torch.set_num_threads(before)
    return {"results": {capability: done}, "findings": findings, "seconds": round(time.monotonic() - begin, 1)}


def capabilities_of_processor() -> list[str]:
    """Gives the instruction sets of this processor that have kernels, by their names in DCN_CPU_CAPABILITY."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ["default"]
    wanted = {"default": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw"}, "amx": {"amx_bf16"}}
    return [name for name, needs in wanted.items() if needs <= flags]


def run_under(capability: str, seeds: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs cases in a new process, because the kernels choose the instruction set only once."""
    environment = os.environ | ({} if capability == "best" else {"DCN_CPU_CAPABILITY": capability})
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "part.json"
        command = [sys.executable, str(Path(__file__)), "--seeds", seeds, "--output", str(output)]
        command += ["--operators", *arguments.operators, "--threads", *map(str, arguments.threads)]
        result = subprocess.run([*command, "--seconds", str(seconds)], env=environment, check=False)
        if not output.exists():
            # A crash, or the report of a sanitizer, which has been printed above.
            what = f"with {capability}, the process ended with {result.returncode}"
            return {"results": {}, "findings": [{"what": what, "replay": shlex.join(command)}], "seconds": 0.0}
        return json.loads(output.read_text())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="in all, shared out over the instruction sets")
    parser.add_argument("--seed", type=int, default=0, help="of the campaign: case i has the seed SEED * 10^9 + i")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that time, whatever is left")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 5], help="numbers of threads to choose from")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument(
        "--capabilities", nargs="+", default=None, help="instruction sets; default: all that this processor has"
    )
    parser.add_argument("--replay", type=int, help="run the case of this seed again, and show it")
    parser.add_argument("--output", type=Path, help="where the summary goes, as JSON")
    parser.add_argument("--seeds", help=argparse.SUPPRESS)  # FIRST:END:STEP, of one part
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign; gives 1 where anything was found, else 0."""
    arguments = parse(argv)
    if arguments.seeds:
        seeds = range(*map(int, arguments.seeds.split(":")))
        summary = run_cases(seeds, arguments.operators, arguments.threads, arguments.seconds)
        arguments.output.write_text(json.dumps(summary))
        return 1 if summary["findings"] else 0
    named = os.environ.get("DCN_CPU_CAPABILITY")
    capabilities = arguments.capabilities or ([named] if named else capabilities_of_processor())
    first = arguments.replay if arguments.replay is not None else arguments.seed * 10**9
    end = first + (1 if arguments.replay is not None else arguments.cases)
    if arguments.replay is not None:
        operator = arguments.operators[0] if len(arguments.operators) == 1 else None
        print(Maker(first, arguments.threads).make(operator).describe())
    summary = {"results": {}, "findings": [], "seconds": 0.0}
    for index, capability in enumerate(capabilities):
        # A replayed case runs on each instruction set; other cases are divided among them.
        begin, step = (first, 1) if arguments.replay is not None else (first + index, len(capabilities))
        part = run_under(capability, f"{begin}:{end}:{step}", arguments, arguments.seconds / len(capabilities))
        summary["results"] |= part["results"]
        summary["findings"] += part["findings"]
        summary["seconds"] = round(summary["seconds"] + part["seconds"], 1)
    cases = sum(e["cases"] for c in summary["results"].values() for o in c.values() for e in o.values())
    summary |= {"cases": cases, "seed": arguments.seed, "torch": torch.__version__}
    summary["library"] = os.environ.get("DCN_LIBRARY", "dcn_d2._C")
    if arguments.output:
        arguments.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{cases} cases in {summary['seconds']} s on {', '.join(capabilities)}: {len(summary['findings'])} findings")
    return 1 if summary["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())

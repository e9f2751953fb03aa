# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Fills the generated sections of the root README.md: the zoo table from configs/, numbers from results/.

    python dev/readme.py            rewrites them
    python dev/readme.py --check    says which are out of date, and fails if any is

A section stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import fastest

PROJECT = Path(__file__).resolve().parent.parent
README = PROJECT.parent.parent / "README.md"
SECTION = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def zoo() -> str:
    """One line for each row of the zoo, from the PUBLISHED node of its YAML."""
    from dcn_d2 import model_zoo

    rows = []
    for name in model_zoo.list_models():
        published = model_zoo.get_published(name)
        config = f"[{name}](projects/DeformableConvNets/configs/{name}.yaml)"
        links = ", ".join(
            f"[{label}]({published[key]})"
            for key, label in (("WEIGHTS", "weights"), ("LOG", "log"))
            if key in published
        )
        rows.append([config, *(str(published.get(key, "")) for key in ("BOX_AP", "MASK_AP")), links])
    return table(["row", "box AP", "mask AP", "published"], rows)


def performance(results: Path = PROJECT / "results") -> str:
    """The tables of all benchmarks, one for each device that was measured; nothing where there are no results."""
    benchmarks = {
        "deform_conv2d": (performance_table, CONVOLUTION),
        "deform_conv2d_memory": (memory_table, MEMORY),
        "deform_roi_pool": (roi_pool_table, ROI_POOLING),
        "detector": (detector_table, DETECTOR),
    }
    parts = []
    for name, (make, introduction) in benchmarks.items():
        # A file may say after the device what else is special about it, such as its dtype.
        files = [path for device in ("cpu", "cuda") for path in sorted(results.glob(f"{name}_{device}*.json"))]
        tables = [make(path) for path in files if name != "deform_conv2d" or "_cuda" not in path.name]
        if name == "deform_conv2d" and (of_gpu := [path for path in files if "_cuda" in path.name]):
            tables += [GPU_CONVOLUTION, gpu_convolution_table(of_gpu)]
        parts += [introduction, *tables] if files else []
    return "\n\n".join([SPEED, *parts]) if parts else ""


SPEED = (
    "## Speed\n\n"
    "All numbers are medians. Other shapes, both memory formats and the spread are in the files that the tables name; "
    "[benchmarks](projects/DeformableConvNets/benchmarks) measures them again."
)
CONVOLUTION = (
    "Milliseconds of one 3x3 layer of a ResNet-50 at 800 x 1216 (batch 1, modulated, one deform group), each "
    "implementation in its faster memory format. The price is the time of dcn_d2 over that of the plain convolution. "
    "torchvision has no bfloat16 kernel: there it computes in float32."
)
GPU_CONVOLUTION = (
    "The same layers on a GPU, in microseconds: cuDNN's plain convolution / dcn_d2, and the price in brackets. "
    "Operands are in the cache from the call before, where they fit. tf32 is float32 with torch's default "
    "`torch.backends.cudnn.allow_tf32 = True`; without it, sums are as exact as those of float32. The last column is "
    "torchvision's operator under `torch.autocast` with bfloat16."
)
MEMORY = "Mebibytes that the same layers need at most, on top of their inputs and outputs, in the memory format named."
ROI_POOLING = (
    "Milliseconds to pool 512 RoIs into 7 x 7 bins of 2 x 2 samples (256 channels, batch 1), each operator in its "
    "faster memory format, beside torchvision's `roi_align`, which moves no bins. The factor is that of "
    "`deform_roi_pool` with offsets and mask over `roi_align`."
)
DETECTOR = (
    "Milliseconds of a Faster R-CNN R-50-FPN at 800 x 1216 (batch 1, random weights), without and with modulated "
    "deformable convolutions in c3 to c5, each in its faster memory format. The trunk is the ResNet alone."
)
# The layers of the tables above.
USUAL = {"stride": 1, "groups": 1, "deform_groups": 1, "mask": True}


def usual_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result file that its table shows: one image on a CPU, batches on a GPU."""
    batches = (2, 16) if document.get("device") == "cuda" else (1,)
    rows = [row for row in document["rows"] if USUAL.items() <= row["shape"].items()]
    return [row for row in rows if row["shape"]["batch"] in batches and row.get("buffers", "hot") == "hot"]


def performance_table(path: Path) -> str:
    """The default shapes of one result file of benchmarks/deform_conv2d.py."""
    document = json.loads(path.read_text())
    lines = []
    for row in sorted(usual_rows(document), key=lambda row: row["threads"]):
        ours, plain, *peers = (fastest(row, name) for name in ("dcn_d2", "conv", "torchvision", "onnxruntime"))
        times = [plain, ours, quotient(ours, plain), *peers]
        lines.append([layer(row["shape"]), row["pass"], str(row["threads"]), *numbers(*times)])
    header = ["layer", "pass", "threads", "plain convolution", "dcn_d2", "price", "torchvision", "ONNX Runtime"]
    return f"{caption(path, document)}\n\n{table(header, lines)}"


def gpu_convolution_table(paths: list[Path]) -> str:
    """The default shapes of all dtypes that benchmarks/deform_conv2d.py has measured on a GPU, in one table."""
    documents = [json.loads(path.read_text()) for path in paths]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in (row for document in documents for row in usual_rows(document)):
        line = cells.setdefault((layer(row["shape"]), row["pass"]), {})
        plain, ours, theirs = (fastest(row, name) for name in ("conv", "dcn_d2", "autocast"))
        if plain and ours:
            line[row["dtype"]] = f"{plain * 1e3:.0f} / {ours * 1e3:.0f} ({ours / plain:.2f})"
        if theirs and row["dtype"] == "bfloat16":
            line["torchvision"] = f"{theirs * 1e3:.0f}"
    dtypes = [dtype for dtype in ("bfloat16", "float16", "tf32", "float32") if any(dtype in c for c in cells.values())]
    columns = [*dtypes, "torchvision"]
    lines = [[*place, *(line.get(column, "") for column in columns)] for place, line in cells.items()]
    origins: dict[str, list[str]] = {}
    for path, document in zip(paths, documents):
        origins.setdefault(origin(document, ""), []).append(link(path))
    captions = [f"{words} ({', '.join(links)}):" for words, links in origins.items()]
    return "\n\n".join([*captions, table(["layer", "pass", *columns], lines)])


def memory_table(path: Path) -> str:
    """The default shapes of `benchmarks/deform_conv2d.py --memory`."""
    document = json.loads(path.read_text())
    names = ["conv NCHW", "conv NHWC", "dcn_d2 NCHW", "dcn_d2 NHWC", "torchvision", "onnxruntime"]
    lines = [
        [layer(row["shape"]), row["pass"], *numbers(*(row["peak_extra_mib"].get(name) for name in names))]
        for row in usual_rows(document)
    ]
    plain, ours = (f"{what}, channels_last" for what in ("plain convolution", "dcn_d2"))
    header = ["layer", "pass", "plain convolution, NCHW", plain, "dcn_d2, NCHW", ours, "torchvision", "ONNX Runtime"]
    return f"{caption(path, document)}\n\n{table(header, lines)}"


def layer(shape: dict[str, Any]) -> str:
    """A row's first cell: the layer's name and sizes."""
    batch = "" if shape["batch"] == 1 else f", batch {shape['batch']}"
    return f"{shape['name']}: {shape['channels']} x {shape['height']} x {shape['width']}{batch}"


def roi_pool_table(path: Path) -> str:
    """The rows of benchmarks/deform_roi_pool.py with 2 x 2 samples a bin."""
    document = json.loads(path.read_text())
    lines = []
    for row in sorted(document["rows"], key=lambda row: row["threads"]):
        shape = row["shape"]
        if shape["sampling"] == 2:
            align, *ours = (fastest(row, name) for name in ("roi_align", "plain", "deformable", "modulated", "psroi"))
            level = f"{shape['name']}: {shape['height']} x {shape['width']}"
            lines.append([level, row["pass"], str(row["threads"]), *numbers(align, *ours, quotient(align, ours[2]))])
    modes = ["`deform_roi_pool`, plain", "deformable", "modulated", "`deform_psroi_pool`"]
    header = ["map", "pass", "threads", "`roi_align`", *modes, "factor"]
    return f"{caption(path, document)}\n\n{table(header, lines)}"


def detector_table(path: Path) -> str:
    """The rows of benchmarks/detector.py."""
    document = json.loads(path.read_text())
    lines = []
    for row in sorted(document["rows"], key=lambda row: row["threads"]):
        plain, ours, theirs = (fastest(row, name) for name in ("plain", "dcn_d2", "torchvision"))
        part = row["pass"] if row["dtype"] == document["rows"][0]["dtype"] else f"{row['pass']}, {row['dtype']}"
        lines.append([part, str(row["threads"]), *numbers(plain, ours, quotient(ours, plain), theirs)])
    header = ["part", "threads", "plain", "dcn_d2", "price", "with torchvision's operator"]
    return f"{caption(path, document)}\n\n{table(header, lines)}"


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """Of two times; None if one of the two took no part."""
    return numerator / denominator if numerator and denominator else None


def numbers(*values: float | None) -> list[str]:
    """Three significant digits each, empty where there is no value; never in powers of ten."""
    return ["" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in values]


def caption(path: Path, document: dict[str, Any]) -> str:
    """What stands above the table of one result file."""
    return f"{origin(document, document['rows'][0]['dtype'] + ', ')} ({link(path)}):"


def origin(document: dict[str, Any], dtype: str) -> str:
    """Where, with what and when the numbers of a result file were measured."""
    environment = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = environment["commit"] + (" with changes" if environment["uncommitted_changes"] else "")
    return f"{environment['device']}, {dtype}{versions}, commit {commit}, {environment['date']}"


def link(path: Path) -> str:
    """A link to a result file."""
    return f"[{path.name}](projects/DeformableConvNets/results/{path.name})"


SECTIONS: dict[str, Callable[[], str]] = {"performance": performance, "zoo": zoo}


def fill(text: str) -> str:
    """Returns the README with all generated sections as they should be."""
    names = [match["name"] for match in SECTION.finditer(text)]
    markers = re.findall(r"<!-- (?:generated|end): ([\w-]+) -->", text)
    if sorted(markers) != sorted(names * 2) or not set(names) <= set(SECTIONS):
        raise ValueError(f"README.md's markers do not pair up or are not one of {', '.join(SECTIONS)}: {markers}")
    return SECTION.sub(lambda match: match[1] + f"{SECTIONS[match['name']]()}\n".lstrip() + match[3], text)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Fill the generated sections of README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the README is out of date")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="the file to fill")
    args = parser.parse_args(arguments)
    before = args.readme.read_text()
    after = fill(before)
    if not args.check:
        args.readme.write_text(after)
    elif before != after:
        sys.stdout.writelines(difflib.unified_diff(before.splitlines(True), after.splitlines(True), "README.md", "new"))
        print(f"{args.readme} is out of date. Run: python projects/DeformableConvNets/dev/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

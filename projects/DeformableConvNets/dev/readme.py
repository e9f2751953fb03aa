# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Fills the generated sections of README.md and docs/*.md: the zoo's tables from configs/, numbers from results/.

    python dev/readme.py            rewrites them
    python dev/readme.py --check    says which are out of date, and fails if any is

A section stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import fastest

ROOT = Path(__file__).resolve().parents[3]
LINKS = "projects/DeformableConvNets/results"  # as a file in the root names it
RESULTS = ROOT / LINKS
SECTION = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def zoo(section: str) -> str:
    """The README's table of the zoo, the addresses that its links refer to, or the table with all files."""
    from dcn_d2 import model_zoo

    rows, details, addresses = [], [], []
    for name in model_zoo.list_models():
        published = model_zoo.get_published(name)
        aps = [str(published.get(key, "")) for key in ("BOX_AP", "MASK_AP")]
        labels = {"WEIGHTS": "weights", "LOG": "log"}
        links = [f"[config](projects/DeformableConvNets/configs/{name}.yaml)"]
        links += [f"[{label}]({published[key]})" for key, label in labels.items() if key in published]
        rows.append([f"`{name}`", *aps, f"[weights][{name}]" if "WEIGHTS" in published else ""])
        details.append([f"`{name}`", *aps, ", ".join(links)])
        addresses += [f"[{name}]: {published['WEIGHTS']}"] if "WEIGHTS" in published else []
    if section == "zoo-addresses":
        return "\n".join(addresses)
    heads = ["row", "box AP", "mask AP"]
    return table([*heads, "files"], details) if section == "zoo-details" else table([*heads, "weights"], rows)


def headline(results: Path = RESULTS) -> str:
    """What a detector pays for deformable layers, with our operator and with torchvision's."""
    (plain, ours, theirs), _ = detector_times(results / "detector_cpu.json")
    gpu, device = detector_times(results / "detector_cuda_float16.json")
    return (
        f"**On a CPU, a Faster R-CNN R-50 with deformable convolutions takes {ours / plain:.2f} times as long as the "
        f"plain one; with torchvision's operator it takes {theirs / plain:.2f} times as long.** On an {device} in "
        f"float16 the two numbers are {gpu[1] / gpu[0]:.2f} and {gpu[2] / gpu[0]:.2f} "
        "([all measurements](docs/performance.md))."
    )


def speed(results: Path = RESULTS) -> str:
    """The README's table: a layer and a detector, on as many threads of the CPU as were measured."""
    document = json.loads((results / "deform_conv2d_cpu.json").read_text())
    threads = max(row["threads"] for row in document["rows"])
    rows = [row for row in usual_rows(document) if row["threads"] == threads and row["shape"]["name"] == "c3"]
    cells = [(f"3x3 layer c3, {row['pass']}", times(row, "conv", "dcn_d2", "torchvision")) for row in rows]
    cells.append(("Faster R-CNN R-50, inference", detector_times(results / "detector_cpu.json")[0]))
    lines = [[what, *numbers(plain, ours, ours / plain, theirs)] for what, (plain, ours, theirs) in cells]
    header = ["milliseconds", "plain convolutions", "dcn_d2", "price", "with torchvision's operator"]
    return f"{document['environment']['device']}, float32, {threads} threads:\n\n{table(header, lines)}"


def gpu(results: Path = RESULTS) -> str:
    """How a layer on a GPU compares with the plain convolution and with torchvision's operator."""
    half, device = layer_times(results / "deform_conv2d_cuda_bfloat16.json", "autocast")
    full, _ = layer_times(results / "deform_conv2d_cuda_float32.json", "torchvision")
    gains, prices = zip(*((theirs / ours, ours / plain) for plain, ours, theirs in half))
    strict = [ours / theirs for _, ours, theirs in full]
    gain, price, slowness = (f"{min(found):.2g} to {max(found):.2g}" for found in (gains, prices, strict))
    return (
        f"On an {device} in bfloat16, a deformable layer is {gain} times as fast as with torchvision's operator, but "
        f"takes {price} times as long as cuDNN's plain convolution. In strict float32 "
        f"(`torch.backends.cudnn.allow_tf32 = False`) it takes {slowness} times as long as with torchvision's operator."
    )


def layer_times(path: Path, peer: str) -> tuple[list[list[Any]], str]:
    """Times of the plain convolution, ours and a peer's, for each row of a GPU's table; and the device."""
    document = json.loads(path.read_text())
    return [times(row, "conv", "dcn_d2", peer) for row in usual_rows(document)], document["environment"]["device"]


def detector_times(path: Path) -> tuple[list[Any], str]:
    """Times of the plain detector, ours and the one with torchvision's operator, on most threads; and the device."""
    document = json.loads(path.read_text())
    rows = [row for row in document["rows"] if row["pass"] == "inference"]
    row = max(rows, key=lambda row: row["threads"])
    return times(row, "plain", "dcn_d2", "torchvision"), document["environment"]["device"]


def times(row: dict[str, Any], *names: str) -> list[Any]:
    """The median of each contestant in its faster memory format."""
    return [fastest(row, name) for name in names]


def performance(results: Path = RESULTS) -> str:
    """The tables of all benchmarks; nothing where there are no results."""
    return "\n\n".join(filter(None, (make(results) for make in TABLES.values())))


def tables(results: Path, pattern: str, make: Callable[[Path], str]) -> str:
    """The tables of all result files whose names match, one for each device and dtype."""
    return "\n\n".join(make(path) for path in sorted(results.glob(pattern)))


# The layers that the tables show.
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


def gpu_convolution_table(results: Path) -> str:
    """The default shapes of all dtypes that benchmarks/deform_conv2d.py has measured on a GPU, in one table."""
    paths = sorted(results.glob("deform_conv2d_cuda*.json"))
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
        origins.setdefault(origin(document, ""), []).append(f"[{path.name}]({LINKS}/{path.name})")
    captions = [f"{words} ({', '.join(links)}):" for words, links in origins.items()]
    return "\n\n".join([*captions, table(["layer", "pass", *columns], lines)]) if paths else ""


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


def export_table(results: Path) -> str:
    """How much exported rows differ from their models, by the result file of benchmarks/export_rows.py."""
    path = results / "export.json"
    if not path.exists():
        return ""
    document = json.loads(path.read_text())
    lines = []
    for row in document["rows"]:
        cells = [f"`{row['row']}`"]
        for found in row["formats"].values():
            cells += export_cells(found) if found else ["failed", "", "", ""]
        lines.append(cells)
    formats = [name for name in document["rows"][0]["formats"]]
    titles = {"onnx": "ONNX", "openvino": "OpenVINO", "torchscript": "TorchScript"}
    columns = ("matched", "boxes, px", "scores", "mask pixels")
    header = ["row", *(f"{titles.get(name, name)}: {column}" for name in formats for column in columns)]
    return f"{origin(document, '')} ([{path.name}]({LINKS}/{path.name})):\n\n{table(header, lines)}"


def export_cells(found: dict[str, Any]) -> list[str]:
    """One format's part of a row of the table of exports."""
    mask = f"{found['mask']:.4%}" if "mask" in found else ""
    return [f"{found['matched']} of {found['expected']}", f"{found['box']:.1e}", f"{found['score']:.1e}", mask]


def quotient(numerator: float | None, denominator: float | None) -> float | None:
    """Of two times; None if one of the two took no part."""
    return numerator / denominator if numerator and denominator else None


def numbers(*values: float | None) -> list[str]:
    """Three significant digits each, empty where there is no value; never in powers of ten."""
    return ["" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in values]


def caption(path: Path, document: dict[str, Any]) -> str:
    """What stands above the table of one result file."""
    return f"{origin(document, document['rows'][0]['dtype'] + ', ')} ([{path.name}]({LINKS}/{path.name})):"


def origin(document: dict[str, Any], dtype: str) -> str:
    """Where, with what and when the numbers of a result file were measured."""
    environment = document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = environment["commit"] + (" with changes" if environment["uncommitted_changes"] else "")
    return f"{environment['device']}, {dtype}{versions}, commit {commit}, {environment['date']}"


# The sections of docs/performance.md, in its order.
TABLES: dict[str, Callable[[Path], str]] = {
    "layers-cpu": lambda results: tables(results, "deform_conv2d_cpu*.json", performance_table),
    "layers-gpu": gpu_convolution_table,
    "memory": lambda results: tables(results, "deform_conv2d_memory_*.json", memory_table),
    "roi-pooling": lambda results: tables(results, "deform_roi_pool_*.json", roi_pool_table),
    "detector": lambda results: tables(results, "detector_*.json", detector_table),
}
SECTIONS: dict[str, Callable[[], str]] = {
    "export": functools.partial(export_table, RESULTS),
    "gpu": gpu,
    "headline": headline,
    "speed": speed,
    **{name: functools.partial(zoo, name) for name in ("zoo", "zoo-addresses", "zoo-details")},
    **{name: functools.partial(make, RESULTS) for name, make in TABLES.items()},
}


def fill(text: str, path: Path) -> str:
    """Returns the text of the document at `path` with all its generated sections as they should be."""
    names = [match["name"] for match in SECTION.finditer(text)]
    markers = re.findall(r"<!-- (?:generated|end): ([\w-]+) -->", text)
    if sorted(markers) != sorted(names * 2) or not set(names) <= set(SECTIONS):
        raise ValueError(f"{path}: the markers do not pair up or are not one of {', '.join(SECTIONS)}: {markers}")

    def section(match: re.Match[str]) -> str:
        content = SECTIONS[match["name"]]()
        if not re.search(r"[|\n]", content):  # a sentence
            content = textwrap.fill(content, 120, break_long_words=False, break_on_hyphens=False)
        if path.resolve().parent == ROOT / "docs":  # links are written for a file in the root
            content = re.sub(r"\]\((?=projects/)", "](../", content)
        return match[1] + f"{content}\n".lstrip() + match[3]

    return SECTION.sub(section, text)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Fill the generated sections of README.md and docs/*.md.")
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a file is out of date")
    parser.add_argument("files", nargs="*", type=Path, help="the files to fill; by default all")
    args = parser.parse_args(arguments)
    status = 0
    for path in args.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text()
        after = fill(before, path)
        if not args.check:
            path.write_text(after)
        elif before != after:
            status = 1
            sys.stdout.writelines(
                difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(path), "new")
            )
            print(f"{path} is out of date. Run: python projects/DeformableConvNets/dev/readme.py")
    return status


if __name__ == "__main__":
    sys.exit(main())

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
    """The price of deformability, one table for each device that was measured; nothing where there are no results."""
    files = [results / f"deform_conv2d_{device}.json" for device in ("cpu", "cuda")]
    tables = [performance_table(path) for path in files if path.exists()]
    if not tables:
        return ""
    introduction = (
        "## Speed\n\n"
        "Median milliseconds of one 3x3 layer of a ResNet-50 at 800 x 1216 (batch 1, modulated, one deform group), "
        "each implementation in its faster memory format. The price is the time of dcn_d2 over that of the plain "
        "convolution. Other shapes and the spread are in the files; "
        "[benchmarks](projects/DeformableConvNets/benchmarks) measures them again."
    )
    return "\n\n".join([introduction, *tables])


def performance_table(path: Path) -> str:
    """The default shapes of one result file of benchmarks/deform_conv2d.py."""
    document = json.loads(path.read_text())
    environment = document["environment"]
    usual = {"batch": 1, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    rows = [row for row in document["rows"] if usual.items() <= row["shape"].items()]
    lines = []
    for row in sorted(rows, key=lambda row: row["threads"]):
        ours, plain, *peers = (fastest(row, name) for name in ("dcn_d2", "conv", "torchvision", "onnxruntime"))
        times = [plain, ours, ours / plain, *peers]
        shape = row["shape"]
        layer = f"{shape['name']}: {shape['channels']} x {shape['height']} x {shape['width']}"
        lines.append([layer, row["pass"], str(row["threads"]), *("" if t is None else f"{t:.3g}" for t in times)])
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = environment["commit"] + (" with changes" if environment["uncommitted_changes"] else "")
    caption = (
        f"{environment['device']}, {rows[0]['dtype']}, {versions}, commit {commit}, {environment['date']} "
        f"([{path.name}](projects/DeformableConvNets/results/{path.name})):"
    )
    header = ["layer", "pass", "threads", "plain convolution", "dcn_d2", "price", "torchvision", "ONNX Runtime"]
    return f"{caption}\n\n{table(header, lines)}"


def fastest(row: dict[str, Any], name: str) -> Any:
    """The median of a contestant in its faster memory format, or None if it did not take part."""
    medians = [t["median"] for contestant, t in row["milliseconds"].items() if contestant.split()[0] == name]
    return min(medians, default=None)


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

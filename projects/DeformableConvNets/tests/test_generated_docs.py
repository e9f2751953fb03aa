# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The generated sections of the documents: they are up to date, and come from configs/ and results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dev import readme


def test_readme_tables_are_in_sync(repository: Path) -> None:
    assert readme.main(["--check"]) == 0


def test_every_section_stands_in_a_document(repository: Path) -> None:
    texts = [path.read_text() for path in (repository / "README.md", *(repository / "docs").glob("*.md"))]
    assert not [name for name in readme.SECTIONS if not any(f"<!-- generated: {name} -->" in text for text in texts)]


def test_readme_check_notices_a_changed_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "README.md"
    copy.write_text("before\n<!-- generated: zoo -->\n| 99.9 |\n<!-- end: zoo -->\nafter\n")
    assert readme.main(["--check", str(copy)]) == 1
    assert "-| 99.9 |" in capsys.readouterr().out
    assert readme.main([str(copy)]) == 0
    assert readme.main(["--check", str(copy)]) == 0
    assert copy.read_text().startswith("before\n") and copy.read_text().endswith("after\n")


@pytest.mark.parametrize(
    "text", ["<!-- generated: zoo -->\n", "<!-- generated: nonsense -->\n<!-- end: nonsense -->\n"]
)
def test_readme_with_broken_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        readme.fill(text, Path("README.md"))


def test_readme_speed_comes_from_result_files(tmp_path: Path) -> None:
    assert readme.performance(tmp_path) == ""
    times = {"conv NCHW": 4.0, "conv NHWC": 2.0, "dcn_d2 NCHW": 3.0, "dcn_d2 NHWC": 5.0, "torchvision": 24.0}
    shape = {"name": "c3", "channels": 128, "height": 100, "width": 152}
    shape |= {"batch": 1, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    row = {"pass": "forward", "dtype": "float32", "threads": 1, "shape": shape}
    row |= {"milliseconds": {name: {"median": time} for name, time in times.items()}}
    environment = {"device": "Some CPU", "versions": {"torch": "2.14.1"}, "commit": "abc", "date": "2026-01-02"}
    document = {
        "environment": environment | {"uncommitted_changes": False},
        "rows": [row, row | {"shape": shape | {"stride": 2}}],
    }
    (tmp_path / "deform_conv2d_cpu.json").write_text(json.dumps(document))
    text = readme.performance(tmp_path)
    assert "Some CPU, float32, torch 2.14.1, commit abc, 2026-01-02" in text
    assert text.splitlines()[-1] == "| c3: 128 x 100 x 152 | forward | 1 | 2 | 3 | 1.5 | 24 |"
    assert text.count("| c3") == 1


def test_readme_shows_all_dtypes_of_a_gpu_in_one_table_with_gaps(tmp_path: Path) -> None:
    shape = {"name": "c3", "channels": 128, "height": 100, "width": 152}
    shape |= {"batch": 2, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    row: dict[str, Any] = {"pass": "forward", "threads": 1, "buffers": "hot", "shape": shape}
    times = {"conv NHWC": {"median": 0.02}, "dcn_d2 NHWC": {"median": 0.05}, "autocast torchvision": {"median": 0.8}}
    environment = {"device": "Some GPU", "versions": {}, "commit": "abc", "date": "2026-01-02"}
    head = {"device": "cuda", "environment": environment | {"uncommitted_changes": None}}
    for dtype, milliseconds in (("tf32", times), ("bfloat16", times), ("float32", {"dcn_d2 NHWC": {"median": 0.4}})):
        rows = [row | {"dtype": dtype, "milliseconds": milliseconds}]
        rows.append(rows[0] | {"buffers": "rotated", "milliseconds": {}})
        rows.append(rows[0] | {"shape": shape | {"batch": 1}})
        (tmp_path / f"deform_conv2d_cuda_{dtype}.json").write_text(json.dumps(head | {"rows": rows}))
    lines = readme.performance(tmp_path).splitlines()
    assert lines[-3] == "| layer | pass | bfloat16 | tf32 | torchvision |"
    cell = "20 / 50 (2.50)"
    assert lines[-1] == f"| c3: 128 x 100 x 152, batch 2 | forward | {cell} | {cell} | 800 |"
    (caption,) = [line for line in lines if "Some GPU" in line]  # one for all files
    assert all(f"[deform_conv2d_cuda_{dtype}.json]" in caption for dtype in ("bfloat16", "float32", "tf32"))


def test_sentences_with_numbers_come_from_result_files(tmp_path: Path) -> None:
    def write(name: str, device: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text(json.dumps({"environment": {"device": device}, "device": device, "rows": rows}))

    def row(direction: str, threads: int, **medians: float) -> dict[str, Any]:
        shape = {"name": "c3", "batch": 1, **readme.USUAL}
        times = {name.replace("_NHWC", " NHWC"): {"median": median} for name, median in medians.items()}
        return {"pass": direction, "threads": threads, "shape": shape, "milliseconds": times}

    slow = row("inference", 1, plain_NHWC=1, dcn_d2_NHWC=9, torchvision=9)
    write(
        "detector_cpu.json", "Some CPU", [slow, row("inference", 2, plain_NHWC=100, dcn_d2_NHWC=150, torchvision=275)]
    )
    write(
        "detector_cuda_float16.json", "NVIDIA X", [row("inference", 1, plain_NHWC=10, dcn_d2_NHWC=12, torchvision=15)]
    )
    text = readme.headline(tmp_path)
    assert "takes 1.50 times" in text and "takes 2.75 times" in text
    assert "On an NVIDIA X in float16 the two numbers are 1.20 and 1.50 " in text

    layer = row("forward", 2, conv_NHWC=10, dcn_d2_NHWC=12, torchvision=60)
    write("deform_conv2d_cpu.json", "Some CPU", [layer | {"threads": 1}, layer])
    lines = readme.speed(tmp_path).splitlines()
    assert lines[0] == "Some CPU, float32, 2 threads:"
    assert lines[-2:] == [
        "| 3x3 layer c3, forward | 10 | 12 | 1.2 | 60 |",
        "| Faster R-CNN R-50, inference | 100 | 150 | 1.5 | 275 |",
    ]

    write(
        "deform_conv2d_cuda_bfloat16.json",
        "NVIDIA X",
        [
            row("forward", 1, conv_NHWC=1, dcn_d2_NHWC=2, autocast=8),
            row("forward", 1, conv_NHWC=1, dcn_d2_NHWC=3, autocast=21),
        ],
    )
    write("deform_conv2d_cuda_float32.json", "NVIDIA X", [row("forward", 1, conv_NHWC=1, dcn_d2_NHWC=3, torchvision=6)])
    text = readme.gpu(tmp_path)
    assert "layer is 4 to 7 times as fast" in text and "takes 2 to 3 times as long as cuDNN" in text
    assert "takes 0.5 to 0.5 times as long as with torchvision" in text


@pytest.mark.parametrize(("folder", "start"), [("", "](projects/"), ("docs", "](../projects/")])
def test_links_of_generated_sections_start_where_the_document_is(folder: str, start: str) -> None:
    text = "<!-- generated: zoo-details -->\n<!-- end: zoo-details -->\n"
    filled = readme.fill(text, readme.ROOT / folder / "page.md")
    assert filled.count(start) == filled.count("[config](") > 10

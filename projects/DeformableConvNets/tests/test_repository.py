# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Promises about the repository as a whole: what imports what, what files look like, what the README says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dev import readme

HEADER = "Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0"
SOURCE_SUFFIXES = {".py", ".sh", ".cpp", ".h", ".cu", ".cuh"}


@pytest.fixture(scope="session")
def files(repository: Path) -> list[Path]:
    """All files that are or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"the files of the repository are asked from git, which says: {listed.stderr.strip()}")
    paths = [repository / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["dcn_d2.ops", "dcn_d2.layers"])
def test_operators_and_layers_import_without_detectron2(package: str) -> None:
    run_python(f"import sys; sys.modules['detectron2'] = None; import {package}")


def test_dcn_d2_imports_nothing_heavy() -> None:
    run_python("import sys, dcn_d2; bad = {'torch', 'detectron2', 'numpy'} & set(sys.modules); assert not bad, bad")


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("dcn_d2/ops/x.py", False),
        ("dcn_d2/layers/x.py", False),
        ("dcn_d2/checkpoint/mmdet.py", False),
        ("dcn_d2/modeling/x.py", True),
        ("train_net.py", True),
    ],
)
def test_linter_keeps_the_arrows_between_packages(project: Path, place: str, allowed: bool) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", place, "-"]
    done = subprocess.run(command, cwd=project, input="import detectron2.layers\n", capture_output=True, text=True)
    assert (done.returncode == 0) == allowed, done.stdout + done.stderr


def test_every_source_file_has_the_header(files: list[Path]) -> None:
    sources = [path for path in files if path.suffix in SOURCE_SUFFIXES]
    assert len(sources) > 20
    without = [
        str(path) for path in sources if path.stat().st_size and HEADER not in "".join(path.open().readlines()[:2])
    ]
    assert not without


def test_no_file_names_a_place_that_only_one_machine_has(files: list[Path]) -> None:
    forbidden = re.compile(rb"/(?:root|work|home)/\w|/tmp/\w|pypi\.org|pythonhosted\.org")
    here = Path(__file__).resolve()
    found = [
        f"{path}: {match[0].decode()}"
        for path in files
        if path.suffix not in {".png", ".jpg", ".npz"} and path.resolve() != here
        for match in forbidden.finditer(path.read_bytes())
    ]
    assert not found


def test_csrc_needs_neither_pythons_headers_nor_torchs_unstable_ones(project: Path) -> None:
    """One binary for all torch versions; and python3-dev is not among what the README asks for."""
    unstable = re.compile(r'#include [<"](Python\.h|ATen/|c10/|torch/(extension|library|torch|all|types)\.h|pybind11)')
    sources = [path for path in (project / "csrc").rglob("*") if path.is_file()]
    assert sources
    assert not [str(path) for path in sources if unstable.search(path.read_text())]


def test_make_targets_in_the_readme_exist(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", (repository / "README.md").read_text()))
    assert {"demo", "test"} <= named <= targets


def test_files_and_links_in_the_documents_exist(repository: Path, project: Path) -> None:
    missing = []
    documents = [repository / "README.md", repository / "SECURITY.md", *(repository / "docs").glob("*.md")]
    assert len(documents) > 2
    for document in (*documents, project / "README.md", project / "CONTRIBUTING.md"):
        text = document.read_text()
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
        missing += [f"{document}: {link}" for link in links if not (document.parent / link).exists()]
        # Commands and prose name files from the root.
        named = re.findall(r"(?<![\w/.])projects/DeformableConvNets(?:/[\w./-]*\w)?", text)
        missing += [f"{document}: {name}" for name in named if not (repository / name).exists()]
    assert not missing


def test_the_security_page_is_linked_and_its_commands_exist(repository: Path, project: Path) -> None:
    page = "docs/security.md"
    assert all(f"({page})" in (repository / name).read_text() for name in ("README.md", "SECURITY.md"))
    text = (repository / page).read_text()
    scripts = re.findall(r"`((?:dev/)?\w+\.(?:py|sh))`", text)
    assert {"train_net.py", "demo.py"} <= set(scripts)
    assert not [name for name in scripts if not (project / name).exists()]
    for name in re.findall(r"`dcn_d2\.([\w.]+)\.(\w+)\(", text):
        assert hasattr(importlib.import_module(f"dcn_d2.{name[0]}"), name[1]), name


def test_python_in_the_readme_runs(repository: Path) -> None:
    """All of what needs nothing that only the reader has; of the rest, the imports."""
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "README.md", "exec")
        imports = [line for line in block.splitlines() if line.startswith(("import ", "from "))]
        needs_more = re.search(r"output/|annotations/|trained=True", block)  # weights, data or a network
        exec("\n".join(imports) if needs_more else block, {})


def test_readme_check_notices_a_changed_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "README.md"
    copy.write_text("before\n<!-- generated: zoo -->\n| 99.9 |\n<!-- end: zoo -->\nafter\n")
    assert readme.main(["--check", "--readme", str(copy)]) == 1
    assert "-| 99.9 |" in capsys.readouterr().out
    assert readme.main(["--readme", str(copy)]) == 0
    assert readme.main(["--check", "--readme", str(copy)]) == 0
    assert copy.read_text().startswith("before\n") and copy.read_text().endswith("after\n")


@pytest.mark.parametrize(
    "text", ["<!-- generated: zoo -->\n", "<!-- generated: nonsense -->\n<!-- end: nonsense -->\n"]
)
def test_readme_with_broken_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="markers"):
        readme.fill(text)


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
    assert text.splitlines()[-1] == "| c3: 128 x 100 x 152 | forward | 1 | 2 | 3 | 1.5 | 24 |  |"
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


@pytest.mark.slow
def test_wheel_holds_configs_images_and_one_library_for_all_pythons(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__", ".*_cache", "output")
    shutil.copytree(project, copy, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        ".",
    ]
    environment = {**os.environ, "DEBUG": "1", "FORCE_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"dcn_d2/configs/{path.name}" for path in (project / "configs").glob("*.yaml")}
    expected |= {"dcn_d2/_C.abi3.so", "dcn_d2/data/nuclei/image.png", "dcn_d2/data/nuclei/labels.png"}
    expected |= {str(path.relative_to(project)) for path in (project / "dcn_d2").rglob("*.py")}
    assert expected <= names, expected - names

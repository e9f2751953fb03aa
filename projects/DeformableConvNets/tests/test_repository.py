# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Promises about the repository as a whole: what imports what, what files look like, what a wheel holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HEADER = "Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0"
SOURCE_SUFFIXES = {".py", ".sh", ".cpp", ".h", ".cu", ".cuh"}


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
    expected |= {"dcn_d2/_C.abi3.so", "dcn_d2/data/nuclei_images/image.png", "dcn_d2/data/nuclei_images/labels.png"}
    expected |= {str(path.relative_to(project)) for path in (project / "dcn_d2").rglob("*.py")}
    assert expected <= names, expected - names

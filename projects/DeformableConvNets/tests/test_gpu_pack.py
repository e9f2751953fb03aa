# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""dev/gpu_pack.sh: another machine can use what it packs, and it says why where it cannot pack.

The first tests pack with stand-ins for pip, nvcc and the library; those at the end pack for real, from PyPI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DONE = ".gpu/PACKED"
DETECTRON2 = "sal_detectron2-0.7.2-{}.whl"
# Answers what the script asks of Python; the rest goes to the real one. FAIL is a package that pip cannot find.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$LOG"
previous= folder=
for word in "$@"; do
  case $previous in -d | -w | --build-lib) folder=$word ;; esac
  previous=$word
done
case "$*" in
  "-m pip "*"${FAIL:-no such package}"*) echo "ERROR: No matching distribution found for $FAIL" >&2; exit 1 ;;
  "-m pip "*detectron2.txt*) cp "$READY"/sal_* "$folder" ;;
  "-m pip download "*) cp "$READY"/yacs* "$folder" ;;
  "-m pip wheel "*) ;;
  "setup.py build_ext "*)
    echo "compiled for $TORCH_CUDA_ARCH_LIST" >>"$LOG"
    [ -z "${BREAK:-}" ] || { echo "csrc/broken.cu(7): error: no such thing"; exit 1; }
    [ -z "${CHANGE:-}" ] || echo "// changed" >>"$CHANGE"
    mkdir -p "$folder/dcn_d2" && cp "$READY/library" "$folder/dcn_d2/_C.abi3.so" ;;
  -) cat >/dev/null ;;
  *) exec "$REAL" "$@" ;;
esac
"""


def clean_environment() -> dict[str, str]:
    unset = ("PYTHONPATH", "DCN_LIBRARY", "DCN_COMMIT", "ARCHITECTURES", "PYTHON_VERSION", "LIMIT_MIB")
    unset += ("OUT", "PYTHON", "RESULTS", "SECONDS_LEFT", "NVCC_FLAGS", "DEBUG", "CXX", "CUDA_HOME", "CUDA_PATH")
    return {name: value for name, value in os.environ.items() if name not in unset}


def pack(root: Path, *arguments: str, status: int = 0, **variables: str) -> str:
    """Runs the script of a copied tree, and returns what it said."""
    script = root / "projects/DeformableConvNets/dev/gpu_pack.sh"
    done = subprocess.run(
        ["bash", str(script), *arguments], env=clean_environment() | variables, capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def copy_of(project: Path, root: Path) -> Path:
    """The project as it would travel, without what git ignores."""
    ignored = shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__", ".*", "output", "results")
    return shutil.copytree(project, root / "projects/DeformableConvNets", ignore=ignored)


class Stage:
    """A small tree with the script, and an environment in which nothing is downloaded or compiled."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.root, self.log, ready = folder / "root", folder / "log", folder / "ready"
        self.project = self.root / "projects/DeformableConvNets"
        self.project.mkdir(parents=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(project / "dev", self.project / "dev", ignore=ignored)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(project / name, self.project)
        for name in ("csrc/kernel.cu", "dcn_d2/__init__.py", "benchmarks/b.py", "tests/t.py", "results/r.json"):
            (self.project / name).parent.mkdir(exist_ok=True)
            (self.project / name).write_text(name)
        for name, text in (("venv/bin/python", STAND_IN), ("cuda/bin/nvcc", "#!/bin/sh\n")):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        ready.mkdir()
        (ready / "yacs-0.1.8-py3-none-any.whl").write_text("a wheel")
        self.library = ready / "library"
        shutil.copy(Path("/bin/sh").resolve(), self.library)  # anything that `strip` takes
        unpacked = folder / "sal_detectron2-0.7.2"
        for name, text in {
            "detectron2/__init__.py": "",
            "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "for another torch",
            "sal_detectron2-0.7.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n",
            "sal_detectron2-0.7.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-none-any\n",
        }.items():
            (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
            (unpacked / name).write_text(text)
        subprocess.run([sys.executable, "-m", "wheel", "pack", "-d", ready, unpacked], check=True, capture_output=True)
        self.variables = {"VENV": str(folder / "venv"), "CUDA_HOME": str(folder / "cuda"), "READY": str(ready)}
        self.variables |= {"LOG": str(self.log), "REAL": sys.executable, "GIT_CEILING_DIRECTORIES": str(folder)}

    def pack(self, *arguments: str, status: int = 0, **variables: str) -> str:
        return pack(self.root, *arguments, status=status, **self.variables | variables)

    def packed(self) -> dict[str, str]:
        return dict(line.split(" ") for line in (self.root / DONE).read_text().splitlines())

    def wheels(self) -> list[str]:
        return sorted(path.name for path in (self.root / ".whl").iterdir())

    def calls(self, start: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def stage(project: Path, tmp_path: Path) -> Stage:
    return Stage(project, tmp_path)


def test_the_library_and_the_wheels_are_packed(stage: Stage) -> None:
    said = stage.pack()
    assert sorted(path.name for path in (stage.root / ".gpu").iterdir()) == ["PACKED", "_C.abi3.so"]
    assert stage.wheels() == [DETECTRON2.format("py3-none-any"), "yacs-0.1.8-py3-none-any.whl"]
    assert "projects/DeformableConvNets/dev/gpu_check.sh first" in said
    assert "MiB, the library" in said and "MiB, 2 wheels" in said


def test_versions_come_from_where_they_stand(stage: Stage) -> None:
    (stage.project / "dev/constraints.txt").write_text("yacs==1.2.3\niopath==4.5; python_version >= '3.12'\n")
    (stage.project / "dev/gpu_requirements.txt").write_text("yacs\niopath\nexpecttest\nhere==6.7  # why\n")
    expecttest = next(line for line in (stage.project / "pyproject.toml").read_text().splitlines() if "expectt" in line)
    stage.pack("--library", str(stage.library))
    (ready, detectron2), (source,) = stage.calls("-m pip download"), stage.calls("-m pip wheel")
    assert f"yacs==1.2.3 {expecttest.strip(' ,').strip(chr(34))} here==6.7" in ready
    assert "--python-version 3.12" in ready and "iopath" not in ready and "iopath==4.5" in source
    assert "--require-hashes" in detectron2
    (stage.project / "dev/gpu_requirements.txt").write_text("nowhere\n")
    assert "versions of the packages are not known" in stage.pack("--library", str(stage.library), status=1)


def test_packages_for_newer_pythons_are_left_out(stage: Stage) -> None:
    for version, expected in (("3.11", False), ("3.12", True)):
        stage.log.write_text("")
        stage.pack("--library", str(stage.library), PYTHON_VERSION=version)
        assert ("deformops==" in stage.calls("-m pip download")[0]) == expected


def test_detectron2_fits_every_python_and_has_no_compiled_file(stage: Stage, tmp_path: Path) -> None:
    stage.pack("--library", str(stage.library))
    wheel = stage.root / ".whl" / DETECTRON2.format("py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    assert "detectron2/__init__.py" in names and not any("_C" in name for name in names)
    # Fails if a file does not have the hash that RECORD gives.
    subprocess.run([sys.executable, "-m", "wheel", "unpack", "-d", tmp_path / "unpacked", wheel], check=True)
    record = zipfile.ZipFile(wheel).read("sal_detectron2-0.7.2.dist-info/RECORD").decode()
    assert "detectron2/__init__.py,sha256=" in record and "_C" not in record


def test_wheels_of_an_earlier_run_go(stage: Stage) -> None:
    (stage.root / ".whl").mkdir()
    (stage.root / ".whl/yacs-0.1.7-py3-none-any.whl").write_text("old")
    stage.pack("--library", str(stage.library))
    assert "yacs-0.1.7-py3-none-any.whl" not in stage.wheels() and "yacs-0.1.8-py3-none-any.whl" in stage.wheels()


def test_too_large_a_pack_is_refused_with_both_numbers(stage: Stage) -> None:
    (stage.library.parent / "yacs-0.1.8-py3-none-any.whl").write_bytes(bytes(2**20))
    message = stage.pack("--library", str(stage.library), LIMIT_MIB="1", status=1)
    found = re.search(r"library has \S+ MiB and the wheels have (\S+) MiB, (\S+) MiB together, but 1 MiB is", message)
    assert found and 1 <= float(found[1]) < float(found[2])
    assert not (stage.root / ".gpu").exists() and not (stage.root / ".whl").exists()


@pytest.mark.parametrize("package", ["yacs", "fvcore", "detectron2.txt"])
def test_a_run_that_fails_names_the_package_and_leaves_what_was_there(stage: Stage, package: str) -> None:
    stage.pack("--library", str(stage.library))
    (stage.root / ".whl/mark").touch()
    before = stage.packed()
    message = stage.pack("--library", str(stage.library), FAIL=package, status=1)
    assert f"No matching distribution found for {package}" in message and "needs a network" in message
    assert stage.packed() == before and "mark" in stage.wheels() and not (stage.root / ".gpu/new").exists()


def test_compiles_only_when_needed(stage: Stage) -> None:
    for change, compiled in (("", True), ("", False), ("kernel", True), ("test", False), ("architectures", True)):
        stage.log.write_text("")
        if change == "kernel":
            (stage.project / "csrc/kernel.cu").write_text("other")
        if change == "test":
            (stage.project / "tests/t.py").write_text("other")
        architectures = "8.0;9.0" if change == "architectures" else "9.0"
        stage.pack(ARCHITECTURES=architectures)
        assert stage.calls("compiled for") == [f"compiled for {architectures}"] * compiled, change


def test_what_keeps_it_from_compiling_is_said(stage: Stage) -> None:
    message = stage.pack(BREAK="1", status=1)
    assert "csrc/broken.cu(7): error: no such thing" in message and "build.log" in message
    kernel = str(stage.project / "csrc/kernel.cu")
    assert "the sources were changed while they were compiled" in stage.pack(CHANGE=kernel, status=1)
    assert not (stage.root / ".gpu").exists()
    stage.pack()


def test_missing_nvcc_is_explained(stage: Stage) -> None:
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    if shutil.which("strip", path=path) is None:
        pytest.skip("nvcc is in a folder of the PATH without which nothing works")
    script = stage.project / "dev/gpu_pack.sh"
    script.write_text(script.read_text().replace("/usr/local/cuda", str(stage.root / "nowhere")))
    message = stage.pack(CUDA_HOME="", PATH=path, status=1)
    assert "no nvcc was found" in message and "--library FILE" in message


def test_missing_environment_and_library_are_explained(stage: Stage) -> None:
    assert "make setup" in stage.pack(VENV="/nowhere", status=1)
    assert "there is no library nothing.so" in stage.pack("--library", "nothing.so", status=1)
    assert "'first' is unknown; call it as" in stage.pack("first", status=1)
    assert "PYTHON_VERSION=python3.12" in stage.pack(PYTHON_VERSION="python3.12", status=1)
    for value in ("abc", "-1", "45 MiB"):
        assert f"LIMIT_MIB={value} should be a number of mebibytes, such as 45" in stage.pack(LIMIT_MIB=value, status=1)
    assert not stage.log.exists()


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_scripts_own_introduction(stage: Stage, option: str) -> None:
    said = stage.pack(option)
    assert "--library FILE" in said and "LIMIT_MIB=45" in said and "#" not in said and "set -eu" not in said
    assert not stage.log.exists() and not (stage.root / ".gpu").exists()


def test_packed_says_from_what(stage: Stage) -> None:
    def packed() -> dict[str, str]:
        stage.pack("--library", str(stage.library))
        return stage.packed()

    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *settings, *arguments], cwd=stage.project, check=True, capture_output=True, text=True
        ).stdout.strip()

    if shutil.which("git") is None:
        pytest.skip("there is no git")
    unknown = packed()
    assert list(unknown) == ["commit", "changes", "library", "project"]
    assert (unknown["commit"], unknown["changes"]) == ("unknown", "1")
    source = '. dev/digest.sh; digest . csrc setup.py; digest "$PWD" csrc setup.py dcn_d2 benchmarks tests dev'
    digests = subprocess.run(["bash", "-c", source], cwd=stage.project, capture_output=True, text=True).stdout.split()
    assert [unknown["library"], unknown["project"]] == digests and len(digests[0]) == 16

    (stage.root / ".gitignore").write_text("build/\n.gpu/\n.whl/\n")
    git("init", "-q", str(stage.root))
    git("add", str(stage.root))
    git("commit", "-q", "-m", "all")
    clean = packed()
    assert clean == unknown | {"commit": git("rev-parse", "HEAD")[:12], "changes": "0"}
    (stage.project / "results/r.json").write_text("measured again")
    assert packed() == clean
    (stage.project / "tests/t.py").write_text("changed")
    changed = packed()
    assert changed["changes"] == "1" and changed["library"] == clean["library"]
    assert changed["project"] != clean["project"] and changed["commit"] == clean["commit"]
    (stage.project / "setup.py").write_text("changed")
    assert packed()["library"] != clean["library"]


@pytest.fixture(scope="module")
def tree(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project from which packing for real is possible."""
    check = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "1", "--timeout", "15"]
    found = subprocess.run(
        [*check, "-d", str(tmp_path_factory.mktemp("network")), "yacs"], capture_output=True, text=True
    )
    if found.returncode != 0:
        pytest.skip(f"pip cannot download: {(found.stderr.strip().splitlines() or ['no message'])[-1]}")
    if not Path(sys.prefix, "bin/python").exists():
        pytest.skip(f"there is no bin/python in {sys.prefix}")
    root = tmp_path_factory.mktemp("tree")
    copy_of(project, root)
    return root


@pytest.fixture(scope="module")
def library(project: Path) -> Path:
    path = project / "dcn_d2/_C.abi3.so"
    if not path.exists():
        pytest.skip("dcn_d2._C was not compiled")
    return path


def install(python: str, packed: Path, site: Path) -> None:
    wheels = [str(path) for path in (packed / ".whl").glob("*.whl")]
    command = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site)]
    done = subprocess.run([*command, *wheels], env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def where(python: str, site: Path, modules: str) -> Iterator[tuple[str, Path]]:
    """Where each of the modules comes from, with `site` first on the path."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: print(name, importlib.import_module(name).__file__)"
    command = [python, "-W", "ignore", "-c", code, *modules.split()]
    environment = clean_environment() | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, file = line.split(" ", 1)
        yield name, Path(file)


@pytest.fixture(scope="module")
def packed(tree: Path, library: Path) -> Path:
    """The tree with what was packed for this Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    pack(tree, "--library", str(library), VENV=sys.prefix, PYTHON_VERSION=version)
    return tree


@pytest.mark.slow
def test_packed_for_this_python_everything_comes_from_the_pack(packed: Path, tmp_path: Path) -> None:
    install(sys.executable, packed, tmp_path)
    modules = "detectron2.model_zoo fvcore.nn iopath omegaconf hydra antlr4 yacs.config pycocotools.mask pkg_resources"
    for name, file in where(sys.executable, tmp_path, modules + " setuptools expecttest yaml termcolor portalocker"):
        assert file.is_relative_to(tmp_path), name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run everything on the GPU")
def test_what_is_packed_passes_the_checks_up_to_the_gpu(packed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["projects/DeformableConvNets/dev/gpu_check.sh", "first"],
        env=clean_environment() | {"PYTHON": sys.executable, "RESULTS": str(tmp_path)},
        cwd=packed,
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "no GPU is visible to torch" in said, said
    assert "was not installed" not in said and "from other sources" not in said, said
    assert (packed / "projects/DeformableConvNets/build/gpu_site/detectron2/model_zoo").is_dir()


@pytest.fixture(scope="module")
def python312() -> str:
    candidates = [os.environ.get("DCN_PYTHON_312"), shutil.which("python3.12")]
    candidates += map(str, sorted(Path.home().glob(".pyenv/versions/3.12*/bin/python3.12")))
    code = "import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))"
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", code], capture_output=True).returncode == 0:
            return candidate
    pytest.skip("no Python 3.12 was found")


@pytest.fixture(scope="module")
def packed312(tree: Path, library: Path, python312: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what was packed for Python 3.12, installed in its folder site."""
    packed = tmp_path_factory.mktemp("packed")
    pack(tree, "--library", str(library), "--output", str(packed), VENV=sys.prefix)
    subprocess.run([python312, "-m", "venv", str(packed / "bare")], check=True, env=clean_environment())
    install(str(packed / "bare/bin/python"), packed, packed / "site")
    return packed


@pytest.mark.slow
def test_packed_for_python312_the_wheels_work_there(packed312: Path) -> None:
    """In a bare environment, which shows that all fit; the others need torch."""
    modules = "yacs.config omegaconf antlr4 termcolor portalocker expecttest pkg_resources setuptools yaml"
    for name, file in where(str(packed312 / "bare/bin/python"), packed312 / "site", modules):
        assert file.is_relative_to(packed312), name


@pytest.mark.slow
def test_packed_for_python312_the_tests_are_found_there(packed312: Path, tree: Path, python312: str) -> None:
    if subprocess.run([python312, "-c", "import torch, torchvision, pytest"], capture_output=True).returncode != 0:
        pytest.skip(f"{python312} has no torch, torchvision and pytest; DCN_PYTHON_312 names another one")
    modules = "detectron2.model_zoo deformops.integrations.torchvision fvcore.nn iopath pycocotools.mask pkg_resources"
    for name, file in where(python312, packed312 / "site", modules):
        assert file.is_relative_to(packed312), name
    project = tree / "projects/DeformableConvNets"
    paths = {"PYTHONPATH": f"{project}:{packed312 / 'site'}", "DCN_LIBRARY": str(packed312 / ".gpu/_C.abi3.so")}
    command = [python312, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/ops"]
    done = subprocess.run(command, env=clean_environment() | paths, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and " tests collected" in done.stdout, done.stdout + done.stderr

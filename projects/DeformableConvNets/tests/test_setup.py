# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The set-up: which versions it asks for, and what it says where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcn_d2 import __version__
from dev import pins

REQUIREMENTS = "torch>=2.10\ntorchvision>=0.25  # comment\nnumpy>=1.26\n"
TESTED = 'torch==2.14.1\ntorchvision==0.29.1\nnumpy==2.4.6; python_version >= "3"\nnumpy==1.0; python_version < "3"\n'


def resolve(tmp_path: Path, installed: dict[str, str]) -> list[str]:
    (tmp_path / "requirements.txt").write_text(REQUIREMENTS)
    (tmp_path / "constraints.txt").write_text(TESTED)
    requirements, tested = (pins.read(tmp_path / name) for name in ("requirements.txt", "constraints.txt"))
    return list(pins.pins(requirements, tested, installed.get))


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({}, ["torch==2.14.1", "torchvision==0.29.1", "numpy==2.4.6"]),
        ({"numpy": "1.26.4"}, ["torch==2.14.1", "torchvision==0.29.1", "numpy==1.26.4"]),
        ({"numpy": "1.24.0"}, ["torch==2.14.1", "torchvision==0.29.1", "numpy==2.4.6"]),
        ({"torch": "2.11.0+cu130"}, ["torch==2.11.0+cu130", "numpy==2.4.6"]),
        (
            {"torch": "2.16.0.dev20270101", "torchvision": "0.31.0a0"},
            ["torch==2.16.0.dev20270101", "torchvision==0.31.0a0", "numpy==2.4.6"],
        ),
    ],
    ids=["nothing", "numpy stays", "numpy too old", "torch without torchvision", "nightly stays"],
)
def test_pins_keep_what_is_installed(tmp_path: Path, installed: dict[str, str], expected: list[str]) -> None:
    assert resolve(tmp_path, installed) == expected


def test_pins_refuse_to_replace_a_torch_that_is_too_old(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"torch 2\.4\.1, but torch>=2\.10 is needed"):
        resolve(tmp_path, {"torch": "2.4.1"})


def test_every_tested_version_satisfies_its_requirement(project: Path) -> None:
    accepted = {r.name: r.specifier for r in pins.read(project / "dev/requirements.txt")}
    for pin in pins.read(project / "dev/constraints.txt"):
        (version,) = (specifier.version for specifier in pin.specifier)
        assert accepted[pin.name].contains(version), pin


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[str, str], Path]:
    """Makes executables below `tmp_path`, whose bin/ `run_setup` puts first on the PATH."""

    def make(name: str, script: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


def run_setup(project: Path, tmp_path: Path, **environment: str) -> str:
    """Runs the first part of the set-up, which must fail, and returns its last line."""
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "INSTALLER", "PYTHON")}
    done = subprocess.run(
        [str(project / "dev/setup.sh"), "packages"],
        env={**kept, "PATH": path, "VENV": str(tmp_path / "venv"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    return done.stderr.strip().splitlines()[-1]


def test_missing_python_is_explained(project: Path, tmp_path: Path) -> None:
    message = run_setup(project, tmp_path, PYTHON="python-that-is-not-there")
    assert message.startswith("Set-up stopped: python-that-is-not-there was not found") and "PYTHON=" in message


def test_old_python_is_explained(project: Path, tmp_path: Path, stub: Callable[[str, str], Path]) -> None:
    stub("bin/python3", 'case "$1" in -V) echo "Python 3.8.1" ;; *) exit 1 ;; esac')
    assert "python3 is Python 3.8.1, but 3.10 or newer is needed" in run_setup(project, tmp_path)


def test_python_without_venv_is_explained(project: Path, tmp_path: Path, stub: Callable[[str, str], Path]) -> None:
    stub("bin/python3", 'case "$*" in *ensurepip*) exit 1 ;; esac')
    assert "apt install python3-venv" in run_setup(project, tmp_path)


def test_compiler_that_does_not_work_is_explained(project: Path, tmp_path: Path) -> None:
    message = run_setup(project, tmp_path, CXX="false")
    assert "compiler 'false' cannot compile" in message and "g++ 10 or newer" in message


def test_full_disk_is_explained(project: Path, tmp_path: Path, stub: Callable[[str, str], Path]) -> None:
    stub("bin/df", "echo header; echo /dev/sda1 9999999 8888888 3145728 99% /")
    # An environment that has pip and nothing else.
    stub("venv/bin/python", 'case "$*" in *pip*) exit 0 ;; *) exit 1 ;; esac')
    message = run_setup(project, tmp_path)
    assert f"the disk of {tmp_path / 'venv'} has 3 GB free, but 8 GB are needed" in message


def test_existing_environment_without_pip_is_explained(
    project: Path, tmp_path: Path, stub: Callable[[str, str], Path]
) -> None:
    stub("venv/bin/python", "exit 1")
    assert "has no pip" in run_setup(project, tmp_path)


@pytest.fixture(scope="module")
def source(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, made where no GPU is visible and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "copy"
    for name in ("csrc", "configs", "dcn_d2"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(project / name, copy / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(project / name, copy)
    run_setup_py(copy, "-q", "sdist", "-d", "../made", CUDA_VISIBLE_DEVICES="")
    (archive,) = (folder / "made").iterdir()
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def run_setup_py(folder: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """Runs setup.py, which must end with the exit code, and returns what it says."""
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_CUDA", "PYTORCH_NVCC")}
    done = subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=folder, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def test_a_source_distribution_made_without_a_gpu_holds_all_sources(project: Path, source: Path) -> None:
    def files(folder: Path, *patterns: str) -> set[str]:
        return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}

    patterns = ("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cpp", "csrc/**/*.cu", "configs/*.yaml", "dcn_d2/**/*.py")
    data = ("dcn_d2/data/**/*.png", "dcn_d2/data/**/*.txt", "dcn_d2/py.typed", "pyproject.toml")
    assert files(source, *patterns, *data) == files(project, *patterns, *data)
    assert list((source / "csrc/cuda").rglob("*.cu"))
    assert not list(source.rglob("*.so"))


def test_the_version_is_the_one_that_the_package_names(source: Path, tmp_path: Path) -> None:
    """It is read from the file: pip asks for it where neither torch nor dcn_d2 can be imported."""
    assert f"\nVersion: {__version__}\n" in (source / "PKG-INFO").read_text()
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    package = copy / "dcn_d2/__init__.py"
    package.write_text(package.read_text().replace(f'"{__version__}"', '"7.8.9"') + "\nimport nothing_of_this_name\n")
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; exec(open('setup.py').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.stdout == "7.8.9\n", done.stderr


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """What looks like a CUDA toolkit."""
    for name in ("include/cuda_runtime.h", "bin/nvcc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_a_cuda_build_that_is_wanted_and_impossible_stops(source: Path, toolkit: Path, tmp_path: Path) -> None:
    wanted = {"FORCE_CUDA": "1", "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "8.0"}
    assert "CPU and CUDA kernels" in run_setup_py(source, "--name", **wanted)
    (toolkit / "bin/nvcc").unlink()
    said = run_setup_py(source, "--name", code=1, **wanted)
    assert f"FORCE_CUDA=1, but the CUDA toolkit at {toolkit} has no compiler, bin/nvcc" in said
    (toolkit / "bin/nvcc").touch()
    incomplete = tmp_path / "incomplete"
    shutil.copytree(source, incomplete)
    for kernel in (incomplete / "csrc/cuda").rglob("*.cu"):
        kernel.unlink()
    said = run_setup_py(incomplete, "--name", code=1, **wanted)
    assert f"CUDA kernels are to be compiled, but {incomplete}/csrc/cuda holds none" in said and "FORCE_CUDA=0" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("name", ["a b/my env", ".venv"])
def test_an_environment_in_a_folder_with_spaces(repository: Path, project: Path, tmp_path: Path, name: str) -> None:
    # The real Makefile, with a set-up that only says what it was asked for and a Python that prints its arguments.
    shutil.copy(repository / "Makefile", tmp_path)
    copy = tmp_path / "projects/DeformableConvNets"
    for file in ("csrc/a.h", "setup.py", "pyproject.toml", *(f"dev/{name}" for name in os.listdir(project / "dev"))):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).touch()
    python = '#!/bin/sh\nprintf "[%s]" "$@"\n'
    (copy / "dev/setup.sh").write_text(
        "#!/bin/sh\n"
        'echo "$1 in $VENV"; mkdir -p "$VENV/bin"\n'
        f"cat > \"$VENV/bin/python\" <<'END'\n{python}END\n"
        'chmod +x "$VENV/bin/python"\n'
    )
    (copy / "dev/setup.sh").chmod(0o755)
    past = time.time() - 100
    for path in copy.rglob("*"):
        os.utime(path, (past, past))
    venv = tmp_path / name

    def make(*arguments: str) -> str:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        command = ["make", "-s", *arguments, f"VENV={venv}"]
        return subprocess.run(command, cwd=tmp_path, env=kept, check=True, capture_output=True, text=True).stdout

    assert make("setup").splitlines() == [f"packages in {venv}", f"extension in {venv}"]
    assert make("setup") == ""  # all is there
    (copy / "csrc/a.h").touch()
    os.utime(copy / "csrc/a.h", (time.time() + 1, time.time() + 1))
    assert make("setup").splitlines() == [f"extension in {venv}"]
    os.utime(copy / "csrc/a.h", (past, past))
    said = make("demo", "OUTPUT=my output")
    assert "[OUTPUT_DIR][my output]" in said and "[--weights][my output/model_final.pth]" in said

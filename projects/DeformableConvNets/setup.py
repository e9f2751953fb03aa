# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""Builds ``dcn_d2._C`` on torch's stable ABI: one binary for every Python >= 3.10 and torch >= 2.10.

Environment variables:
    FORCE_CUDA: 1 compiles the CUDA kernels although no GPU is visible, 0 leaves them out although one is.
    TORCH_CUDA_ARCH_LIST: the GPU architectures to compile for, for example "8.0;9.0+PTX".
    NVCC_FLAGS: further flags for nvcc.
    MAX_JOBS: how many files are compiled at the same time.
    DEBUG: 1 compiles with debug information and without optimisation.
    DCN_WERROR: 1 makes compiler warnings errors.
"""

import os
import shlex
import shutil
import sys
from glob import glob
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MIN_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the first torch whose stable ABI has all that csrc/ calls


def say(message: str) -> None:
    """Prints what was decided; pip shows it with -v and when the build fails."""
    print(f"dcn_d2: {message}", file=sys.stderr, flush=True)


def flag(name: str) -> bool:
    """Reads an environment variable that is 1 or not."""
    return os.environ.get(name, "0") == "1"


def find_cuda_home() -> str | None:
    """Returns the first candidate that really holds the CUDA headers.

    torch derives it from where nvcc is found, which is wrong where nvcc on the PATH is a wrapper script.
    """
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
    candidates += ["/usr/local/cuda"]
    return next((c for c in candidates if c and os.path.exists(f"{c}/include/cuda_runtime.h")), None)


def want_cuda(torch: Any, cuda_home: str | None) -> bool:
    """Decides whether the CUDA kernels are compiled, and says why."""
    force, visible = os.environ.get("FORCE_CUDA"), torch.cuda.is_available()
    if force == "0":
        say("CPU kernels only: FORCE_CUDA=0")
        return False
    if force != "1" and not visible:
        say("CPU kernels only: no GPU is visible (FORCE_CUDA=1 compiles the CUDA kernels all the same)")
        return False
    missing = ""
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif cuda_home is None:
        missing = "no CUDA toolkit was found (looked at CUDA_HOME, CUDA_PATH, nvcc on the PATH, /usr/local/cuda)"
    elif "PYTORCH_NVCC" not in os.environ and not os.path.exists(f"{cuda_home}/bin/nvcc"):
        missing = f"the CUDA toolkit at {cuda_home} has no compiler, bin/nvcc"
    if not missing:
        say(f"CPU and CUDA kernels: toolkit at {cuda_home}, torch built with CUDA {torch.version.cuda}")
        return True
    if force == "1":
        raise SystemExit(f"dcn_d2: FORCE_CUDA=1, but {missing}.")
    say(f"CPU kernels only, although a GPU is visible: {missing}")
    return False


def default_arch_list(cuda_version: str) -> str:
    """Architectures to compile for where no GPU is visible to ask (torch raises IndexError there)."""
    newer = ["10.0", "12.0"] if tuple(map(int, cuda_version.split(".")[:2])) >= (12, 8) else []
    return ";".join(["7.5", "8.0", "8.6", "9.0", *newer]) + "+PTX"


def compile_args(cuda: bool, torch_headers: list[str]) -> dict[str, list[str]]:
    """Returns the flags for the C++ compiler and for nvcc."""
    common = ["-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    # Included as system headers, torch's headers give no warnings: those that remain are our own.
    common += [word for path in torch_headers for word in ("-isystem", path)]
    common += ["-DUSE_CUDA"] if cuda else []  # USE_CUDA opens torch's own stream functions
    common += ["-O0", "-g"] if flag("DEBUG") else ["-O3"]
    # Only `#pragma omp simd` is used: threads come from torch, so that torch.set_num_threads holds for us too.
    cxx = [*common, "-fvisibility=hidden", "-Wall", "-Wextra", "-fopenmp-simd"]
    # torch hands nvcc -D__CUDA_NO_HALF_OPERATORS__ and the like; the kernels use those conversions.
    nvcc = [*common, "-Xcompiler=-fvisibility=hidden,-Wall"]
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS"):
        nvcc.append(f"-U__CUDA_NO_{name}__")
    nvcc += ["-lineinfo"] if flag("DEBUG") else []
    if flag("DCN_WERROR"):
        cxx += ["-Werror"]
        nvcc += ["-Werror=all-warnings", "-Xcompiler=-Werror"]
    nvcc += shlex.split(os.environ.get("NVCC_FLAGS", ""))
    return {"cxx": cxx, "nvcc": nvcc}


class TorchIsMissing(build_ext):
    """Stands in for torch's BuildExtension, so that metadata can be read without torch but nothing is built."""

    def run(self) -> None:
        """Stops with what to do."""
        raise SystemExit(
            "dcn_d2: torch cannot be imported while building. Install PyTorch first, then use\n"
            "    pip install --no-build-isolation -e projects/DeformableConvNets"
        )


def extension() -> tuple[Extension, type[build_ext]]:
    """Returns the extension and the command that builds it."""
    # Relative, as setuptools demands. No file defines a Python module: dcn_d2.ops has torch load the library, so that
    # Python's headers (python3-dev) are not needed.
    sources = ["csrc/schemas.cpp", *sorted(glob("csrc/cpu/**/*.cpp", recursive=True))]
    headers = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # read by torch.utils.cpp_extension at import
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return Extension("dcn_d2._C", sources), TorchIsMissing
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < MIN_TORCH:
        raise SystemExit(f"dcn_d2: torch {torch.__version__} is too old, 2.10 or newer is needed.")

    cuda = want_cuda(torch, cuda_home)
    if cuda:
        kernels = sorted(glob("csrc/cuda/**/*.cu", recursive=True))
        if not kernels:
            raise SystemExit(
                f"dcn_d2: CUDA kernels are to be compiled, but {os.path.abspath('csrc/cuda')} holds none. Take the "
                "whole source, or build without them: FORCE_CUDA=0."
            )
        sources += kernels
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_arch_list(str(torch.version.cuda)))
            say(f"CUDA architectures: {os.environ['TORCH_CUDA_ARCH_LIST']}")
    args = compile_args(cuda, include_paths("cuda" if cuda else "cpu"))
    built = (CUDAExtension if cuda else CppExtension)(
        "dcn_d2._C",
        sources,
        depends=headers,
        include_dirs=[os.path.abspath("csrc")],  # ninja runs the compiler in another folder
        extra_compile_args=args if cuda else args["cxx"],
        py_limited_api=True,  # one _C.abi3.so; also keeps libtorch_python out
    )
    return built, BuildExtension


def packages() -> list[str]:
    """Every folder of dcn_d2 with an __init__.py, and configs/ as dcn_d2.configs."""
    found = [os.path.dirname(path) for path in glob("dcn_d2/**/__init__.py", recursive=True)]
    return [*sorted(name.replace(os.sep, ".") for name in found), "dcn_d2.configs"]


ext, build_command = extension()
setup(
    license="Apache-2.0",  # here, because pyproject.toml's form of it depends on the version of setuptools
    packages=packages(),
    package_dir={"dcn_d2": "dcn_d2", "dcn_d2.configs": "configs"},
    package_data={"dcn_d2.configs": ["*.yaml"], "dcn_d2.data": ["**/*.png", "**/*.txt"], "dcn_d2": ["py.typed"]},
    ext_modules=[ext],
    cmdclass={"build_ext": build_command},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)

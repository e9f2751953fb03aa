# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the CUDA kernels, read from the compiled library: registers spilled, tensor cores used."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

# Products on tensor cores, and how many kernels each must be: for float16, bfloat16, TF32 and split float32, and of the
# implicit products for every width of tiles that plan.cuh chooses from.
TENSOR_CORE_KERNELS = {
    "product_kernel<SampleGather>": 11,
    "product_kernel<ListGather>": 10,
    "offset_gradient_kernel": 4,
    "weight_gradient_tensor_kernel": 10,
}
HAS_TENSOR_CORES = 80  # from this architecture on mma.cuh has instructions for them


class Kernel(NamedTuple):
    architecture: int
    name: str  # mangled

    def product(self) -> str | None:
        """Which of the products it is, if any."""
        found = re.search(r"\d(product_kernel|offset_gradient_kernel|weight_gradient_tensor_kernel)I", self.name)
        if found is None:
            return None
        gather = re.search(r"(SampleGather|ListGather)I", self.name) if found[1] == "product_kernel" else None
        return found[1] if gather is None else f"{found[1]}<{gather[1]}>"


def find_cuobjdump() -> str | None:
    """On the PATH, of the CUDA toolkit, or the one that comes with Triton and hence with torch for CUDA."""
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders += ["/usr/local/cuda/bin"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


def cuobjdump(*arguments: str) -> str:
    tool = find_cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was found neither on the PATH nor in a CUDA toolkit nor in Triton")
    # It calls nvdisasm, which lies next to it.
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True, env=environment).stdout


@pytest.fixture(scope="module")
def library() -> str:
    spec = importlib.util.find_spec("dcn_d2._C")
    if spec is None or spec.origin is None:
        pytest.skip("dcn_d2._C was not compiled")
    if b"cuda14product_kernel" not in Path(spec.origin).read_bytes():
        pytest.skip("dcn_d2._C was compiled without the CUDA kernels")
    return spec.origin


@pytest.fixture(scope="module")
def stacks(library: str) -> dict[Kernel, int]:
    """Bytes of local memory of every kernel: spilled registers, and arrays that did not fit into registers."""
    found: dict[Kernel, int] = {}
    architecture, name = 0, ""
    for line in cuobjdump("-res-usage", library).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"STACK:(\d+) .*LOCAL:(\d+)", line):
            found[Kernel(architecture, name)] = int(match[1]) + int(match[2])
    return found


@pytest.fixture(scope="module")
def products(stacks: dict[Kernel, int]) -> list[Kernel]:
    """The kernels that use tensor cores."""
    found = [kernel for kernel in stacks if kernel.architecture >= HAS_TENSOR_CORES and kernel.product()]
    if not found:
        pytest.skip(f"dcn_d2._C was compiled for no architecture from {HAS_TENSOR_CORES / 10} on")
    return found


def test_no_kernel_spills_registers(stacks: dict[Kernel, int]) -> None:
    """Of the architectures that the kernels are tuned for."""
    spilling = [kernel for kernel, size in stacks.items() if size and kernel.architecture in (80, 90)]
    assert not spilling


def test_every_product_was_compiled(products: list[Kernel]) -> None:
    counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for kernel in products:
        counts[kernel.architecture][kernel.product() or ""] += 1
    assert all(count == TENSOR_CORE_KERNELS for count in counts.values()), counts


@pytest.mark.slow
def test_products_run_on_tensor_cores_and_in_registers(library: str, products: list[Kernel]) -> None:
    """The machine code has matrix products, and neither loads from nor stores to local memory."""
    names = ",".join(sorted({kernel.name for kernel in products}))
    code: dict[Kernel, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    architecture, kernel = 0, Kernel(0, "")
    for line in cuobjdump("-sass", "-fun", names, library).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = int(match[1])
        elif match := re.search(r"Function : (\w+)", line):
            kernel = Kernel(architecture, match[1])
        elif match := re.search(r"/\*[0-9a-f]+\*/ +(?:@!?\w+ )?([A-Z][A-Z0-9]*)", line):
            code[kernel][match[1]] += 1
    for kernel in products:
        instructions = code[kernel]
        assert instructions["HMMA"] > 0, kernel
        assert instructions["LDL"] == instructions["STL"] == 0, kernel

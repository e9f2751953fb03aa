# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The library around the operators: what happens without it, and that it is built with threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcn_d2.ops
from dcn_d2.ops import _library

from ..torchscript import compiled_library

pytestmark = pytest.mark.unsanitized


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_kernels_are_compiled() -> None:
    assert _library.missing_kernels == ""


HIDE_KERNELS = """
import importlib.util, sys, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "dcn_d2._C" else find(name, package)
"""


def test_without_kernels_the_reference_runs_and_warns_once() -> None:
    output = run_python(
        HIDE_KERNELS
        + """
import torch, torchvision
from dcn_d2.ops import deform_conv2d, deform_roi_pool
torch.manual_seed(0)
x, o, w = torch.randn(1, 2, 5, 5), torch.randn(1, 18, 5, 5), torch.randn(2, 2, 3, 3)
m = torch.rand(1, 9, 5, 5)
leaves = [t.requires_grad_() for t in (x, o, w, m)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = deform_conv2d(x, o, w, padding=1, mask=m)
    grads = torch.autograd.grad(out.sum(), leaves)
    deform_conv2d(x, o, w, padding=1)
    pooled = deform_roi_pool(x, torch.tensor([[0, 0.0, 0, 4, 4]]), torch.zeros(1, 2, 2, 2), 2)
    torch.autograd.grad(pooled.sum(), x)
expected = torchvision.ops.deform_conv2d(x, o, w, padding=1, mask=m)
torch.testing.assert_close(out, expected)
for a, e in zip(grads, torch.autograd.grad(expected.sum(), leaves)):
    torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
messages = [str(w.message) for w in caught if "dcn_d2" in str(w.message)]
assert len(messages) == 1 and "pip install" in messages[0] and "dcn_d2._C was not found" in messages[0], messages
""",
        DCN_LIBRARY="",
    )
    assert "Error" not in output


# Prints why the library in the braces cannot be used in the place of the installed one.
INSTALLED = """
import importlib.util, types
find = importlib.util.find_spec
broken = types.SimpleNamespace(origin={!r})
importlib.util.find_spec = lambda name, package=None: broken if name == "dcn_d2._C" else find(name, package)
from dcn_d2.ops import _library
print(_library.missing_kernels)
"""


def test_a_library_that_does_not_load_is_reported_with_the_loaders_reason(tmp_path: Path) -> None:
    """Torch's own message names only the file."""
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    code = "try:\n    import dcn_d2.ops\nexcept OSError as error:\n    print(error)"
    found = run_python(code, DCN_LIBRARY=str(broken))
    assert "DCN_LIBRARY names does not load" in found and "broken.so: file too short" in found
    code = INSTALLED.format(str(broken))
    assert "broken.so: file too short. Build it again" in run_python(code, DCN_LIBRARY="")


@pytest.fixture(scope="module")
def library_without_its_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that needs another one which is not there, as a CUDA build does on a CPU-only torch."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("library")
    (folder / "needed.c").write_text("int needed(void) { return 1; }")
    (folder / "ours.c").write_text("int needed(void); int ours(void) { return needed(); }")
    for command in (
        ["needed.c", "-o", "libtorch_cuda_that_is_gone.so"],
        ["ours.c", "-o", "ours.so", "-L.", "-ltorch_cuda_that_is_gone"],
    ):
        subprocess.run([compiler, "-shared", "-fPIC", *command], cwd=folder, check=True)
    (folder / "libtorch_cuda_that_is_gone.so").unlink()
    return folder / "ours.so"


def test_the_library_that_is_missing_is_named(library_without_its_cuda: Path) -> None:
    without_cuda = "import torch\ntorch.version.cuda = None\n"
    code = without_cuda + "try:\n    import dcn_d2.ops\nexcept OSError as error:\n    print(error)"
    found = run_python(code, DCN_LIBRARY=str(library_without_its_cuda))
    assert f"the library {library_without_its_cuda} that DCN_LIBRARY names does not load" in found
    assert "libtorch_cuda_that_is_gone.so: cannot open shared object file" in found
    assert "built with CUDA kernels, but PyTorch" in found and "has no CUDA" in found
    code = without_cuda + INSTALLED.format(str(library_without_its_cuda))
    found = run_python(code, DCN_LIBRARY="")
    assert f"the compiled library {library_without_its_cuda} does not load: libtorch_cuda_that_is_gone.so" in found
    assert "Build it again for this PyTorch" in found


def test_work_is_spread_over_all_threads() -> None:
    # A library built without OpenMP would run silently on one thread: count the threads that have used the CPU.
    if not Path("/proc/self/task").is_dir():
        pytest.skip("needs Linux's /proc")
    code = """
import os, torch
torch.set_num_threads(3)
from dcn_d2.ops import deform_conv2d
x, o, w = torch.randn(1, 16, 64, 64), torch.randn(1, 18, 64, 64), torch.randn(16, 16, 3, 3)
before = {int(t) for t in os.listdir("/proc/self/task")}
deform_conv2d(x, o, w, padding=1)
print(len({int(t) for t in os.listdir("/proc/self/task")} - before))
"""
    assert int(run_python(code).split()[0]) >= 2


# Loads the compiled library as a program without dcn_d2 does, and calls an operator.
LOADED_ALONE = """
import sys, torch
torch.ops.load_library({library!r})
x, o, w = torch.rand(1, 2, 5, 5), torch.randn(1, 18, 5, 5), torch.rand(2, 2, 3, 3)
expected = torch.ops.dcn_d2.deform_conv2d(x, o, w, None, [1, 1], [1, 1])
assert torch.ops.dcn_d2.capability() and torch.ops.dcn_d2._allows_tf32() and "dcn_d2" not in sys.modules
"""


def test_operators_run_where_only_the_library_is_loaded_and_dcn_d2_may_be_imported_later() -> None:
    """TorchScript files and AOTInductor packages need it so."""
    code = LOADED_ALONE + (
        """
import dcn_d2.ops
assert torch.equal(dcn_d2.ops.deform_conv2d(x, o, w, padding=1), expected)
assert "before dcn_d2 was imported" in dcn_d2.ops._library.loaded_kernels
leaf = x.clone().requires_grad_()
dcn_d2.ops.deform_conv2d(leaf, o, w, padding=1).sum().backward()
assert leaf.grad is not None
for allowed in (True, False):
    torch.backends.cudnn.allow_tf32 = allowed
    assert torch.ops.dcn_d2._allows_tf32() == allowed
"""
    )
    assert run_python(code.format(library=compiled_library()), PYTHONWARNINGS="error") == ""


def test_a_second_copy_of_the_library_is_told_and_not_used(tmp_path: Path) -> None:
    copy = shutil.copy(compiled_library(), tmp_path / "copy.so")
    code = LOADED_ALONE.format(library=compiled_library()) + f"torch.ops.load_library({str(copy)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Tried to register an operator (dcn_d2::deform_conv2d" in done.stderr


@pytest.mark.parametrize(
    ("schema", "found"),
    [("capability() -> int", r"dcn_d2::capability\(\) -> str"), ("none() -> int", "no operator none")],
)
def test_a_library_of_another_version_is_refused(schema: str, found: str) -> None:
    with pytest.raises(ImportError, match=f"another version of dcn_d2: it defines {found}, but .* Build it again"):
        _library.define(schema)


def test_operators_tell_compilers_that_they_need_exact_strides() -> None:
    names = [name for function in dcn_d2.ops.OPERATORS for name in (function.__name__, f"{function.__name__}_backward")]
    for name in (*names, "batched_nms"):
        assert torch.Tag.needs_exact_strides in getattr(torch.ops.dcn_d2, name).default.tags


def test_operators_are_registered() -> None:
    for function in dcn_d2.ops.OPERATORS:
        for operator in (function.__name__, f"{function.__name__}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dcn_d2::{operator}", "CPU")


def scripted(x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return dcn_d2.ops.deform_conv2d(x, offset, weight, padding=1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_functions_may_call_operators() -> None:
    operands = torch.randn(1, 2, 5, 6), torch.randn(1, 18, 5, 6), torch.randn(3, 2, 3, 3)
    function = torch.jit.script(scripted)
    assert torch.equal(function(*operands), scripted(*operands))

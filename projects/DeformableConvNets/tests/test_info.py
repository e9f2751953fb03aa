# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""python -m dcn_d2.info."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcn_d2 import __version__, info, ops


def test_it_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    printed = capsys.readouterr().out
    for fact in (__version__, torch.__version__, "detectron2", "kernels for   cpu", "cache"):
        assert fact in printed


def test_all_operators_agree_with_their_references_in_all_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        info.main(["--check"])
    assert stopped.value.code == 0, capsys.readouterr().out


def test_a_wrong_operator_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.deform_roi_pool
    monkeypatch.setattr(ops, "deform_roi_pool", lambda x, *others: right(x, *others) * 1.2)
    with pytest.raises(SystemExit) as stopped:
        info.main(["--check"])
    assert stopped.value.code == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if "differs" in line]
    assert faults and all("deform_roi_pool" in line for line in faults)


def test_other_strides_than_promised_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "strides_of_fake", lambda operator, operands: (1, 2, 3, 4))
    assert any("promised are (1, 2, 3, 4)" in fault for fault in info.check("cpu"))


def test_what_stops_an_operator_is_a_fault_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*operands: object, **arguments: object) -> None:
        raise RuntimeError("DCN_CPU_CAPABILITY must be default, avx2, avx512 or amx, got sse")

    monkeypatch.setattr(ops, "deform_conv2d", stop)
    with pytest.raises(SystemExit) as stopped:
        info.main(["--check"])
    assert stopped.value.code == 1
    assert "  DCN_CPU_CAPABILITY must be default, avx2, avx512 or amx, got sse\n" in capsys.readouterr().out


def test_a_library_that_does_not_load_is_told_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"DCN_LIBRARY": str(tmp_path / "none.so")}
    command = [sys.executable, "-m", "dcn_d2.info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"dcn_d2.info: the library {tmp_path}/none.so that DCN_LIBRARY names does not load")


def test_an_older_library_is_told_in_one_line() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch.so"  # loads, and has no operators of dcn_d2
    environment = os.environ | {"DCN_LIBRARY": str(library)}
    command = [sys.executable, "-m", "dcn_d2.info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"dcn_d2.info: the compiled library {library} was built from another version of dcn_d2")


def test_the_file_of_the_kernels_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    named = line(capsys, "kernels").removeprefix("compiled, in ")
    assert Path(named).is_file()


def line(capsys: pytest.CaptureFixture[str], name: str) -> str:
    """The text that the output has for a name."""
    info.main([])
    (found,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith(f"{name}  ")]
    return found.removeprefix(name).strip()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the queries of a compiled library with kernels for CPU and CUDA; at first it has none."""
    queries = SimpleNamespace()
    monkeypatch.setattr(torch.ops, "dcn_d2", queries)
    monkeypatch.setattr(info, "compiled_devices", lambda: ["cpu", "cuda"])
    monkeypatch.delenv("DCN_CPU_CAPABILITY", raising=False)
    return queries


def test_it_names_the_instruction_set_and_the_gpu_architectures(
    library: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    library.capability, library.cuda_architectures = lambda: "avx512", lambda: "8.0 9.0"
    assert line(capsys, "CPU kernels") == "avx512, DCN_CPU_CAPABILITY not set"
    assert line(capsys, "CUDA kernels") == "compiled for 8.0 9.0"


@pytest.mark.parametrize("answers", [False, True], ids=["no query", "an empty answer"])
def test_of_a_library_that_does_not_tell_it_says_unknown(
    library: SimpleNamespace, capsys: pytest.CaptureFixture[str], answers: bool
) -> None:
    if answers:
        library.capability = library.cuda_architectures = lambda: ""
    assert line(capsys, "CPU kernels").startswith("unknown instruction set, ")
    assert line(capsys, "CUDA kernels") == "compiled for unknown architectures"


def test_without_kernels_it_says_none(
    library: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "compiled_devices", lambda: [])
    assert line(capsys, "CPU kernels").startswith("none, ") and line(capsys, "CUDA kernels") == "none"


def test_a_query_that_fails_is_told_and_stops_nothing(
    library: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise RuntimeError("DCN_CPU_CAPABILITY must be default, avx2, avx512 or amx, got x\nat some place")

    library.capability = refuse
    assert line(capsys, "CPU kernels").startswith("unknown: DCN_CPU_CAPABILITY must be default, ")


@pytest.mark.parametrize(
    ("capability", "compiled", "words"),
    [
        ((8, 0), "8.0 9.0", ""),
        ((8, 6), "8.0 9.0", ""),  # runs the code for 8.0
        ((7, 5), "8.0 9.0", "; the library was not compiled for it, but for 8.0 9.0: build the library again with "),
        ((8, 0), "8.6", "; the library was not compiled for it, but for 8.6: build the library again with "),
        ((12, 0), "9.0", "; the library was not compiled for it, but for 9.0: build the library again with "),
        ((8, 0), None, ""),  # not known
    ],
)
def test_a_gpu_that_the_library_was_not_compiled_for_is_told(
    library: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    compiled: str | None,
    words: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    if compiled:
        library.cuda_architectures = lambda: compiled
    number = ".".join(map(str, capability))
    told = f"{words}TORCH_CUDA_ARCH_LIST={number}" if words else ""
    assert line(capsys, "cuda:0") == f"Some GPU, compute capability {number}{told}"
    monkeypatch.setattr(info, "compiled_devices", lambda: ["cpu"])
    assert "; the library has no CUDA kernels, so the slow reference runs there: " in line(capsys, "cuda:0")

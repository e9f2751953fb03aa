# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""The scripts in dev/ select tests by markers: what each of them must find, whatever the tests are called."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .paths import PATHS
from .samples import OPERATORS, POOLINGS

pytestmark = pytest.mark.unsanitized
# Collects once, and tells for each expression which tests `pytest -m` selects by it.
COLLECT = """
import json, sys
import pytest
from _pytest.mark import MarkMatcher
from _pytest.mark.expression import Expression

class Collected:
    def pytest_collection_finish(self, session):
        found = {"": [item.nodeid for item in session.items]}
        for text in sys.argv[2:]:
            expression = Expression.compile(text)
            found[text] = [
                item.nodeid
                for item in session.items
                if expression.evaluate(MarkMatcher.from_markers(item.iter_markers()))
            ]
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)

sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/ops"], [Collected()]))
"""
ARITHMETIC = ("float64", "float32", "tf32", "bfloat16", "float16")


def expressions(project: Path) -> dict[str, str]:
    """What the scripts select by, by the name of the stage or of the script."""

    def first(pattern: str, text: str) -> str:
        match = re.search(pattern, text, re.M)
        assert match is not None, pattern
        return match[1]

    gpu_check = (project / "dev/gpu_check.sh").read_text()
    kernels = first('run_tests "(one_kernel.*?)"', gpu_check)
    stages = {
        "tests": first(r"^tests\(\) \{ run_tests '(.*?)'", gpu_check),
        "determinism": first(r"^determinism\(\) \{ run_tests '(.*?)'", gpu_check),
        "memcheck": first(r"CACHING=1 run_tests '(.*?)'", gpu_check),
    } | {f"kernels {kind}": kernels.replace("$kind", kind) for kind in ARITHMETIC}
    always = first(r'-m "(.*) and \$selected" tests/ops', gpu_check)
    return {name: f"{always} and {text}" for name, text in stages.items()} | {
        "sanitize": first(r"tests/ops -m '(.*)'", (project / "dev/sanitize.sh").read_text()),
        "instruction sets": "instruction_set and not gpu",
        "gpu": "gpu",
        "slow": "slow",
    }


@pytest.fixture(scope="module")
def selected(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The tests by the name of what selects them, and all under the empty name."""
    wanted = expressions(project)
    file = tmp_path_factory.mktemp("markers") / "selected.json"
    command = [sys.executable, "-c", COLLECT, str(file), *wanted.values()]
    environment = os.environ | {"PYTEST_ADDOPTS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    return {name: {node.removeprefix("tests/ops/") for node in found[wanted.get(name, "")]} for name in ("", *wanted)}


def functions(tests: set[str]) -> Counter[str]:
    return Counter(test.partition("[")[0] for test in tests)


def test_all_that_needs_a_gpu_is_marked_and_nothing_else(selected: dict[str, set[str]]) -> None:
    """A test without the marker would fail here for want of a GPU; one that has it without need would never run."""
    on_gpu = selected["gpu"]
    named = {test for test in selected[""] if re.search(r"[\[-]cuda[\]-]|_on_a_gpu(\[|$)|^test_cuda\.py", test)}
    assert on_gpu == named
    for test in ("equals_reference", "gradcheck", "opcheck", "wild_offsets_read_zero", "deform_conv2d_against_float64"):
        assert any(f"::test_{test}" in each for each in on_gpu), test


def test_every_test_on_a_gpu_is_in_a_stage(selected: dict[str, set[str]]) -> None:
    assert selected["tests"] | selected["determinism"] == selected["gpu"] - selected["slow"]
    assert not selected["tests"] & selected["determinism"]
    assert len(selected["tests"]) > 800


def test_determinism_covers_every_operator(selected: dict[str, set[str]]) -> None:
    tests = selected["determinism"]
    assert tests <= selected["gpu"]
    for operator in OPERATORS:
        assert any(re.search(rf"[\[-]{operator}[\]-]", test) for test in tests), operator


def test_kernels_one_by_one_in_every_arithmetic(selected: dict[str, set[str]]) -> None:
    kinds = [selected[f"kernels {kind}"] for kind in ARITHMETIC]
    assert [len(kind) for kind in kinds] == [10] * 5 and len(set().union(*kinds)) == 50
    assert set().union(*kinds) <= selected["gpu"]


def test_memory_checkers_run_every_operator(selected: dict[str, set[str]]) -> None:
    tests = selected["memcheck"]
    assert tests <= selected["gpu"] and set(functions(tests)) == {"test_values.py::test_equals_reference"}
    for operator in OPERATORS:
        small = ("modulated",) if operator in POOLINGS else ("uneven", "tensor_cores", "tensor_cores_grouped")
        formats = ("NCHW", "NHWC") if operator == "modulated_deform_conv2d" else ("NCHW",)
        for sample in small:
            for dtype in ("float64", "float32", "float16", "bfloat16"):
                for name in formats:
                    case = f"{operator}-cuda-{sample}-{dtype}-{name}"
                    assert f"test_values.py::test_equals_reference[{case}]" in tests
    assert len(tests) < 60  # the checkers slow kernels down a hundredfold


def test_every_path_of_the_cpu_runs_on_every_instruction_set(selected: dict[str, set[str]]) -> None:
    tests = selected["instruction sets"]
    (which,) = [test for test in tests if test.startswith("test_instruction_sets.py")]
    assert which.endswith("::test_the_best_instruction_set_is_used_up_to_the_one_asked_for")
    for path in PATHS:
        for operator in path.samples if path.device == "cpu" else ():
            for function in ("test_values.py::test_equals_reference", "test_threads.py::test_any_number_of_threads"):
                assert any(test.startswith(f"{function}[{operator}-{path.name}-") for test in tests), (path, function)


def test_the_sanitizers_run_all_that_calls_kernels(selected: dict[str, set[str]]) -> None:
    tests, found = selected["sanitize"], functions(selected["sanitize"])
    assert selected["instruction sets"] <= tests and not tests & selected["gpu"]
    assert len(tests) > 1450
    files = ("accuracy", "any_shape", "edges", "layouts", "half_precision", "wild_values", "strides", "refusals")
    for file in files:
        assert any(name.startswith(f"test_{file}.py") for name in found), file
    assert found["test_sanitizers.py::test_a_read_past_the_end_is_noticed"] == 2
    assert not any(name.startswith("test_library.py") for name in found)

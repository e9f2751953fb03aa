# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
"""dev/gpu_check.sh with a stand-in for Python: which stages run, what is left, what a failure changes; the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from dev import gpu_report, losses

FIRST = "load kernels price profile".split()
FULL = "load tests bfloat16 tf32 float32 float16 times detector pooling determinism training memory memcheck".split()
# Does what its arguments ask of Python, as far as the script looks at it. FAIL, HANG and MISSING are patterns of
# arguments: fail, take long, exit with 3 until something was built.
STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$LOG"
printf '%s|%s\n' "${DCN_LIBRARY:-}" "${DCN_COMMIT:-}" >>"$LOG.environment"
[[ -n ${FAIL:-} && $* =~ $FAIL ]] && { echo "FAILED because of ${BASH_REMATCH[0]}"; exit 1; }
[[ -n ${HANG:-} && $* =~ $HANG ]] && sleep 60
[[ $* == *build_ext* ]] && touch "$LOG.built"
[[ -n ${MISSING:-} && $* =~ $MISSING && ! -e $LOG.built ]] && exit 3
previous=
for word in "$@"; do
  if [[ $previous == --output ]]; then echo '{}' >"$word"; fi
  previous=$word
done
if [[ $1 == - ]]; then cat >/dev/null; echo "Some GPU"; fi
if [[ $* == *pytest* ]]; then echo "7 passed, 1 skipped"; fi
exit 0
"""
NCU = r"""#!/usr/bin/env bash
printf 'ncu %s\n' "$*" >>"$LOG"
if [[ $* == *--import* ]]; then echo '"ID"'; fi
"""


def make_tree(project: Path, folder: Path) -> Path:
    """A copy of what the script needs, outside any repository; returns its project folder."""
    copy = folder / "tree/projects/DeformableConvNets"
    for name in ("dev", "csrc"):
        shutil.copytree(project / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dcn_d2", "benchmarks", "tests"):
        (copy / name).mkdir()
        (copy / name / "x.py").touch()
    for pattern in ("__init__.py", "goal*.py", "rows.py"):
        for path in (project / "benchmarks").glob(pattern):
            shutil.copy(path, copy / "benchmarks")
    shutil.copy(project / "setup.py", copy)
    return copy


def arrange(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a run, with the stand-ins first on the PATH."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    sanitizer = '#!/bin/sh\nshift 8\nexec "$@"\n'
    for name, text in (("python", STAND_IN), ("compute-sanitizer", sanitizer), ("ncu", NCU)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    left_out = ("RESULTS", "OUT", "SECONDS_LEFT", "DCN_COMMIT", "DCN_LIBRARY", "VENV")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"PATH": f"{tools}:{environment['PATH']}", "LOG": str(folder / "log")}
    # The script's folder may lie in no repository, but the test's may.
    environment |= {"PYTHON": str(tools / "python"), "OUT": str(folder / "results")}
    return environment | {"GIT_CEILING_DIRECTORIES": str(folder)} | variables


class Run:
    """One run of the script and what it left."""

    def __init__(
        self,
        tree: Path,
        *arguments: str,
        called: str = "",
        cwd: Path | None = None,
        seconds: int = 100,
        **variables: str,
    ) -> None:
        folder = tree.parents[2]
        environment = arrange(folder, **{"SECONDS_LEFT": str(seconds)} | variables)
        command = ["bash", called or str(tree / "dev/gpu_check.sh"), *arguments]
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
        self.status, self.output, self.errors = done.returncode, done.stdout, done.stderr
        self.results, log = folder / "results", folder / "log"
        mode = arguments[0] if arguments and arguments[0] in ("first", "full") else "some"
        summary = self.results / f"gpu_check_{mode}.txt"
        self.summary = summary.read_text() if summary.exists() else ""
        self.calls = log.read_text().splitlines() if log.exists() else []

    def verdicts(self) -> dict[str, str]:
        return {stage: verdict for verdict, stage in re.findall(r"^(PASS|FAIL|SKIP) (\w+) ", self.summary, re.M)}

    def archived(self) -> set[str]:
        (path,) = self.results.glob("*.tar.gz")
        with tarfile.open(path) as archive:
            return {Path(name).relative_to(path.name.partition(".")[0]).as_posix() for name in archive.getnames()}


@pytest.fixture
def tree(project: Path, tmp_path: Path) -> Path:
    return make_tree(project, tmp_path)


@pytest.mark.parametrize(("mode", "stages"), [("first", FIRST), ("full", FULL)])
def test_every_stage_of_a_mode_runs_and_leaves_its_output_in_one_archive(
    tree: Path, mode: str, stages: list[str]
) -> None:
    run = Run(tree, mode)
    assert run.status == 0, run.output + run.errors
    assert run.verdicts() == dict.fromkeys(stages, "PASS") and list(run.verdicts()) == stages
    # Few files come home from some machines: one has everything.
    assert sorted(p.name for p in run.results.iterdir()) == [f"gpu_check_{mode}.tar.gz", f"gpu_check_{mode}.txt"]
    wanted = {f"{stage}.txt" for stage in stages} | {"summary.txt"}
    if mode == "first":
        wanted |= {
            "deform_conv2d_cuda_bfloat16.json",
            "profile_cuda.json",
            "profile_counters.csv",
            "profile_source.csv",
        }
    else:
        wanted |= {f"deform_conv2d_cuda_{dtype}.json" for dtype in ("bfloat16", "tf32", "float32", "float16")}
        wanted |= {f"deform_roi_pool_cuda_{dtype}.json" for dtype in ("float32", "float16")}
        wanted |= {"deform_conv2d_memory_cuda_bfloat16.json", "detector_cuda_float16.json"}
    assert wanted <= run.archived()
    if mode == "first":
        (measured,) = [call for call in run.calls if "benchmarks.deform_conv2d" in call]
        assert "--dtype bfloat16" in measured and "--peers none" in measured and "rotated" not in measured
        assert sum("one_kernel(arithmetic=" in call for call in run.calls) == 5


def test_it_runs_when_called_by_a_relative_path_from_the_repositorys_root(tree: Path) -> None:
    root = tree.parents[1]
    run = Run(tree, "load", "tests", called="projects/DeformableConvNets/dev/gpu_check.sh", cwd=root)
    assert run.verdicts() == {"load": "PASS", "tests": "PASS"}, run.output + run.errors


def test_it_runs_when_called_from_another_folder_with_relative_paths(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tree/projects"
    called = "DeformableConvNets/dev/gpu_check.sh"
    run = Run(tree, "load", called=called, cwd=elsewhere, OUT="../../results", PYTHON="../../tools/python")
    assert run.verdicts() == {"load": "PASS"}, run.output + run.errors


def test_it_runs_when_called_through_a_link(tree: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.sh"
    link.symlink_to(tree / "dev/gpu_check.sh")
    run = Run(tree, "load", called=str(link))
    assert run.verdicts() == {"load": "PASS"} and (tree / "build/gpu_check_some").is_dir(), run.output + run.errors


def test_a_python_that_is_not_there_is_an_error(tree: Path) -> None:
    run = Run(tree, "load", PYTHON="python3.99")
    assert run.status == 2 and "PYTHON=python3.99 is not a program" in run.errors


@pytest.mark.parametrize("value", ["abc", "1.5", "-3", "5 minutes"])
def test_a_limit_that_is_not_a_number_is_an_error(tree: Path, value: str) -> None:
    run = Run(tree, "load", SECONDS_LEFT=value)
    assert run.status == 2 and not run.calls
    assert run.errors == f"gpu_check: SECONDS_LEFT={value} should be a whole number of seconds, such as 240\n"


@pytest.mark.parametrize("place", ["/proc/self", "a file"])
def test_results_that_cannot_be_written_are_noticed_at_once(tree: Path, tmp_path: Path, place: str) -> None:
    if place == "a file":
        place = str(tmp_path / "file")
        Path(place).touch()
    run = Run(tree, "load", RESULTS=place)
    assert run.status == 2 and not run.calls
    assert run.errors == f"gpu_check: the results cannot be written to {place}. Name another folder: RESULTS=path\n"


def test_the_summaries_of_both_modes_stay(tree: Path) -> None:
    for mode in ("first", "full"):
        Run(tree, mode)
    for mode in ("first", "full"):
        text = (tree.parents[2] / f"results/gpu_check_{mode}.txt").read_text()
        assert text.startswith(f"gpu_check_{mode}, ") and "the report failed" not in text


def test_help_is_the_scripts_own_introduction(tree: Path) -> None:
    run = Run(tree, "--help")
    assert run.status == 0 and "dev/gpu_check.sh first" in run.output and "#" not in run.output
    assert not run.calls and "set -uo" not in run.output


def path_without_git(folder: Path) -> str:
    """A folder with links to everything that is on the PATH, except git."""
    programs = folder / "programs"
    programs.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            if not program.name.startswith("git"):
                link = programs / program.name
                link.unlink(missing_ok=True)
                link.symlink_to(program)
    return f"{folder / 'tools'}:{programs}"


@pytest.mark.parametrize("git", [True, False], ids=["git on the PATH", "no git on the PATH"])
def test_a_tree_without_git_runs_and_says_so(tree: Path, tmp_path: Path, git: bool) -> None:
    path = {} if git else {"PATH": path_without_git(tmp_path)}
    if not git:
        assert shutil.which("git", path=path["PATH"]) is None
    run = Run(tree, "first", **path)
    assert run.status == 0, run.output + run.errors
    assert run.verdicts() == dict.fromkeys(FIRST, "PASS")
    assert run.summary.startswith("gpu_check_first, commit unknown, ")


def test_the_archive_keeps_what_was_done_when_the_run_is_killed(tree: Path, tmp_path: Path) -> None:
    environment = arrange(tmp_path, HANG="tf32")
    command = ["bash", str(tree / "dev/gpu_check.sh"), "full"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (tree / "build/gpu_check_full/tf32.txt").exists():
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with tarfile.open(tmp_path / "results/gpu_check_full.tar.gz") as archive:
        names = archive.getnames()
    assert "gpu_check_full/deform_conv2d_cuda_bfloat16.json" in names and "gpu_check_full/tests.txt" in names
    assert "PASS bfloat16" in (tmp_path / "results/gpu_check_full.txt").read_text()


def processes_with(words: str) -> list[str]:
    """Command lines of running processes in which these words stand."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if words in command:
            found.append(command)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_the_running_stage_and_the_run(tree: Path, tmp_path: Path, number: signal.Signals) -> None:
    environment = arrange(tmp_path, HANG="tf32")
    command = ["bash", str(tree / "dev/gpu_check.sh"), "load", "tf32", "pooling"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    stage = f"{tmp_path}/tools/python -m benchmarks.deform_conv2d"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not processes_with(stage):
            time.sleep(0.1)
        assert processes_with(stage)
        # A terminal sends Ctrl-C to the whole group of the script.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        begin = time.monotonic()
        said, _ = process.communicate(timeout=30)
        assert time.monotonic() - begin < 15, "it waited for the stage"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 130, said
    assert not processes_with(stage)
    summary = (tmp_path / "results/gpu_check_some.txt").read_text()
    assert re.search(r"^PASS load .*\nFAIL tf32 \(\d+ s, interrupted\)\n$", summary, re.M) and "pooling" not in summary
    with tarfile.open(tmp_path / "results/gpu_check_some.tar.gz") as archive:
        assert "gpu_check_some/tf32.txt" in archive.getnames()


def test_a_stage_that_fails_does_not_stop_the_others(tree: Path) -> None:
    run = Run(tree, "full", FAIL="not determinism|train_net")
    assert run.status == 1
    assert run.verdicts() == dict.fromkeys(FULL, "PASS") | dict.fromkeys(("tests", "training"), "FAIL")
    assert re.search(r"FAIL tests \(\d+ s, exit status 1\)", run.summary)


def test_a_stage_out_of_time_is_stopped_and_no_other_begins_late(tree: Path) -> None:
    run = Run(tree, "load", "tests", "detector", "memcheck", seconds=4, HANG="detector")
    assert run.status == 1
    assert run.verdicts() == {"load": "PASS", "tests": "PASS", "detector": "FAIL", "memcheck": "FAIL"}
    assert re.search(r"FAIL detector \(\d+ s, stopped after [34] s\)", run.summary)
    assert "no time was left" in run.summary


def test_without_a_gpu_nothing_else_runs(tree: Path) -> None:
    run = Run(tree, "full", FAIL="^-$")
    assert run.status == 1
    assert run.verdicts() == {"load": "FAIL"} and "nothing else can run" in run.summary
    assert not any(word in call for call in run.calls for word in ("-m pytest", "-m benchmarks", "build_ext"))


def test_with_the_real_python_it_goes_as_far_as_no_gpu(project: Path, tree: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for mode in ("first", "full"):
        run = Run(tree, mode, PYTHON=sys.executable)
        assert run.status == 1 and run.verdicts() == {"load": "FAIL"}
        assert f"no GPU is visible to torch {torch.__version__}" in run.output
        # The summary says why.
        assert f"  gpu_check: no GPU is visible to torch {torch.__version__}" in run.summary


# Makes torch take the CPU for a GPU.
CPU_AS_GPU = """
import torch
ones, zeros, has_kernel = torch.ones, torch.zeros, torch._C._dispatch_has_kernel_for_dispatch_key
torch.ones = lambda *sizes, device, **options: ones(*sizes, **options)
torch.zeros = lambda *sizes, device, **options: zeros(*sizes, **options)
torch._C._dispatch_has_kernel_for_dispatch_key = lambda name, key: has_kernel(name, "CPU" if key == "CUDA" else key)
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: "a GPU"
torch.cuda.get_device_capability = lambda: (9, 0)
"""


def test_the_check_of_the_library_passes_where_every_operator_has_its_kernels(project: Path) -> None:
    script = (project / "dev/gpu_check.sh").read_text()
    (code,) = re.findall(r"^check_library\(\) {\n.*?<<'PY'\n(.*?)^PY$", script, re.M | re.S)
    run = subprocess.run([sys.executable, "-c", CPU_AS_GPU + code], cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("a GPU (9.0), torch ")


def test_a_library_that_does_not_load_is_built_there(tree: Path) -> None:
    run = Run(tree, "load", "tests", MISSING="^-( |$)")
    assert run.verdicts() == {"load": "PASS", "tests": "PASS"}, run.output
    assert sum("build_ext" in call for call in run.calls) == 1


def pack(tree: Path, **changes: str) -> None:
    """What dev/gpu_pack.sh leaves, with a library that is none."""
    folder = tree.parents[1] / ".gpu"
    folder.mkdir()
    (folder / "_C.abi3.so").touch()
    script = '. dev/digest.sh; digest "$@"'

    def digest(*names: str) -> str:
        command = ["bash", "-c", script, "_", ".", *names]
        return subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout.strip()

    facts = {"commit": "abc123def456", "changes": "0", "library": digest("csrc", "setup.py")}
    facts["project"] = digest("csrc", "setup.py", "dcn_d2", "benchmarks", "tests", "dev")
    (folder / "PACKED").write_text("".join(f"{name} {value}\n" for name, value in (facts | changes).items()))


def test_the_packed_library_and_commit_are_used(tree: Path, tmp_path: Path) -> None:
    pack(tree)
    run = Run(tree, "load", "tf32")
    assert run.summary.startswith("gpu_check_some, commit abc123def456, ")
    seen = set((tmp_path / "log.environment").read_text().splitlines())
    assert f"{tree.parents[1] / '.gpu/_C.abi3.so'}|abc123def456" in seen


def test_a_library_of_other_sources_is_not_used(tree: Path, tmp_path: Path) -> None:
    pack(tree)
    (tree / "csrc/sample.h").write_text("// changed\n")
    run = Run(tree, "load")
    assert "made from other sources" in run.summary and "commit abc123def456 with changes," in run.summary
    assert set((tmp_path / "log.environment").read_text().splitlines()) == {"|abc123def456 with changes"}


@pytest.mark.parametrize("changed", ["nothing", "a benchmark", "packed with changes"])
def test_results_name_the_packed_commit_and_whether_it_is_what_ran(tree: Path, changed: str) -> None:
    pack(tree, **({"changes": "1"} if changed == "packed with changes" else {}))
    if changed == "a benchmark":
        (tree / "benchmarks/x.py").write_text("x = 1\n")
    words = "abc123def456" if changed == "nothing" else "abc123def456 with changes"
    assert Run(tree, "load").summary.startswith(f"gpu_check_some, commit {words}, ")


@pytest.mark.parametrize("changed", [False, True])
def test_a_repository_of_another_commit_around_the_tree_does_not_name_the_results(tree: Path, changed: bool) -> None:
    """As where the files of a tree were copied over an older checkout."""
    root = tree.parents[1]
    commands = ["init -q", "-c user.name=a -c user.email=a@example.org commit -q --allow-empty -m old"]
    for command in commands:
        subprocess.run(["git", *command.split()], cwd=root, check=True, capture_output=True)
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()
    pack(tree)
    if changed:  # since it was packed: then git's answer counts
        (tree / "benchmarks/x.py").write_text("x = 1\n")
    assert Run(tree, "load").summary.startswith(f"gpu_check_some, commit {head if changed else 'abc123def456'}, ")


def test_a_wheel_that_does_not_fit_keeps_no_other_out(tree: Path) -> None:
    wheels = tree.parents[1] / ".whl"
    wheels.mkdir()
    for name in ("bad-1-py3-none-any.whl", "good-1-py3-none-any.whl"):
        (wheels / name).touch()
    run = Run(tree, "load", FAIL="bad-1")
    assert run.verdicts() == {"load": "PASS"}
    assert "bad-1-py3-none-any.whl was not installed" in run.output
    assert any(call.endswith("/good-1-py3-none-any.whl") and "bad-1" not in call for call in run.calls)
    assert all("--no-index" in call for call in run.calls if "pip install" in call)


def test_a_profile_without_nsight_compute_is_skipped_with_the_reason(tree: Path, tmp_path: Path) -> None:
    programs = path_without_git(tmp_path)
    arrange(tmp_path)
    for found in (tmp_path / "tools/ncu", tmp_path / "programs/ncu"):
        found.unlink(missing_ok=True)
    # `Run` would write the stand-in again.
    environment = arrange(tmp_path, PATH=programs)
    (tmp_path / "tools/ncu").unlink()
    command = ["bash", str(tree / "dev/gpu_check.sh"), "profile"]
    if any(Path(place).exists() for place in ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute")):
        pytest.skip("ncu is installed here")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^SKIP profile \(\d+ s, ncu was not found .*\)$", done.stdout, re.M)
    assert (tree / "build/gpu_check_some/profile_cuda.json").exists()  # what needs no ncu


def test_a_run_in_which_every_test_was_skipped_fails(tree: Path) -> None:
    run = Run(tree, "determinism", PYTHON="/bin/true")
    assert run.status == 1 and run.verdicts() == {"determinism": "FAIL"}
    assert "no test ran on the GPU" in run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tests", "bench"), "unknown stage 'bench'"),
        (("first", "full"), "take no further stages"),
        ((), "say what to run"),
    ],
)
def test_what_it_cannot_run_is_refused(tree: Path, arguments: tuple[str, ...], message: str) -> None:
    run = Run(tree, *arguments)
    assert run.status == 2 and message in run.errors
    assert not run.summary and not run.calls


def conv_row(name: str, batch: int, direction: str, plain: float, ours: float) -> dict[str, Any]:
    milliseconds = {"conv NCHW": 9.0, "conv NHWC": plain, "dcn_d2 NHWC": ours, "torchvision": 1.0}
    shape = {"name": name, "batch": batch, "stride": 1, "groups": 1, "deform_groups": 1, "mask": True}
    row = {"shape": shape, "pass": direction, "dtype": "bfloat16", "threads": 1, "buffers": "hot"}
    return row | {"milliseconds": {key: {"median": value} for key, value in milliseconds.items()}}


COUNTERS = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","l1tex__t_sector_hit_rate.pct","launch__registers_per_thread",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","us","%","register/thread","inst","inst"
"0","short_kernel","12.5","50","32","0.5","0.25"
"1","product_kernel<SampleGather>","1,234.56","20.4","128","1.5","6.25"
"""


def test_the_report_shows_failures_prices_kernels_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "verdicts.txt").write_text("PASS load (3 s)\nFAIL tests (9 s, exit status 1)\n")
    lines = [f"FAILED tests/ops/test_x.py::test_{n} - AssertionError" for n in range(7)]
    (tmp_path / "tests.txt").write_text("\n".join(["....F", *lines]))
    rows = [conv_row("c3", 16, "forward", 0.1, 0.25), conv_row("c3", 2, "forward", 0.02, 0.03)]
    rows += [conv_row("c3", 2, "forward+backward", 0.05, 0.2)]
    (tmp_path / "deform_conv2d_cuda_bfloat16.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "deform_conv2d_cuda_tf32.json").write_text('{"rows": [{"cut off')
    kernels = {"product_kernel": {"microseconds": 300.0, "launches": 1.0}}
    profile = {"shape": {"name": "c3", "batch": 16}, "pass": "forward+backward", "dtype": "bfloat16"}
    profile |= {"contestant": "dcn_d2", "kernels": kernels}
    (tmp_path / "profile_cuda.json").write_text(json.dumps({"rows": [profile]}))
    (tmp_path / "profile_counters.csv").write_text(COUNTERS)
    gpu_report.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "tests: 9 s, exit status 1 (and 2 more)" in text and "test_4" in text and "test_5" not in text
    table = [line.split() for line in text.splitlines() if line.startswith("c3 ")]
    assert table == [["c3", "N=2", "20>30", "1.50", "50>200", "4.00"], ["c3", "N=16", "100>250", "2.50", "-"]]
    assert "300.0 us  1.0 x  product_kernel" in text
    first = next(line for line in text.splitlines() if "long_scoreboard" in line)
    assert first.split()[:2] == ["1234.6", "20"] and first.endswith("long_scoreboard 6.2, product_kernel<SampleGather>")
    assert text.index("product_kernel<SampleGather>") < text.index("short_kernel")
    assert "no time counts where a result is wrong" in text
    # Means of 1.5 and 2.5, and of 4 alone.
    assert "missed by 2.0 times: CUDA, bfloat16 forward+backward price, channels_last, hot" in text
    assert "missed by 1.4 times: CUDA, bfloat16 forward price, channels_last, hot" in text
    assert len(text.splitlines()) < 50


def test_the_report_of_an_empty_folder_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_report.main([str(tmp_path)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [[], ["gpu_check_full.tar.gz"]])
def test_a_report_of_no_folder_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main(arguments)
    assert stopped.value.code == 2
    assert ("is not a folder" if arguments else "required: FOLDER") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3.0, 2.5, 2.0, 1.5], ""),
        ([3.0, 2.5, 2.0, 3.5], "from 3.000 to 3.500"),
        ([3.0, float("nan"), 2.0, 1.5], "not finite"),
        ([3.0, 2.0], "only 2 losses"),
    ],
)
def test_losses_must_be_finite_and_fall(values: list[float], message: str) -> None:
    found = losses.judge(values)
    assert message in found and bool(message) == bool(found)

#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# Checks everything that only a GPU can show, in two short runs: what the first one finds can be repaired before the
# second.
#
#   dev/gpu_check.sh first       4 minutes at most: does it load, is each kernel right, the price in bfloat16, a profile
#   dev/gpu_check.sh full        8 minutes at most: all tests, all benchmarks, determinism, training, memory checker
#   dev/gpu_check.sh STAGE...    some stages: load kernels price profile tests bfloat16 tf32 float32 float16 times detector
#                                pooling determinism training memory memcheck racecheck deformops
#
#   PYTHON=python3.12   the interpreter, with torch and torchvision for CUDA (default: the project's environment, if
#                       there is one, otherwise python3)
#   RESULTS=path        where the results go (default: $OUT, if that is set, otherwise build/gpu_check of the project)
#   SECONDS_LEFT=240    for all stages together; each has a limit of its own too
#
# It may be called from any folder. Results are two files: gpu_check_MODE.txt, a summary of one screen, and
# gpu_check_MODE.tar.gz with all that the stages printed and measured (MODE is first, full or some). Both are written
# again after each stage, so that a run that is cut off keeps what it had. A stage that fails or runs out of time does
# not keep the others from running. Ctrl-C stops the running stage and the run. Exits with 1 if any stage failed.
#
# The GPU machine needs no network, no git and no compiler: dev/gpu_pack.sh puts the library into .gpu/ and the wheels
# that such a machine lacks into .whl/, both at the repository's root. A library that was made from other sources or
# does not load is built again there, if there is a compiler.
set -uo pipefail

script=$(readlink -f "${BASH_SOURCE[0]}")
dev=$(dirname "$script")
project=$(dirname "$dev")
root=$(cd "$project/../.." && pwd)
results=${RESULTS:-${OUT:-$project/build/gpu_check}}
[[ $results = /* ]] || results=$PWD/$results
python=${PYTHON:-$root/.venv/bin/python}
if [ ! -x "$(command -v "$python")" ]; then
  [ -z "${PYTHON:-}" ] || { echo "gpu_check: PYTHON=$PYTHON is not a program that can be run" >&2; exit 2; }
  python=python3
fi
python=$(command -v "$python") || { echo "gpu_check: no Python was found; name one: PYTHON=python3.12" >&2; exit 2; }
[[ $python = /* ]] || python=$PWD/$python
cd "$project" || exit 2
# shellcheck source=dev/digest.sh
. "$dev/digest.sh" || exit 2

first="load kernels price profile"
full="load tests bfloat16 tf32 float32 float16 times detector pooling determinism training memory memcheck"
all="load kernels price profile ${full#load } racecheck deformops"

# Seconds that a stage may take.
limit() {
  case $1 in
    load) echo 120 ;;
    tests) echo 150 ;;
    kernels | times | pooling | determinism | memory) echo 45 ;;
    price | bfloat16 | tf32 | float32 | float16) echo 60 ;;
    profile) echo 150 ;;
    deformops) echo 480 ;;
    *) echo 75 ;;
  esac
}

# Installs all wheels at once. If that fails, one by one: a wheel that does not fit this Python must not keep the others
# out.
install_wheels() {
  local wheel pip=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir
    --disable-pip-version-check --upgrade --target "$site")
  compgen -G "$root/.whl/*.whl" >/dev/null || { echo "no wheels in .whl/"; return; }
  "${pip[@]}" "$root"/.whl/*.whl 2>/dev/null && return
  for wheel in "$root"/.whl/*.whl; do
    "${pip[@]}" "$wheel" || echo "$(basename "$wheel") was not installed, see above: what needs it will fail"
  done
}

# Exits with 3 where only the library is missing.
check_library() {
  "$python" - <<'PY'
import os
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu_check: no GPU is visible to torch {torch.__version__}")
major, minor = torch.cuda.get_device_capability()
print(f"{torch.cuda.get_device_name()} ({major}.{minor}), torch {torch.__version__}, Python {sys.version.split()[0]}")

def missing(reason):
    print(f"gpu_check: {reason}", file=sys.stderr)
    sys.exit(3)

try:
    import dcn_d2.ops  # loads the kernels
    from dcn_d2.ops import _library
except OSError as error:
    missing(error)
if _library.missing_kernels:
    missing(_library.missing_kernels)
for name in (operator.__name__ for operator in dcn_d2.ops.OPERATORS):
    for suffix in ("", "_backward"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dcn_d2::{name}{suffix}", "CUDA"):
            missing(f"the library has no CUDA kernel of {name}{suffix}")
x = torch.ones(1, 8, 4, 4, device="cuda", dtype=torch.float16)
try:
    dcn_d2.ops.deform_conv2d(x, torch.zeros(1, 2, 4, 4, device="cuda", dtype=x.dtype), x.new_ones(8, 8, 1, 1)).sum().item()
except RuntimeError as error:
    missing(f"the library's kernels do not run on this GPU: {str(error).splitlines()[0]}")
PY
}

load() {
  local status
  install_wheels
  check_library
  status=$?
  # A library that is cut off ends Python by a signal.
  ((status == 3 || status >= 128)) || return "$status"
  echo "gpu_check: building the library here"
  unset DCN_LIBRARY
  echo >"$work/built"  # from now on the library of this tree counts
  FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
    MAX_JOBS=${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc)} "$python" setup.py -q build_ext --inplace || return 1
  check_library
}

# Runs the operators' tests by a command that ends in `python -m pytest`. A run in which all were skipped has failed.
run_tests() {
  local selected=$1 passed
  shift
  passed=$(mktemp)
  # hydra, which Detectron2 needs, brings a plugin for pytest that fails where one of its own packages is missing.
  "$@" -q -p no:cacheprovider -p no:hydra_pytest -m "not slow and $selected" tests/ops 2>&1 | tee "$passed" || { rm "$passed"; return 1; }
  grep -Eq '[1-9][0-9]* passed' "$passed" || { rm "$passed"; echo "no test ran on the GPU"; return 1; }
  rm "$passed"
}

# Several processes share the GPU, where there are processors for them and pytest-xdist.
workers() {
  local processors
  processors=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)
  ((processors >= 8)) && "$python" -c 'import xdist' 2>/dev/null && printf '%s ' -n 6 --dist worksteal
}

# Tests with as few kernels as possible. Each kind of arithmetic has a process of its own, as a kernel that faults takes
# the GPU from everything that its process would run later. Every launch is waited for.
kernels() {
  local kind failed=0 names=() jobs=()
  for kind in float64 float32 tf32 bfloat16 float16; do
    names+=("$kind")
    CUDA_LAUNCH_BLOCKING=1 run_tests "one_kernel(arithmetic='$kind')" "$python" -m pytest --tb=short >"$work/kernels_$kind.log" 2>&1 &
    jobs+=($!)
  done
  for kind in "${!jobs[@]}"; do
    wait "${jobs[kind]}" || failed=1
    printf -- '--- %s\n' "${names[kind]}"
    cat "$work/kernels_${names[kind]}.log"
  done
  return "$failed"
}

# pyproject.toml says what the markers mean.
# shellcheck disable=SC2046
tests() { run_tests 'gpu and not determinism' "$python" -m pytest $(workers); }
determinism() { run_tests 'gpu and determinism' "$python" -m pytest; }

conv2d() {
  local dtype=$1
  shift
  "$python" -m benchmarks.deform_conv2d --device cuda --quick --dtype "$dtype" \
    --output "$work/deform_conv2d_cuda_$dtype.json" "$@"
}
price() { conv2d bfloat16 --repeats 15 --peers none; }
bfloat16() { conv2d bfloat16 --repeats 15 --buffers hot rotated --peers torchvision autocast; }
tf32() { conv2d tf32 --repeats 15 --peers torchvision; }
float32() { conv2d float32 --repeats 15 --peers torchvision; }
float16() { conv2d float16 --repeats 15 --peers torchvision autocast; }
# Part of no mode: the first call of deformops tries dozens of kernels, each of which takes some 10 s to compile.
deformops() {
  conv2d bfloat16 --repeats 15 --peers deformops --peer-seconds 400 --output "$work/deform_conv2d_cuda_deformops.json"
}
memory() {
  "$python" -m benchmarks.deform_conv2d --device cuda --quick --memory --dtype bfloat16 \
    --peers torchvision autocast \
    --output "$work/deform_conv2d_memory_cuda_bfloat16.json"
}

pooling() {
  local dtype failed=0
  for dtype in float32 float16; do
    "$python" -m benchmarks.deform_roi_pool --device cuda --quick --dtype "$dtype" \
      --output "$work/deform_roi_pool_cuda_$dtype.json" || failed=1
  done
  return "$failed"
}

detector() {
  "$python" -m benchmarks.detector --device cuda --dtype float16 --parts inference training --repeats 7 \
    --output "$work/detector_cuda_float16.json"
}

# The demo's model with mixed precision: the loss must stay finite and fall.
training() {
  rm -rf "$work/training"
  "$python" train_net.py --config-file examples/nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml \
    OUTPUT_DIR "$work/training" MODEL.DEVICE cuda SOLVER.AMP.ENABLED True SOLVER.MAX_ITER 160 \
    SOLVER.STEPS '(130,)' DATASETS.TEST '()' || return 1
  "$python" dev/losses.py "$work/training/metrics.json"
  local status=$?
  find "$work/training" -name '*.pth' -delete
  return "$status"
}

# find_tool NAME: the path of one of NVIDIA's tools.
find_tool() {
  command -v "$1" || ls /usr/local/cuda/bin/"$1" 2>/dev/null || compgen -G "/opt/nvidia/nsight-compute/*/$1" | tail -n 1
}

times() { "$python" -m benchmarks.profile_cuda --output "$work/profile_cuda.json"; }

# The time of each kernel by torch's profiler, then what limits each by Nsight Compute: counters, and where in the
# machine code of the largest ones warps wait. Clocks stay as they are.
profile() {
  local ncu section sections=() report=$work/profile.ncu-rep
  local large='regex:product_kernel|offset_gradient|weight_gradient_tensor'
  times || return 1
  ncu=$(find_tool ncu)
  [ "$ncu" ] || { echo "ncu was not found (PATH, /usr/local/cuda/bin, /opt/nvidia): kernel times only"; return 77; }
  for section in LaunchStats Occupancy SpeedOfLight MemoryWorkloadAnalysis ComputeWorkloadAnalysis SchedulerStats \
    WarpStateStats InstructionStats SourceCounters; do
    sections+=(--section "$section")
  done
  "$ncu" --clock-control none --profile-from-start off "${sections[@]}" \
    -f -o "$report" "$python" -m benchmarks.profile_cuda --once || return 1
  "$ncu" --import "$report" --page raw --csv >"$work/profile_counters.csv" || return 1
  "$ncu" --import "$report" --page source --csv --kernel-name "$large" >"$work/profile_source.csv" ||
    echo "the report could not be printed by line of machine code"
  rm -f "$report"  # larger than all else, and what we read of it is in the two tables
}

# Without torch's cache every tensor is an allocation of its own, whose bounds can be checked. The smallest samples:
# the tools slow kernels down a hundredfold. torch and its libraries ask the driver for what it may not have, which the
# tools would take for errors; our own calls and launches are checked where they are made.
# shellcheck disable=SC2046
sanitize() {
  local tool
  tool=$(find_tool compute-sanitizer)
  [ "$tool" ] || { echo "compute-sanitizer was not found (PATH, /usr/local/cuda/bin)"; return 77; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_tests 'gpu and memcheck' \
    "$tool" --tool "$1" --error-exitcode 9 --target-processes all --report-api-errors no "$python" -m pytest $(workers)
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1

# A stage runs as this script in a process of its own, so that `timeout` can stop it and all that it started.
if [ "${DCN_GPU_CHECK_STAGE:-}" ]; then
  work=$DCN_GPU_CHECK_WORK site=$project/build/gpu_site
  export PYTHONPATH=$project:$site${PYTHONPATH:+:$PYTHONPATH}
  [ ! -f "$work/built" ] || unset DCN_LIBRARY
  "$DCN_GPU_CHECK_STAGE"
  exit
fi

mode=some seconds=480
case "$# ${1:-}" in
  *" -h" | *" --help") sed -n '3,/^set /{/^set /!s/^# \{0,1\}//p}' "$script"; exit ;;
  [2-9]*" first" | [2-9]*" full") echo "gpu_check: the modes first and full take no further stages" >&2; exit 2 ;;
esac
case "${1:-}" in
  first) mode=first seconds=240 stages=$first ;;
  full) mode=full stages=$full ;;
  "") echo "gpu_check: say what to run: first, full, or some of the stages $all" >&2; exit 2 ;;
  *) stages=$* ;;
esac
for stage in $stages; do
  case " $all " in
    *" $stage "*) ;;
    *) echo "gpu_check: unknown stage '$stage'; there are $all, and the modes first and full" >&2; exit 2 ;;
  esac
done
seconds=${SECONDS_LEFT:-$seconds}
[[ $seconds =~ ^[0-9]+$ ]] || {
  echo "gpu_check: SECONDS_LEFT=$seconds should be a whole number of seconds, such as 240" >&2
  exit 2
}
{ mkdir -p "$results" && : >"$results/.writable" && rm "$results/.writable"; } 2>/dev/null || {
  echo "gpu_check: the results cannot be written to $results. Name another folder: RESULTS=path" >&2
  exit 2
}
deadline=$((SECONDS + 10#$seconds))
name=gpu_check_$mode
work=$project/build/$name
rm -rf "$work" && mkdir -p "$work" || exit 2
summary=$work/summary.txt

# What gpu_pack.sh wrote down about a file or the sources.
packed() { sed -n "s/^$1 //p" "$root/.gpu/PACKED" 2>/dev/null; }

library_note=
if [ -z "${DCN_LIBRARY:-}" ] && [ -f "$root/.gpu/_C.abi3.so" ]; then
  if [ "$(packed library)" = "$(digest . csrc setup.py)" ]; then
    export DCN_LIBRARY=$root/.gpu/_C.abi3.so
  else
    library_note="the library in .gpu/ was made from other sources than these: not used"
  fi
fi
# The benchmarks write the commit into their results. It is the one that was packed if nothing was changed since: what git
# says here may be about another tree, as where only the files were copied into one. Otherwise git knows best.
if [ -z "${DCN_COMMIT:-}" ] && [ "$(packed commit)" ]; then
  if [ "$(packed project)" = "$(digest . csrc setup.py dcn_d2 benchmarks tests dev)" ]; then
    DCN_COMMIT=$(packed commit)
    [ "$(packed changes)" = 0 ] || DCN_COMMIT+=" with changes"
  elif ! git rev-parse HEAD >/dev/null 2>&1; then
    DCN_COMMIT="$(packed commit) with changes"
  fi
  [ -z "${DCN_COMMIT:-}" ] || export DCN_COMMIT
fi

{
  printf '%s, commit %s, %s\n' "$name" "${DCN_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}" \
    "$(date -u '+%F %H:%M UTC')"
  [ -z "$library_note" ] || printf '%s\n' "$library_note"
} | tee "$summary"

# Both files are complete at any time: they are made under another name first.
save() {
  cp "$summary" "$results/.$name.txt" && mv "$results/.$name.txt" "$results/$name.txt"
  tar -czf "$results/.$name.tar.gz" -C "$project/build" "$name" && mv "$results/.$name.tar.gz" "$results/$name.tar.gz"
}

# Ctrl-C, or a TERM. `timeout` gives its stage a process group of its own, which Ctrl-C does not reach: it must be told.
running=
interrupted() {
  trap '' INT TERM
  if [ "$running" ]; then
    kill -TERM "$running" 2>/dev/null
    wait "$running" 2>/dev/null
    printf 'FAIL %s (%d s, interrupted)\n' "$stage" "$((SECONDS - begin))" | tee -a "$summary"
    save
  fi
  exit 130
}
trap interrupted INT TERM

failed=0
for stage in $stages; do
  begin=$SECONDS
  left=$((deadline - SECONDS)) most=$(limit "$stage")
  ((left < most)) && most=$left
  verdict=PASS reason=
  if ((most <= 0)); then
    verdict=FAIL reason=', no time was left'
  else
    printf '==> %s\n' "$stage"
    # In the background, as bash looks at signals while it waits, but not while a command in the foreground runs.
    exec {output}> >(trap '' INT TERM; exec tee "$work/$stage.txt")
    shown=$!
    DCN_GPU_CHECK_STAGE=$stage DCN_GPU_CHECK_WORK=$work PYTHON=$python \
      timeout --kill-after 5 "$most" bash "$script" >&"$output" 2>&1 {output}>&- &
    running=$!
    exec {output}>&-
    wait "$running"
    status=$?
    running=
    wait "$shown"
    if ((status == 77)); then
      verdict=SKIP reason=", $(tail -n 1 "$work/$stage.txt")"
    elif ((status == 124 || status == 137)); then
      verdict=FAIL reason=", stopped after $most s"
    elif ((status != 0)); then
      verdict=FAIL reason=", exit status $status"
    fi
  fi
  [ "$verdict" != FAIL ] || failed=1
  printf '%s %s (%d s%s)\n' "$verdict" "$stage" "$((SECONDS - begin))" "$reason" | tee -a "$summary"
  save
  if [ "$stage" = load ] && [ "$verdict" = FAIL ]; then
    echo "gpu_check: nothing else can run" | tee -a "$summary"
    break
  fi
done
echo "==> summary"
cp "$summary" "$work/verdicts.txt"
"$python" "$dev/gpu_report.py" "$work" >>"$summary" 2>&1 || echo "gpu_check: the report failed, see above" >>"$summary"
cat "$summary"
save
echo "results: $results/$name.tar.gz"
exit "$failed"

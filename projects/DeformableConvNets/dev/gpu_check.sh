#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU, in one command and within 8 minutes: the operators' tests on CUDA, determinism, a short
# training run with mixed precision, the benchmarks and which goals they meet, compute-sanitizer.
#
#   dev/gpu_check.sh [stage...]      default: load tests blame determinism training conv2d pooling detector goals memcheck racecheck
#   PYTHON=python3.12   the interpreter, with torch and torchvision for CUDA (default: the project's environment, if
#                       there is one, otherwise python3)
#   RESULTS=path        where files go (default: $OUT, if that is set, otherwise results/ of the project)
#   SECONDS_LEFT=470    for all stages together; each has a limit of its own too
#
# summary.txt has a line for every stage, PASS or FAIL with its seconds, written as soon as it ends; STAGE.txt has what
# the stage printed. A stage that fails or runs out of time does not keep the others from running. Exits with 1 if any
# failed.
#
# The GPU machine needs no network and no compiler: _C.abi3.so may be built elsewhere (FORCE_CUDA=1) and come with the
# checkout, and wheels that its Python lacks (detectron2 and what it needs; pytest, pluggy, iniconfig, hypothesis,
# sortedcontainers, expecttest) may lie in .whl/ at the repository's root.
set -uo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(cd "$project/../.." && pwd)
cd "$project"
python=${PYTHON:-}
[ -n "$python" ] || python=$root/.venv/bin/python
[ -x "$(command -v "$python")" ] || python=python3
results=${RESULTS:-${OUT:-$project/results}}
mkdir -p "$results"
results=$(cd "$results" && pwd)
summary=$results/summary.txt
all="load tests blame determinism training conv2d pooling detector goals memcheck racecheck"
deadline=$((SECONDS + ${SECONDS_LEFT:-470}))
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Seconds that a stage may take.
limit() {
  case $1 in
    load) echo 60 ;;
    tests | conv2d) echo 120 ;;
    goals) echo 20 ;;
    *) echo 75 ;;
  esac
}

install_wheels() {
  compgen -G "$root/.whl/*.whl" >/dev/null || return 0
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$project/build/gpu_site" "$root"/.whl/*.whl
}

# Runs the operators' tests by a command that ends in `python -m pytest`. A run in which all were skipped is no run.
run_tests() {
  local selected=$1 passed
  shift
  passed=$(mktemp)
  "$@" -q -p no:cacheprovider -m 'not slow' -k "$selected" tests/ops 2>&1 | tee "$passed" || { rm "$passed"; return 1; }
  grep -Eq '[1-9][0-9]* passed' "$passed" || { rm "$passed"; echo "no test ran on the GPU"; return 1; }
  rm "$passed"
}

load() {
  install_wheels || return 1
  "$python" - <<'PY'
import sys
import torch
import dcn_d2.ops  # loads the kernels
from dcn_d2.ops import _library

if not torch.cuda.is_available():
    sys.exit("gpu_check: no GPU is visible to torch")
if _library.missing_kernels:
    sys.exit(f"gpu_check: {_library.missing_kernels}")
for name in dcn_d2.ops.__all__:
    for suffix in ("", "_backward"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dcn_d2::{name}{suffix}", "CUDA"):
            sys.exit(f"gpu_check: dcn_d2._C has no CUDA kernel of {name}{suffix}. Build it with FORCE_CUDA=1")
major, minor = torch.cuda.get_device_capability()
print(f"{torch.cuda.get_device_name()} ({major}.{minor}), torch {torch.__version__}, Python {sys.version.split()[0]}")
PY
}

# The ids of tests that run on several devices have the device; names with "cuda" run on the GPU only.
tests() { run_tests 'cuda and not determin' "$python" -m pytest; }

# Where `tests` failed, which kernels do. A process of its own for each kind of arithmetic, as a kernel that faults
# takes the GPU from all that its process would run later; every launch is waited for.
blame() {
  local kind failed=0
  if grep -q '^PASS tests ' "$summary"; then
    echo "nothing to blame: the tests passed"
    return
  fi
  for kind in float64 float32 tf32 bfloat16 'float16 and not bfloat16'; do
    printf -- '--- %s\n' "$kind"
    CUDA_LAUNCH_BLOCKING=1 run_tests "one_by_one and $kind" "$python" -m pytest --tb=short || failed=1
  done
  return "$failed"
}

determinism() { run_tests 'cuda and determin' "$python" -m pytest; }

# The demo's model with mixed precision: the loss must stay finite and fall.
training() {
  rm -rf "$results/training"
  "$python" train_net.py --config-file examples/nuclei_faster_rcnn_slim_R_50_FPN_mdconv_c3-c5.yaml \
    OUTPUT_DIR "$results/training" MODEL.DEVICE cuda SOLVER.AMP.ENABLED True SOLVER.MAX_ITER 160 \
    SOLVER.STEPS '(130,)' DATASETS.TEST '()' || return 1
  "$python" dev/losses.py "$results/training/metrics.json"
  local status=$?
  find "$results/training" -name '*.pth' -delete
  return "$status"
}

conv2d() {
  local dtype
  for dtype in bfloat16 float16 tf32 float32; do
    "$python" benchmarks/deform_conv2d.py --device cuda --quick --repeats 7 --dtype "$dtype" --buffers hot rotated \
      --output "$results/deform_conv2d_cuda_$dtype.json" || return 1
  done
  "$python" benchmarks/deform_conv2d.py --device cuda --quick --memory --dtype bfloat16 \
    --output "$results/deform_conv2d_memory_cuda_bfloat16.json"
}

pooling() {
  local dtype
  for dtype in float32 float16; do
    "$python" benchmarks/deform_roi_pool.py --device cuda --quick --dtype "$dtype" \
      --output "$results/deform_roi_pool_cuda_$dtype.json" || return 1
  done
}

detector() {
  "$python" benchmarks/detector.py --device cuda --dtype float16 --parts inference training --repeats 7 \
    --output "$results/detector_cuda_float16.json"
}

# Fails only if there is nothing to judge: goals that are not met are no error.
goals() {
  local files
  files=$(compgen -G "$results/*_cuda_*.json") || { echo "goals: no benchmark has left a file"; return 1; }
  # shellcheck disable=SC2086
  "$python" benchmarks/deform_conv2d.py --check $files
}

# Without torch's cache every tensor is an allocation of its own, whose bounds can be checked. The smallest samples:
# the tools slow kernels down a hundredfold. torch and its libraries ask the driver for what it may not have, which the
# tools would take for errors; our own calls and launches are checked where they are made.
sanitize() {
  local tool
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || {
    echo "compute-sanitizer was not found (PATH, /usr/local/cuda/bin)"
    return 1
  }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_tests \
    'cuda and equals_reference and (uneven or tensor_cores or roi_pools and modulated)' \
    "$tool" --tool "$1" --error-exitcode 9 --target-processes all --report-api-errors no "$python" -m pytest
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

# A stage runs as this script with the one argument, so that `timeout` can stop it and all that it started.
if [ "${DCN_GPU_CHECK_STAGE:-}" ]; then
  PYTHONPATH=$PYTHONPATH:$project/build/gpu_site
  "$DCN_GPU_CHECK_STAGE"
  exit
fi

for stage in ${*:-$all}; do
  case " $all " in
    *" $stage "*) ;;
    *) echo "gpu_check: unknown stage '$stage'; there are $all" >&2; exit 2 ;;
  esac
done
{
  printf 'commit %s, %s\n' "$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)" "$(date -u '+%F %H:%M UTC')"
} >"$summary"
failed=0
for stage in ${*:-$all}; do
  begin=$SECONDS
  left=$((deadline - SECONDS)) most=$(limit "$stage")
  ((left < most)) && most=$left
  verdict=PASS reason=
  if ((most <= 0)); then
    verdict=FAIL reason=', no time was left'
  else
    printf '==> %s\n' "$stage"
    DCN_GPU_CHECK_STAGE=$stage RESULTS=$results timeout --kill-after 5 "$most" bash "${BASH_SOURCE[0]}" 2>&1 |
      tee "$results/$stage.txt"
    status=${PIPESTATUS[0]}
    if ((status == 124 || status == 137)); then
      verdict=FAIL reason=", stopped after $most s"
    elif ((status != 0)); then
      verdict=FAIL reason=", exit status $status"
    fi
  fi
  [ "$verdict" = PASS ] || failed=1
  printf '%s %s (%d s%s)\n' "$verdict" "$stage" "$((SECONDS - begin))" "$reason" | tee -a "$summary"
  if [ "$stage" = load ] && [ "$verdict" = FAIL ]; then
    echo "gpu_check: nothing else can run" | tee -a "$summary"
    break
  fi
done
[ -f "$results/load.txt" ] && tail -n 1 "$results/load.txt" >>"$summary"
[ -f "$results/goals.txt" ] && cat "$results/goals.txt" >>"$summary"
exit "$failed"

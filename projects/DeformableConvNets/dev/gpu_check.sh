#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# What needs a GPU: the operators' tests on CUDA, compute-sanitizer, the benchmarks. Leaves files under results/.
#
#   dev/gpu_check.sh [tests] [sanitizer] [benchmarks]      default: all three
#   PYTHON=python3.12   the interpreter, with torch and torchvision for CUDA (default: the project's environment, if
#                       there is one, otherwise python3)
#   RESULTS=path        where files go (default: results/ of the project)
#
# The GPU machine needs no network and no compiler: _C.abi3.so may be built elsewhere (FORCE_CUDA=1) and come with the
# checkout, and wheels that its Python lacks (pytest, hypothesis, expecttest) may lie in .whl/ at the repository's root.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=$(cd "$project/../.." && pwd)
cd "$project"
python=${PYTHON:-}
[ -n "$python" ] || python=$root/.venv/bin/python
[ -x "$(command -v "$python")" ] || python=python3
results=${RESULTS:-$project/results}
mkdir -p "$results"
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}

if compgen -G "$root/.whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$project/build/gpu_site" "$root"/.whl/*.whl
  export PYTHONPATH=$PYTHONPATH:$project/build/gpu_site
fi

describe() {
  "$python" - <<'PY'
import sys
import torch
import dcn_d2.ops  # loads the kernels
from dcn_d2.ops import _library

if not torch.cuda.is_available():
    sys.exit("gpu_check: no GPU is visible to torch")
if _library.missing_kernels:
    sys.exit(f"gpu_check: {_library.missing_kernels}")
for name in ("deform_conv2d", "deform_roi_pool", "deform_psroi_pool"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dcn_d2::{name}", "CUDA"):
        sys.exit(f"gpu_check: dcn_d2._C has no CUDA kernel of {name}. Build it with FORCE_CUDA=1")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
PY
}

tests() {
  "$python" -c 'import hypothesis, pytest' || {
    echo "gpu_check: pytest and hypothesis are needed; put their wheels into $root/.whl" >&2
    return 1
  }
  # The ids of tests that run on several devices have the device; names with "cuda" run on the GPU only.
  "$python" -m pytest -q -p no:cacheprovider tests/ops -k cuda 2>&1 | tee "$results/gpu_tests.txt" || return 1
  # A run in which everything was skipped is no run.
  grep -Eq '[1-9][0-9]* passed' "$results/gpu_tests.txt" || { echo "gpu_check: no test ran on the GPU" >&2; return 1; }
}

sanitizer() {
  local tool check failed=0
  tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) || {
    echo "gpu_check: compute-sanitizer was not found (PATH, /usr/local/cuda/bin): skipped"
    return 0
  }
  # Without torch's cache every tensor is an allocation of its own, whose bounds can be checked.
  for check in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -p no:cacheprovider -m 'not slow' -k 'cuda and (uneven or modulated or groups_across)' \
      tests/ops >"$results/gpu_$check.txt" 2>&1 || failed=1
    printf '%s: %s\n' "$check" "$(grep SUMMARY "$results/gpu_$check.txt" | tail -n 1)"
  done
  return "$failed"
}

benchmarks() {
  local dtype
  for dtype in float32 bfloat16; do
    "$python" benchmarks/deform_conv2d.py --device cuda --dtype "$dtype" \
      --output "$results/deform_conv2d_cuda_$dtype.json" || return 1
  done
  "$python" benchmarks/deform_roi_pool.py --device cuda && "$python" benchmarks/detector.py --device cuda
}

describe
status=0
for part in ${*:-tests sanitizer benchmarks}; do
  case "$part" in
    tests | sanitizer | benchmarks) ;;
    *) echo "gpu_check: unknown part '$part'; there are tests, sanitizer, benchmarks" >&2; exit 2 ;;
  esac
  printf '==> %s\n' "$part"
  "$part" || { echo "gpu_check: $part failed" >&2; status=1; }
done
exit "$status"

#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# Runs the operators' tests with the CPU kernels under the address and the undefined behaviour sanitizers, on every
# instruction set that the processor has, or the one that DCN_CPU_CAPABILITY names. Arguments go to pytest.
# dev/sanitize.sh --run COMMAND... runs a command in the place of the tests, once, with these kernels.
# Exits with 77 where the compiler has no sanitizers.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-${VENV:-$project/../../.venv}/bin/python}
read -ra compiler <<<"${CXX:-g++}"
cd "$project"

# The sanitizer must be loaded first, and next to it the C++ library whose functions it wraps.
preload=
for name in libasan.so libubsan.so libstdc++.so; do
  path=$("${compiler[@]}" -print-file-name="$name" 2>/dev/null || true)
  if [[ $path != /* ]]; then
    echo "sanitize: ${compiler[*]} has no $name" >&2
    exit 77
  fi
  if [[ $name != libubsan.so ]]; then preload+=" $path"; fi
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
library=$folder/sanitized.so

# What setup.py compiles and links with, one word a line.
"$python" - >"$folder/flags" 2>"$folder/messages" <<'PYTHON' || { cat "$folder/messages" >&2; exit 1; }
import re
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

target = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', Path("setup.py").read_text())
print(f"{Path(torch.__file__).parent / 'lib'}\n-DTORCH_TARGET_VERSION={target[1]}")
print(*(word for path in include_paths("cpu") for word in ("-isystem", path)), sep="\n")
PYTHON
mapfile -t flags <"$folder/flags"
torch=${flags[0]}
flags=(-std=c++20 -Icsrc "${flags[@]:1}" -fPIC -fvisibility=hidden -fopenmp-simd)
# -g1 is enough for file and line in a report.
flags+=(-O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS)
flags+=(-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)

echo "==> compile with sanitizers"
jobs=${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)}
export FOLDER=$folder
find csrc/schemas.cpp csrc/cpu -name '*.cpp' -print0 | xargs -0 -P "$jobs" -I{} \
  bash -c 'source=$1 && shift && "$@" -c "$source" -o "$FOLDER/${source//\//-}.o"' _ {} "${compiler[@]}" "${flags[@]}"
"${compiler[@]}" -shared -fsanitize=address,undefined "$folder"/*.o -o "$library" -L"$torch" -ltorch_cpu

# Python keeps memory until its end, which is no leak. New memory is filled with 0xff, which is NaN, so that a value
# which was never written shows in a result.
sanitized=(env LD_PRELOAD="${preload# }" UBSAN_OPTIONS=print_stacktrace=1
  ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000
  DCN_LIBRARY="$library" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}")
if [[ ${1:-} == --run ]]; then
  shift
  "${sanitized[@]}" "$@"
  exit
fi

capabilities=(default)
for name in avx2 avx512f amx_bf16; do
  if grep -qw "$name" /proc/cpuinfo 2>/dev/null; then
    name=${name%_bf16}
    capabilities+=("${name%f}")
  fi
done
if [[ -n ${DCN_CPU_CAPABILITY:-} ]]; then capabilities=("$DCN_CPU_CAPABILITY"); fi

run=("$python" -m pytest -q -x -p no:cacheprovider -p no:xdist --capture=sys tests/ops -m 'not gpu and not unsanitized')
for capability in "${capabilities[@]}"; do
  echo "==> $capability"
  # pytest must not catch what a sanitizer prints before it stops.
  DCN_CPU_CAPABILITY="$capability" "${sanitized[@]}" "${run[@]}" "$@"
done

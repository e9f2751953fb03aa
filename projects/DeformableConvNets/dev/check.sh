#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# All checks, in the order of how fast they answer. Arguments go to pytest: dev/check.sh -k roi_pool
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bin=$(cd "${VENV:-$project/../../.venv}/bin" && pwd)
cd "$project"
# One thread for each test process: with more, idle threads spin and take the processor from the working ones.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run() {
  printf '==> %s\n' "$1"
  shift
  "$@"
}

run "ruff check" "$bin/ruff" check .
run "ruff format" "$bin/ruff" format --check .
find csrc tests \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
  run "clang-format" xargs -0 "$bin/clang-format" --dry-run -Werror
run "mypy" "$bin/mypy"
run "generated documents in sync" "$bin/python" dev/readme.py --check

workers=()
processors=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)  # nproc would say what OMP_NUM_THREADS says
if [ "$processors" -ge 2 ]; then
  workers=(-n "$((processors < 8 ? processors : 8))" --dist worksteal)
fi
run "pytest" "$bin/python" -m pytest ${workers[@]+"${workers[@]}"} "$@"

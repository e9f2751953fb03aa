#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# Sets up everything that the project needs: `setup.sh packages`, then `setup.sh extension`. `make` calls both in order.
#
#   VENV=path         the environment to use; made where there is none (default: .venv at the root)
#   PYTHON=python3.12 the interpreter that makes it (default: python3). A torch or Detectron2 that it can import
#                     is used from there and stays as it is.
#   INSTALLER=uv      use uv instead of pip
#   FORCE_CUDA, TORCH_CUDA_ARCH_LIST, ...   see setup.py
set -euo pipefail

dev=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$dev")
root=$(cd "$project/../.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv = /* ]] || venv=$PWD/$venv
python=${PYTHON:-python3}
installer=${INSTALLER:-pip}
py=$venv/bin/python
needed_gb=8
temporary_gb=4

fail() { printf '\nSet-up stopped: %s\n' "$*" >&2; exit 1; }

ticker=
stop_ticker() { [ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true; ticker=; }
trap stop_ticker EXIT

# step LABEL COMMAND...: runs the command, says what it is and, every 20 s, that it is still running.
step() {
  local label=$1 start=$SECONDS status=0
  shift
  printf '==> %s\n' "$label"
  (while sleep 20 >/dev/null 2>&1; do printf '    %s s ...\n' $((SECONDS - start)); done) &
  ticker=$!
  "$@" || status=$?
  stop_ticker
  [ "$status" -eq 0 ] || fail "\"$label\" failed, see the messages above."
  printf '    done in %s s\n' $((SECONDS - start))
}

# free_gb FOLDER: free space where FOLDER is or would be made.
free_gb() {
  local folder=$1
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }'
}

check_python() {
  "$python" -V >/dev/null 2>&1 || fail "$python was not found or does not run. Install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
    fail "$python is $("$python" -V 2>&1), but 3.10 or newer is needed. Name another one: make PYTHON=python3.12 ..."
  [ -x "$py" ] || "$python" -c 'import venv, ensurepip' 2>/dev/null || \
    fail "$python cannot make virtual environments. Install its venv module (Debian, Ubuntu: sudo apt install python3-venv)."
}

check_compiler() {
  local found=${CXX:-} candidate
  for candidate in c++ g++ clang++; do
    [ -n "$found" ] || found=$(command -v "$candidate" || true)
  done
  [ -n "$found" ] || fail "no C++ compiler was found. Install one (Debian, Ubuntu: sudo apt install g++), or name one: make CXX=/path/to/g++ ..."
  # $found unquoted: CXX="ccache g++" is usual.
  printf '#include <vector>\nint main() { return static_cast<int>(std::vector<int>().size()); }\n' |
    $found -std=c++20 -x c++ - -o /dev/null 2>/dev/null || \
    fail "the C++ compiler '$found' cannot compile a small C++20 program. Install g++ 10 or newer, or name another compiler: make CXX=/path/to/g++ ..."
  export CXX=$found
}

# check_space NEEDED FOLDER ADVICE
check_space() {
  local free
  free=$(free_gb "$2")
  [ "$free" -ge "$1" ] || fail "the disk of $2 has $free GB free, but $1 GB are needed for PyTorch. Free some space, or $3"
}

# What PYTHON can import: its folders if it has a torch that is new enough, otherwise nothing. An older torch stays
# where it is, and the new environment gets its own.
folders_to_share() {
  "$python" - <<'PY'
import importlib.util, re, sys
from importlib.metadata import PackageNotFoundError, version
try:
    torch = version("torch")
except PackageNotFoundError:
    sys.exit()
if tuple(map(int, re.findall(r"\d+", torch)[:2])) < (2, 10) or importlib.util.find_spec("torch") is None:
    print(f"    torch {torch} of {sys.executable} is older than 2.10: left alone, not used", file=sys.stderr)
    sys.exit()
print(f"    torch {torch} of {sys.executable} is used as it is", file=sys.stderr)
print("\n".join(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))))
PY
}

make_environment() {
  local site folder
  "$python" -m venv "$venv"
  site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  # addsitedir also reads that environment's own .pth files (a Detectron2 installed with `pip install -e`).
  folders_to_share | while IFS= read -r folder; do
    printf 'import site; site.addsitedir(%s)\n' "$("$python" -c 'import sys; print(repr(sys.argv[1]))' "$folder")"
  done >"$site/shared_packages.pth"
  [ -s "$site/shared_packages.pth" ] || rm "$site/shared_packages.pth"
}

has() { "$py" -c 'import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)' "$1"; }

verbosity=-q
install() {
  if [ "$installer" = uv ]; then
    "$venv/bin/uv" pip install "$verbosity" --python "$py" "$@"
  else
    # The wheel of Detectron2 asks for numpy below 2 and for black; it runs with numpy 2 and without black.
    { "$py" -m pip install "$verbosity" --disable-pip-version-check "$@" 2>&1 >&3 |
      { grep -vE "^ERROR: pip's dependency resolver|^sal-detectron2 .* (numpy|black)" >&2 || true; }; } 3>&1
  fi
}

# The wheel is marked for Python 3.10 because of one compiled file that the project does not need: the Python code runs
# on all newer versions, and torchvision has the operators.
install_detectron2() {
  local site
  site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  if [ "$installer" = uv ]; then
    install --no-deps --python-version 3.10 --require-hashes -r "$dev/detectron2.txt"
  else
    install --no-deps --only-binary=:all: --require-hashes --python-version 3.10 --implementation cp --abi none \
      --platform any --target "$site" -r "$dev/detectron2.txt"
  fi
  # On Python 3.10 that file would be found, but it was compiled for another torch.
  rm -f "$site"/detectron2/_C.*.so
}

packages() {
  check_python
  check_compiler
  if [ ! -x "$py" ]; then
    step "virtual environment $venv" make_environment
  fi
  "$py" -m pip --version >/dev/null 2>&1 || fail "$venv has no pip. Make one there: $py -m ensurepip"
  if [ "$installer" = uv ]; then
    if ls "$venv"/lib/python*/site-packages/shared_packages.pth >/dev/null 2>&1; then
      echo "    pip is used: uv does not see packages that are shared from another environment"
      installer=pip
    elif [ ! -x "$venv/bin/uv" ]; then
      step "uv" "$py" -m pip install -q --disable-pip-version-check uv
    fi
  fi
  local label="packages (some seconds)"
  if ! has torch; then
    check_space "$needed_gb" "$venv" "name a place for the environment on another disk: make VENV=/path ..."
    check_space "$temporary_gb" "${TMPDIR:-/tmp}" "name another folder for temporary files: TMPDIR=/path make ..."
    label="PyTorch and other packages (2 to 5 minutes, about 6 GB)"
  fi
  "$py" "$dev/pins.py" >"$venv/constraints.txt" || fail "the packages in $venv do not fit, see above."
  # OpenCV goes by several names, which overwrite each other: whichever is there stays.
  if has cv2; then
    grep -v '^opencv' "$dev/requirements.txt"
  else
    cat "$dev/requirements.txt"
  fi >"$venv/requirements.txt"
  step "$label" install -r "$venv/requirements.txt" -c "$venv/constraints.txt"
  has detectron2 || step "Detectron2" install_detectron2
}

build() {
  # With -v, so that the log holds what setup.py decided and what the compilers said.
  verbosity=-v
  PATH=$venv/bin:$PATH install --no-build-isolation -c "$venv/constraints.txt" -e "$project[dev]" >"$venv/build.log" 2>&1 || {
    # The compilers' messages (g++: "error: ", nvcc: "error #"), setup.py's and pip's own.
    grep -E '[:)] (fatal )?error[: ]|dcn_d2: |undefined reference|^ERROR: ' "$venv/build.log" | cut -c1-300 | head -n 40 >&2 || true
    fail "the extension could not be built. The whole log is $venv/build.log."
  }
  sed -nE 's/^(DEBUG)? *(dcn_d2: )/    \2/p' "$venv/build.log" | sort -u
}

extension() {
  check_compiler
  step "C++ extension and developers' tools (half a minute; some minutes with CUDA)" build
}

case "${1:-}" in
  packages | extension) "$1" ;;
  *) fail "call it as: setup.sh packages, or: setup.sh extension" ;;
esac

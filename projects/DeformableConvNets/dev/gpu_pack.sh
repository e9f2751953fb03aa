#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# Puts together what dev/gpu_check.sh needs on a GPU machine that has PyTorch, but no network and no git: the compiled
# library in .gpu/ and the wheels that such a machine lacks in .whl/. git ignores both folders.
#
#   dev/gpu_pack.sh [--library FILE] [--output FOLDER]
#
#   --library FILE      pack this library, made from the sources as they are now, instead of compiling one
#   --output FOLDER     where .gpu/ and .whl/ go (default: the repository's root)
#   ARCHITECTURES=9.0   what to compile for, in the form of TORCH_CUDA_ARCH_LIST: "8.0;9.0"
#   PYTHON_VERSION=3.12 the other machine's Python
#   LIMIT_MIB=45        how large both folders may be together
#   VENV=path           the environment that packs and compiles (default: .venv at the root)
#   MAX_JOBS, NVCC_FLAGS, ...   see setup.py
#
# .gpu/PACKED says what the pack was made from: the commit, whether there were changes (1) or not (0), and the digests
# of the library's sources and of everything that the checks run. It is written last: a run that fails changes nothing.
set -euo pipefail

dev=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(dirname "$dev")
root=$(cd "$project/../.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv = /* ]] || venv=$PWD/$venv
py=$venv/bin/python
architectures=${ARCHITECTURES:-9.0}
python_version=${PYTHON_VERSION:-3.12}
limit_mib=${LIMIT_MIB:-45}
built_from_source="antlr4-python3-runtime fvcore iopath"  # no wheels of them are published
work=$project/build/gpu_pack
# shellcheck source=dev/digest.sh
. "$dev/digest.sh"

fail() { printf '\nNothing was packed: %s\n' "$*" >&2; exit 1; }

output=$root library=
while [ $# -gt 0 ]; do
  case $1 in
    --library) library=${2:?--library needs a file} ;;
    --output) output=${2:?--output needs a folder} ;;
    -h | --help) sed -n '3,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit ;;
    *) fail "'$1' is unknown; call it as: gpu_pack.sh [--library FILE] [--output FOLDER], or see gpu_pack.sh --help" ;;
  esac
  shift 2
done
[[ $python_version =~ ^3\.[0-9]+$ ]] || fail "PYTHON_VERSION=$python_version should read like 3.12"
[[ $limit_mib =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "LIMIT_MIB=$limit_mib should be a number of mebibytes, such as 45"
[ -x "$py" ] || fail "there is no environment $venv. Make it with: make setup, or name another: VENV=path"
[ -z "$library" ] || [ -f "$library" ] || fail "there is no library $library"

# On the same disk as the result, so that moving takes no time.
mkdir -p "$output/.gpu" "$work"
output=$(cd "$output" && pwd)
new=$output/.gpu/new
trap 'rm -rf "$new"; rmdir "$output/.gpu" 2>/dev/null || true' EXIT
rm -rf "$new"
mkdir -p "$new/wheels" "$new/detectron2"

# pip WHAT COMMAND...: shows what pip says only where it fails.
pip() {
  local what=$1
  shift
  "$py" -m pip "$@" -q --no-deps --disable-pip-version-check >"$work/pip.log" 2>&1 || {
    cat "$work/pip.log" >&2
    fail "pip could not get $what for Python $python_version. Its message above names the package; it needs a network."
  }
}

# Prints a line `name==version` for each package of gpu_requirements.txt that is for PYTHON_VERSION.
versions() {
  "$py" - "$dev" "$python_version" <<'PY'
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

dev, python = Path(sys.argv[1]), sys.argv[2]


def read(lines):
    return [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]


def applies(requirement):
    target = {"python_version": python, "python_full_version": python + ".0"}
    return requirement.marker is None or requirement.marker.evaluate(target)


project = tomllib.loads((dev.parent / "pyproject.toml").read_text())["project"]
known = read((dev / "constraints.txt").read_text().splitlines()) + read(project["optional-dependencies"]["dev"])
pins = {requirement.name: requirement.specifier for requirement in known if applies(requirement)}
for wanted in read((dev / "gpu_requirements.txt").read_text().splitlines()):
    if not applies(wanted):
        print(f"    left out, as it is for {wanted.marker}: {wanted.name}", file=sys.stderr)
    elif specifier := wanted.specifier or pins.get(wanted.name):
        print(f"{wanted.name}{specifier}")
    else:
        sys.exit(f"gpu_requirements.txt: {wanted.name} has no version there, in constraints.txt or in pyproject.toml")
PY
}

# The wheel of Detectron2 is marked for Python 3.10 because of one compiled file that the project does not need (see
# setup.sh). Without that file, and marked for all versions, pip installs it everywhere.
repack_detectron2() {
  local folder=$new/detectron2
  "$py" -m wheel unpack -d "$folder" "$folder"/*.whl &&
    rm -f "$folder"/*.whl "$folder"/*/detectron2/_C.*.so &&
    "$py" -m wheel pack -d "$folder" "$folder"/* &&
    "$py" -m wheel tags --remove --python-tag py3 --abi-tag none --platform-tag any "$folder"/*.whl &&
    mv "$folder"/*.whl "$new/wheels"
}

wheels() {
  local machine line ready=() source=()
  machine=$(uname -m)
  versions >"$work/versions.txt" || fail "the versions of the packages are not known, see above."
  while IFS= read -r line; do
    case " $built_from_source " in
      *" ${line%%==*} "*) source+=("$line") ;;
      *) ready+=("$line") ;;
    esac
  done <"$work/versions.txt"
  pip "a wheel" download --only-binary=:all: --python-version "$python_version" --implementation cp \
    --platform "manylinux_2_28_$machine" --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine" \
    -d "$new/wheels" "${ready[@]}"
  # With the environment's setuptools: newer ones have no pkg_resources, which old packages may ask for.
  pip "the source of a package" wheel --no-build-isolation -w "$new/wheels" "${source[@]}"
  pip "Detectron2" download --only-binary=:all: --require-hashes --python-version 3.10 --implementation cp \
    --abi none --platform any -d "$new/detectron2" -r "$dev/detectron2.txt"
  repack_detectron2 >"$work/repack.log" 2>&1 || {
    cat "$work/repack.log" >&2
    fail "the wheel of Detectron2 could not be packed again, see above."
  }
}

# Compiles in a folder of its own, so that the environment's library stays as it is, and only what has changed.
compile() {
  local made_from candidate nvcc=
  made_from="$(digest "$project" csrc setup.py) $architectures ${NVCC_FLAGS:-} ${DEBUG:-} ${CXX:-}"
  made_from+=" torch $("$py" -c 'from importlib.metadata import version; print(version("torch"))')"
  library=$work/lib/dcn_d2/_C.abi3.so
  if [ -f "$library" ] && [ "$made_from" = "$(cat "$work/made_from" 2>/dev/null)" ]; then
    echo "    compiled before"
    return
  fi
  for candidate in "${CUDA_HOME:-}/bin/nvcc" "${CUDA_PATH:-}/bin/nvcc" "$(command -v nvcc || true)" \
    /usr/local/cuda/bin/nvcc; do
    [ -n "$nvcc" ] || [ ! -x "$candidate" ] || nvcc=$candidate
  done
  [ -n "$nvcc" ] || fail "no nvcc was found (looked at CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda). Install the CUDA" \
    "toolkit, or give a library that was compiled elsewhere: --library FILE"
  rm -f "$work/made_from"
  (
    cd "$project"
    export PATH=$venv/bin:$PATH FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$architectures
    export MAX_JOBS=${MAX_JOBS:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)}
    "$py" setup.py build_ext --force --build-temp "$work/temp" --build-lib "$work/lib"
  ) >"$work/build.log" 2>&1 || {
    grep -E '[:)] (fatal )?error[: ]|dcn_d2: |undefined reference' "$work/build.log" | cut -c1-300 | head -n 40 >&2 || true
    fail "the library could not be compiled. The whole log is $work/build.log."
  }
  case $made_from in
    "$(digest "$project" csrc setup.py) "*) printf '%s\n' "$made_from" >"$work/made_from" ;;
    *) fail "the sources were changed while they were compiled. Run it again." ;;
  esac
}

# Loads it as the checks will.
check_library() {
  (cd "$project" && DCN_LIBRARY=$1 "$py" -) <<'PY'
import torch
import dcn_d2.ops  # loads the kernels

if not torch._C._dispatch_has_kernel_for_dispatch_key("dcn_d2::deform_conv2d_backward", "CPU"):
    raise SystemExit("the library has no kernels of dcn_d2")
if not torch._C._dispatch_has_kernel_for_dispatch_key("dcn_d2::deform_conv2d_backward", "CUDA"):
    print("    it has no CUDA kernels: the GPU machine will have to compile its own")
PY
}

mib() { du -ck --apparent-size "$@" | awk 'END { printf "%.1f", $1 / 1024 }'; }

start=$SECONDS
printf '==> wheels for Python %s (some seconds)\n' "$python_version"
wheels
printf '    done in %s s\n' $((SECONDS - start))

start=$SECONDS
if [ -z "$library" ]; then
  printf '==> library for compute capability %s (two minutes with two processors)\n' "$architectures"
  compile
else
  printf '==> library %s\n' "$library"
fi
cp "$library" "$new/_C.abi3.so"
strip --strip-unneeded "$new/_C.abi3.so" || fail "strip (of binutils) does not work on $library, see above."
check_library "$new/_C.abi3.so" 2>"$work/load.log" || {
  tail -n 3 "$work/load.log" >&2
  fail "the library $library does not load, see above."
}
printf '    done in %s s\n' $((SECONDS - start))

size=$(mib "$new")
awk -v size="$size" -v limit="$limit_mib" 'BEGIN { exit size > limit }' ||
  fail "the library has $(mib "$new/_C.abi3.so") MiB and the wheels have $(mib "$new/wheels") MiB, $size MiB together," \
    "but $limit_mib MiB is the limit. Leave out architectures or packages, or set LIMIT_MIB."

commit=$(git -C "$project" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
changes=1  # what is not known counts as changed
if changed=$(git -C "$project" status --porcelain --untracked-files=no -- . ':!results' 2>/dev/null); then
  [ -n "$changed" ] || changes=0
fi
{
  printf 'commit %s\nchanges %s\n' "$commit" "$changes"
  printf 'library %s\n' "$(digest "$project" csrc setup.py)"
  printf 'project %s\n' "$(digest "$project" csrc setup.py dcn_d2 benchmarks tests dev)"
} >"$new/PACKED"

rm -rf "$output/.gpu/PACKED" "$output/.whl"
mv "$new/wheels" "$output/.whl"
mv "$new/_C.abi3.so" "$output/.gpu/_C.abi3.so"
mv "$new/PACKED" "$output/.gpu/PACKED"

printf '\n'
cat "$output/.gpu/PACKED"
cat <<END

.gpu/  $(mib "$output/.gpu/_C.abi3.so") MiB, the library
.whl/  $(mib "$output/.whl") MiB, $(find "$output/.whl" -type f | wc -l) wheels

Both are in $output. Copy them to the GPU machine with the working tree (all that git does not ignore; .git is not
needed); they must lie at its root. There, from the root:

    projects/DeformableConvNets/dev/gpu_check.sh first

and when that has passed, the same with full.
END

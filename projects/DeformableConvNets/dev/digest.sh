# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# digest FOLDER NAME...: prints 16 hex digits computed from the names and contents of all files of the NAMEs below
# FOLDER, except built ones. gpu_pack.sh writes them down, gpu_check.sh compares.
digest() {
  local folder=$1
  shift
  (
    cd "$folder" || exit
    find "$@" -type f ! -path '*/__pycache__/*' ! -name '*.so' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum |
      sha256sum | cut -c1-16
  )
}

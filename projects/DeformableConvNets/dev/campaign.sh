#!/usr/bin/env bash
# Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
# Looks for faults with random input, in large numbers: operators against their reference (a part of them under the
# sanitizers), damaged checkpoints, trainings that are killed, and configs with mistakes.
#
#   dev/campaign.sh                    all stages at full size: about an hour on 2 cores
#   dev/campaign.sh small              all but `sanitized`, which compiles first, in about 2 minutes
#   dev/campaign.sh [small] STAGE...   some of the stages operators sanitized checkpoints kills configs
#
#   SEED=0              of all random numbers
#   RESULTS=path        the summary (default: results/campaign.json for all stages at full size, otherwise
#                       build/campaign/campaign.json)
#   JOBS=2              stages that run at the same time, on one thread each
#   PYTHON=python3.12   the interpreter (default: the project's environment, if there is one, otherwise python3)
#
# A stage is dev/campaign/STAGE.py. It takes --seed, --output FILE.json and --cases (kills: --kills) and writes how many
# cases it tried and what it found: summary.py says under which names. A stage that fails, is killed or runs out of
# time is a finding too. The summary names commit, processor and versions, seeds and counts, and for each finding the
# line that shows it again. What the stages printed is in build/campaign. Exits with 1 if anything was found.
set -uo pipefail

script=$(readlink -f "${BASH_SOURCE[0]}")
dev=$(dirname "$script")
project=$(dirname "$dev")
all="operators sanitized checkpoints kills configs"

size=full
case "${1:-}" in
  -h | --help) sed -n '3,/^set /{/^set /!s/^# \{0,1\}//p}' "$script"; exit ;;
  small) size=small; shift ;;
esac
stages=${*:-}
for stage in $stages; do
  case " $all " in
    *" $stage "*) ;;
    *) echo "campaign: unknown stage '$stage'; there are $all, and before them the size small" >&2; exit 2 ;;
  esac
done
work=$project/build/campaign
if [ -z "$stages" ]; then
  stages=$all
  [ "$size" = full ] || stages=${all/sanitized /}
  [ "$size" = small ] || default=$project/results/campaign.json
fi
results=${RESULTS:-${default:-$work/campaign.json}}
[[ $results = /* ]] || results=$PWD/$results
seed=${SEED:-0} jobs=${JOBS:-2}
for name in seed jobs; do
  [[ ${!name} =~ ^[0-9]+$ ]] || { echo "campaign: ${name^^} must be a whole number, got '${!name}'" >&2; exit 2; }
done
((jobs > 0)) || { echo "campaign: JOBS must be at least 1, got 0" >&2; exit 2; }
python=${PYTHON:-$project/../../.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
python=$(command -v "$python") || { echo "campaign: no Python was found; name one: PYTHON=python3.12" >&2; exit 2; }
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
cd "$project" || exit 2

# How many cases; 0 stands for all that there are.
count() {
  case $size-$1 in
    full-operators) echo 45000 ;;
    full-sanitized) echo 5000 ;;
    full-checkpoints) echo 20000 ;;
    full-kills) echo 100 ;;
    full-configs) echo 0 ;;
    small-operators) echo 400 ;;
    small-sanitized) echo 50 ;;
    small-checkpoints) echo 200 ;;
    small-kills) echo 2 ;;
    small-configs) echo 300 ;;
  esac
}

# The command of a stage, without --output.
command_of() {
  local script=$1 option=cases
  [ "$1" != sanitized ] || script=operators
  [ "$1" != kills ] || option=kills
  command=("$python" "dev/campaign/$script.py" --seed "$seed" "--$option" "$(count "$1")")
  [ "$1" != sanitized ] || command=(dev/sanitize.sh --run "${command[@]}")
}

# In a process of its own, which ends what it started when it is asked to end.
run_stage() {
  local child begin=$SECONDS status command limit=7200
  [ "$size" = full ] || limit=600
  command_of "$1"
  printf '%q ' "${command[@]}" >"$work/$1.command"
  timeout --kill-after 30 "$limit" "${command[@]}" --output "$work/$1.json" >"$work/$1.txt" 2>&1 &
  child=$!
  trap 'kill "$child"; wait "$child"' TERM
  wait "$child"
  status=$?
  echo "$status $((SECONDS - begin)) $limit" >"$work/$1.status"
  echo "<== $1 ($((SECONDS - begin)) s, exit status $status)"
}

rm -rf "$work" && mkdir -p "$work" "$(dirname "$results")" || exit 2
# sanitize.sh asks for the interpreter too.
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHON=$python PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
stop() {
  trap '' INT TERM
  stopped=1
  echo "campaign: stopped; what was found so far:" >&2
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null
}
trap stop INT TERM
stopped=0 running=0
for stage in $stages; do
  if ((running >= jobs)); then
    wait -n
    running=$((running - 1))
  fi
  ((stopped)) && break
  echo "==> $stage"
  run_stage "$stage" &
  running=$((running + 1))
done
wait
# shellcheck disable=SC2086
"$python" dev/campaign/summary.py "$work" --size "$size" --seed "$seed" --output "$results" --stages $stages

#!/usr/bin/env bash
# Lint, types and tests, in the environment that scripts/setup.sh makes.
#
#   scripts/test.sh                 everything but the full forms of long tests
#   scripts/test.sh -m quick        what starts no engine
#   scripts/test.sh -m long         the full forms: 20 kills, a million segments, full statistical power in every case
#   scripts/test.sh [pytest arguments...]     for instance: scripts/test.sh tests/integration/test_tap.py
#
# Two sessions: two workers for most tests; then, one at a time, those that measure time or need idle cores (marker "alone").
# Nothing of a session outlives it or this script: no engine, no Ray, no file in /dev/shm (tests/helpers/guard.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
bin=.venv/bin
start=$SECONDS
say() { echo "test: $* ($((SECONDS - start)) s)"; }
say "ruff check"
$bin/ruff check tlt_verl patches scripts tests
say "ruff format --check"
$bin/ruff format --check --quiet tlt_verl patches scripts tests
say "mypy tlt_verl, beside the tests"
types=$(mktemp)
trap 'rm -f "$types"' EXIT
$bin/mypy tlt_verl >"$types" 2>&1 &
mypy=$!

ran=0 failed=0
session() { # what it is, pytest's arguments
  say "pytest, $1"
  local status=0
  $bin/python tests/helpers/guard.py --session $bin/python -m pytest --durations=15 "${@:2}" || status=$?
  case $status in
    0) ran=1 ;;
    5) say "no test here" ;; # pytest's word for an empty session
    *) failed=1 ;;
  esac
}
session "two workers" -n 2 "$@"
session "one at a time" --alone "$@"

status=0
wait "$mypy" || status=$?
cat "$types"
if [ "$failed" = 1 ] || [ "$status" != 0 ]; then say "FAILED"; exit 1; fi
if [ "$ran" = 0 ]; then say "no test was run"; exit 5; fi
say "all passed"

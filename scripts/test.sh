#!/usr/bin/env bash
# Lint, types and tests, in the environment that scripts/setup.sh makes.
#
#   scripts/test.sh [pytest arguments...]     for instance: scripts/test.sh -m "not slow" tests/unit
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
say "mypy tlt_verl"
$bin/mypy tlt_verl
say "pytest"
$bin/python -m pytest --durations=15 "$@"
say "all passed"

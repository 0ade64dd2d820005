#!/usr/bin/env bash
# Makes .venv in the checkout from the pinned requirements, and installs this package into it. Does nothing when that is done.
#
#   scripts/setup.sh            what this machine needs: requirements/cuda.txt with an NVIDIA driver, requirements/cpu.txt without
#   PYTHON=python3.11 scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=cuda; fi
pins="requirements/$device.txt"
mark=.venv/installed
state=$(cat "$pins" requirements/dev.txt setup.cfg pyproject.toml $(find patches/cpu_standins -name build -prune -o \( -name '*.py' -o -name setup.cfg \) -print | sort) | sha256sum)
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$state" ]; then exit 0; fi

python=${PYTHON:-$(command -v python3.11 || true)}
if [ -z "$python" ]; then
  echo "setup: Python 3.11 is needed (the pins in requirements/ are for it). Install it, or name it: PYTHON=/path/to/python3.11" >&2
  exit 1
fi
start=$SECONDS
say() { echo "setup: $* ($((SECONDS - start)) s)"; }

say "making .venv with $("$python" --version 2>&1), for the $device device"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check)
say "installing $(grep -c == "$pins") pinned packages from $pins; the first time takes one to three minutes"
# Two halves at a time, as each takes one core to unpack and to compile.
half='^(torch|ray|sglang|transformers|scipy|pyarrow|pandas)=='
grep -hE "$half" "$pins" requirements/dev.txt >.venv/first-half.txt
grep -h == "$pins" requirements/dev.txt | grep -vE "$half" >.venv/second-half.txt
"${pip[@]}" install --quiet --no-deps -r .venv/first-half.txt &
first=$!
"${pip[@]}" install --quiet --no-deps -r .venv/second-half.txt
wait "$first"
if ! problem=$(.venv/bin/python -c 'import torch' 2>&1); then
  echo "setup: torch cannot be imported (${problem##*$'\n'})." >&2
  [ "$device" = cuda ] || echo "setup: the package index serves a CUDA build of it. Name one with CPU wheels (PIP_INDEX_URL or" \
    "PIP_FIND_LINKS), remove .venv, and run this again" >&2
  exit 1
fi
if [ "$device" = cpu ] && ! .venv/bin/python -c 'import sgl_kernel, sys; sys.exit(getattr(sgl_kernel, "IS_STANDIN", False))' 2>/dev/null; then
  say "no native sgl_kernel here: installing the stand-in (patches/cpu_standins)"
  "${pip[@]}" install --quiet --no-deps --force-reinstall ./patches/cpu_standins
fi
say "installing tlt_verl, editable"
"${pip[@]}" install --quiet --no-deps -e .
echo "$state" >"$mark"
say "done"

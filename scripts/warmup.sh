#!/usr/bin/env bash
# A drafter for one of the two tasks, with tlt-verl warmup. Makes what is missing: the environment, the model, the data.
#
#   scripts/warmup.sh arithmetic|chat [options of tlt-verl warmup]
#
#   arithmetic   the quickstart's model and task
#   chat         the instruct model as it comes, and open-ended requests: responses of high entropy
#
# Writes drafters/<task>: checkpoints, curve.csv, report.json. Run again, it goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

task=${1:-}
case "$task" in
  arithmetic) target=models/smollm2-135m-reasoner prompts=data/arithmetic/train.parquet more=() ;;
  chat) target=models/smollm2-135m-instruct prompts=data/chat/test.parquet more=(--held-out 32 --max-new-tokens 256 --batch 128) ;;
  -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
  *) echo "warmup: got '$task', takes arithmetic or chat" >&2; exit 2 ;;
esac
shift
scripts/setup.sh
.venv/bin/python scripts/prepare_model.py
[ -f "$prompts" ] || .venv/bin/python scripts/make_data.py
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/tlt-verl warmup --target "$target" --prompts "$prompts" --out "drafters/$task" "${more[@]}" "$@"

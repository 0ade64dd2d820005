#!/usr/bin/env bash
# The main job on real input: GRPO on long additions with SmolLM2-135M, a Megatron policy and speculative SGLang rollouts.
# Makes what is missing: the environment, the model, the data.
#
#   scripts/quickstart.sh [--rollout tlt|sglang] [--steps N] [--replicas R] [--warmup MINUTES] [--compare] [hydra overrides...]
#
#   --rollout tlt      (default) rollouts through tlt_verl
#   --rollout sglang   verl's own backend without speculation: the baseline
#   --steps N          GRPO steps (default 4)
#   --replicas R       rollout replicas, and as many data-parallel ranks of the policy (default 1)
#   --warmup MINUTES   a drafter first (scripts/warmup.sh), unless there is one (default 0: none; the model-free drafter drafts
#                      from the first step on, and the run trains a drafter on idle devices)
#   --compare          then two steps of the baseline, and tokens/s side by side
#
# Shows a row a step and a table at the end; everything that the run prints goes to runs/<name>/train.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rollout=tlt steps=4 replicas=1 warmup=0 compare=0
while [ $# -gt 0 ]; do
  case "$1" in
    --rollout) rollout=$2; shift 2 ;;
    --steps) steps=$2; shift 2 ;;
    --replicas) replicas=$2; shift 2 ;;
    --warmup) warmup=$2; shift 2 ;;
    --compare) compare=1; shift ;;
    -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --*) echo "quickstart: unknown option $1; takes --rollout, --steps, --replicas, --warmup, --compare and hydra overrides (key=value)" >&2; exit 2 ;;
    *) break ;;
  esac
done
case "$rollout" in tlt | sglang) ;; *) echo "quickstart: --rollout: got '$rollout', takes tlt or sglang" >&2; exit 2 ;; esac
for number in "$steps" "$replicas"; do
  case "$number" in '' | *[!0-9]* | 0) echo "quickstart: --steps and --replicas take whole numbers above 0, got '$number'" >&2; exit 2 ;; esac
done

start=$SECONDS
say() { echo "quickstart: $* ($((SECONDS - start)) s)"; }
scripts/setup.sh
python=.venv/bin/python
cores=$(nproc)
threads=$((cores / replicas > 0 ? cores / replicas : 1))
say "model and data"
data=
if [ ! -f data/arithmetic/train.parquet ]; then
  $python scripts/make_data.py &
  data=$!
fi
$python scripts/prepare_model.py
if [ -n "$data" ]; then wait "$data"; fi

name="$rollout-$(date +%Y%m%d-%H%M%S)"
for override in "$@"; do
  case "$override" in trainer.experiment_name=*) name=${override#*=} ;; esac
done
overrides=(actor_rollout_ref.rollout.name="$rollout" trainer.total_training_steps="$steps"
  trainer.n_gpus_per_node="$replicas" trainer.experiment_name="$name")
if [ "$replicas" -gt 1 ]; then # the ranks and the engines share the machine's memory, too
  tokens=$((2048 / replicas > 1024 ? 2048 / replicas : 1024))
  overrides+=(actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$tokens
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=$tokens
    actor_rollout_ref.rollout.engine_kwargs.sglang.max_total_tokens=$((65536 / replicas)))
fi
if [ "$rollout" = sglang ]; then # a run with tlt removes what it leaves; for the baseline this script does
  TMPDIR=$(mktemp -d)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
  overrides+=(+actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend=torch_native '~actor_rollout_ref.rollout.custom.tlt')
elif [ "$warmup" != 0 ]; then
  if [ ! -e drafters/arithmetic/latest ]; then
    say "a drafter, in $warmup minutes"
    scripts/warmup.sh arithmetic --minutes "$warmup"
  fi
  overrides+=(+actor_rollout_ref.rollout.custom.tlt.drafter.path="$PWD/drafters/arithmetic/latest")
fi

# One process computes at a time when there is one replica; with R replicas each rank and each engine gets its share of cores.
export VERL_PLATFORM=cpu OMP_NUM_THREADS="$threads" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY=PASSIVE             # waiting threads give their core to the other processes of the run
export TORCHDYNAMO_DISABLE=1               # nothing is compiled on this device; saves 10 s of the first step
export RAY_worker_niceness="${RAY_worker_niceness:-0}" # Ray's 15 weighs hardly more than what takes idle time only
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_AUTH_MODE=disabled RAY_DEDUP_LOGS=0 RAY_TMPDIR="${RAY_TMPDIR:-/tmp}"
say "run $name: $steps steps, rollout $rollout, $replicas replica(s), $threads thread(s) each; log in runs/$name/train.log"
if ! $python -m verl.trainer.main_ppo --config-path "$PWD/configs" --config-name smollm2_cpu "${overrides[@]}" "$@" 2>&1 |
  $python -m tlt_verl.report.live "runs/$name/train.log"; then
  echo "quickstart: the run failed; the end of runs/$name/train.log:" >&2
  tail -n 25 "runs/$name/train.log" >&2
  exit 1
fi
say "done"
[ "$rollout" = tlt ] || exit 0
if [ "$compare" = 1 ]; then
  say "the baseline: two steps of verl's own rollouts, without speculation, on the same prompts"
  scripts/quickstart.sh --rollout sglang --steps 2 --replicas "$replicas" "$@" trainer.experiment_name="$name-baseline"
  $python -m tlt_verl.report.compare "runs/$name" "runs/$name-baseline"
fi
cat <<END

Where to look next
  runs/$name/train.log    everything that the run printed; the metrics tlt/* go to the logger that verl is told to use
  configs/smollm2_cpu.yaml                this run's configuration. README.md: "What you set", "What you read"
  .venv/bin/tlt-verl report tlt=runs/$name --out report.html    reward, time by phase, accept length, as one page
  scripts/quickstart.sh --compare         also two steps of the baseline; --steps 15: a drafter is trained on the way
  your own run                            .venv/bin/tlt-verl doctor, then actor_rollout_ref.rollout.name=tlt
END

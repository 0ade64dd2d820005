#!/usr/bin/env bash
# The quickstart's GRPO run twice, with the same seeds and data: verl's own SGLang rollout without speculation, then tlt with spot
# training on and a drafter that begins from nothing. Then tlt-verl report over both.
#
#   scripts/bench_e2e.sh [--steps N] [--replicas R] [--repeats K] [--tlt OVERRIDE]... [hydra overrides...]
#
#   --steps N       GRPO steps of each run (default 15)
#   --replicas R    rollout replicas, and as many data-parallel ranks of the policy (default 1)
#   --repeats K     pairs of runs, with seeds 1 to K (default 1); the order within a pair alternates
#   --tlt OVERRIDE  a hydra override of the tlt runs alone, e.g. --tlt 'actor_rollout_ref.rollout.custom.tlt.strategy.arms=[eagle:7x1@8]'
#
# Hydra overrides at the end are of all runs. In all of them verl looks ten times a second whether a batch is complete, not every two
# seconds (replay_often.py). Seeds fix the data's order, the policy's random state and the engine's; what is sampled
# still differs, as the two backends draw in another order: the rewards agree as curves, not step by step. Writes
# runs/e2e-<time>/report.html and report.md; each run's log is in runs/e2e-<time>-<rollout>-<seed>/train.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

steps=15 replicas=1 repeats=1 ours=()
while [ $# -gt 0 ]; do
  case "$1" in
    --steps) steps=${2:?--steps takes a number}; shift 2 ;;
    --replicas) replicas=${2:?--replicas takes a number}; shift 2 ;;
    --repeats) repeats=${2:?--repeats takes a number}; shift 2 ;;
    --tlt) ours+=("${2:?--tlt takes a hydra override}"); shift 2 ;;
    -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --*) echo "bench_e2e: unknown option $1; takes --steps, --replicas, --repeats, --tlt and hydra overrides (key=value)" >&2; exit 2 ;;
    *) break ;;
  esac
done
for number in "$steps" "$replicas" "$repeats"; do
  case "$number" in '' | *[!0-9]* | 0) echo "bench_e2e: --steps, --replicas and --repeats take whole numbers above 0, got '$number'" >&2; exit 2 ;; esac
done

bench="e2e-$(date +%Y%m%d-%H%M%S)"
runs=() # NAME=PATH, as the report takes them

run() { # rollout, seed, quickstart's options, --, hydra overrides
  local rollout=$1 seed=$2 options=() name
  shift 2
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  name="$bench-$rollout-$seed"
  scripts/quickstart.sh --rollout "$rollout" --steps "$steps" --replicas "$replicas" "${options[@]}" \
    trainer.experiment_name="$name" data.seed="$seed" actor_rollout_ref.actor.megatron.seed="$seed" \
    +actor_rollout_ref.rollout.engine_kwargs.sglang.random_seed="$seed" \
    trainer.v1.sampler.custom_sampler.path=scripts/replay_often.py trainer.v1.sampler.custom_sampler.name=OftenReplayBuffer "$@"
  runs+=("$rollout${repeats_suffix:+-$seed}=runs/$name")
}

repeats_suffix=
[ "$repeats" -gt 1 ] && repeats_suffix=1
baseline() { run sglang "$1" -- "${@:2}"; }
speculative() { # an empty ${ours[@]} is nothing
  run tlt "$1" --warmup 0 -- "${ours[@]}" "${@:2}"
}

for seed in $(seq "$repeats"); do
  if [ $((seed % 2)) = 1 ]; then
    baseline "$seed" "$@"
    speculative "$seed" "$@"
  else
    speculative "$seed" "$@"
    baseline "$seed" "$@"
  fi
done
mkdir -p "runs/$bench"
.venv/bin/tlt-verl report "${runs[@]}" --baseline "sglang${repeats_suffix:+-1}" --out "runs/$bench/report.html" --markdown "runs/$bench/report.md"

#!/usr/bin/env bash
# Do rollout log-probs stay the policy's over a run? Rollouts through tlt and through verl's own backend, each at both
# precisions, against Megatron's recomputation, over 9 steps (8 policy updates behind them) on the same prompts.
# With tlt, every target tensor of the engine is compared with the policy's export after each update (debug.fingerprint).
#
#   scripts/check_logprobs.sh [hydra overrides...]       about 15 minutes on two cores; small steps, a large learning rate
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

small=(data.train_batch_size=4 actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.rollout.n=4
  data.max_response_length=128 actor_rollout_ref.actor.optim.lr=1e-5 data.seed=1)
for dtype in float32 bfloat16; do
  for rollout in tlt sglang; do
    echo "== $rollout, $dtype"
    extra=()
    [ "$rollout" = tlt ] && extra=(+actor_rollout_ref.rollout.custom.tlt.debug.fingerprint=true)
    scripts/quickstart.sh --rollout "$rollout" --steps 9 "${small[@]}" "${extra[@]}" \
      actor_rollout_ref.actor.megatron.dtype="$dtype" actor_rollout_ref.rollout.dtype="$dtype" \
      trainer.experiment_name="logprobs-$rollout-$dtype" "$@"
  done
done
.venv/bin/python -m tlt_verl.report.logprobs runs/logprobs-{tlt,sglang}-{float32,bfloat16}

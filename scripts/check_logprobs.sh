#!/usr/bin/env bash
# Do rollout log-probs stay the policy's over a run? Rollouts through tlt and through verl's own backend, each at both
# precisions, against Megatron's recomputation, over 9 steps (8 policy updates behind them) on the same prompts.
# With tlt, every target tensor of the engine is compared with the policy's export after each update (debug.fingerprint).
#
#   scripts/check_logprobs.sh [hydra overrides...]
#
# About ten minutes on two cores. Small steps with a large learning rate; the entropy term keeps every update from being
# empty when all answers to a prompt are equally right.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

small=(data.train_batch_size=2 actor_rollout_ref.actor.ppo_mini_batch_size=2 actor_rollout_ref.rollout.n=4
  data.max_response_length=96 actor_rollout_ref.actor.optim.lr=1e-5 actor_rollout_ref.actor.entropy_coeff=0.01 data.seed=1)
for dtype in bfloat16 float32; do
  for rollout in tlt sglang; do
    echo "== $rollout, $dtype"
    extra=()
    [ "$rollout" = tlt ] && extra=(+actor_rollout_ref.rollout.custom.tlt.debug.fingerprint=true)
    scripts/quickstart.sh --rollout "$rollout" --steps 9 "${small[@]}" "${extra[@]}" \
      actor_rollout_ref.actor.megatron.dtype="$dtype" actor_rollout_ref.rollout.dtype="$dtype" \
      trainer.experiment_name="logprobs-$rollout-$dtype" "$@"
  done
done
.venv/bin/python -m tlt_verl.report.logprobs runs/logprobs-{tlt,sglang}-{bfloat16,float32}

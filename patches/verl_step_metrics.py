"""The metrics of a step in verl's V1 trainer, whatever logger the user chose.

verl fetches counters of speculation only for models with multi-token prediction, and has no hook for a plugin's
metrics. Installed when verl's trainer is imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from tlt_verl.patches.seam import Seam, Target
from tlt_verl.patches.trainer_servers import server_handles

MODULE = "verl.trainer.ppo.v1.trainer_base"
_COMPUTE = f"{MODULE}:PPOTrainer._compute_metrics"


_STATE_TIMEOUT_S = 20.0

logger = logging.getLogger(__name__)


def _install(
    name: str,
    step_metrics: Callable[[Sequence[tuple[dict, int]], float], dict[str, float]],
    engine_metrics: Callable[[Sequence[dict]], dict[str, float]],
) -> None:
    """Add metrics to each step of a run with rollout `name`.

    Args:
        step_metrics: of `[(extra_fields, tokens), ...]`, one a response, and the generation's seconds.
        engine_metrics: of what the replicas' `drafter_state` says.
    """
    import transfer_queue
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    original = PPOTrainer._compute_metrics

    @functools.wraps(original)
    def compute_metrics(self: Any, batch: Any, metrics: dict, timing_raw: dict, *args: Any, **kwargs: Any) -> None:
        original(self, batch, metrics, timing_raw, *args, **kwargs)
        if self.config.actor_rollout_ref.rollout.name != name:
            return
        data = transfer_queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields", "responses"]
        )
        tokens = data["responses"].offsets().diff().tolist()
        real = [not tag.get("is_padding", False) for tag in batch.tags]
        rows = zip(data.pop("extra_fields").tolist(), tokens, real, strict=True)
        responses = [(fields or {}, length) for fields, length, is_real in rows if is_real]
        metrics.update(step_metrics(responses, timing_raw.get("gen", 0.0)))
        metrics.update(engine_metrics(_states(self)))

    PPOTrainer._compute_metrics = compute_metrics


def _states(trainer: Any) -> list[dict]:
    """The replicas' states in their order; {} for one that fails or does not answer in time, and the log says so."""
    import ray

    asked = [handle.drafter_state.remote() for handle in server_handles(trainer)]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_STATE_TIMEOUT_S) if asked else ([], [])
    states: list[dict] = []
    for replica, state in enumerate(asked):
        try:
            states.append(ray.get(state, timeout=0) if state in answered else {})
        except Exception as error:  # metrics may not end a run
            logger.warning("replica %d could not say its state: %s", replica, error)
            states.append({})
        else:
            if state not in answered:
                logger.warning("replica %d did not say its state in %.0f s", replica, _STATE_TIMEOUT_S)
    return states


SEAM = Seam(
    name="verl.step_metrics",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path=_COMPUTE,
            parameters=("batch", "metrics", "timing_raw"),
            source_contains=('select_fields=["extra_fields"]', 'data["responses"].offsets().diff()', "is_padding"),
        ),
        Target(
            path=f"{MODULE}:PPOTrainer._rollout_server_managers",
            source_contains=('getattr(self, "llm_server_manager", None)',),
        ),
        Target(
            path="verl.workers.rollout.llm_server:LLMServerManager._initialize_llm_servers",
            source_contains=("self.server_handles = [",),
        ),
        Target(path="transfer_queue:kv_batch_get", parameters=("keys", "partition_id", "select_fields")),
    ),
    why="The plugin's metrics in verl's own logger.",
    install=_install,
)

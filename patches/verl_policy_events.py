"""When the policy computes, and what, as verl's V1 trainer knows it: for the run's timeline.

Installed when verl's trainer is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tlt_verl.patches.seam import Seam, Target

MODULE = "verl.trainer.ppo.v1.trainer_base"
_TRAINER = f"{MODULE}:PPOTrainer"
_STATES = {"_compute_old_log_prob": "log_probs", "_compute_ref_log_prob": "log_probs", "_update_actor": "update"}
"""What the policy does in a method of the trainer, which waits for it."""


def _install(name: str, say: Callable[[Any, str, int], None]) -> None:
    """Call `say(config, state, global step)` when the policy begins and when it waits, in a run with rollout `name`."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    def told(original: Callable[..., Any], state: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.config.actor_rollout_ref.rollout.name != name:
                return original(self, *args, **kwargs)
            say(self.config, state, self.global_steps)
            try:
                return original(self, *args, **kwargs)
            finally:
                say(self.config, "waiting", self.global_steps)

        return method

    for method, state in _STATES.items():
        setattr(PPOTrainer, method, told(getattr(PPOTrainer, method), state))


SEAM = Seam(
    name="verl.policy_events",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path=f"{_TRAINER}._compute_old_log_prob",
            source_contains=("self.actor_rollout_wg.compute_log_prob(batch)",),
        ),
        Target(path=f"{_TRAINER}._compute_ref_log_prob", source_contains=("compute_ref_log_prob(batch)",)),
        Target(path=f"{_TRAINER}._update_actor", source_contains=("self.actor_rollout_wg.update_actor(batch)",)),
    ),
    why="The timeline shows when the policy updates.",
    install=_install,
)

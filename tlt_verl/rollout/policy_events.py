"""The policy's lane of the timeline: `tlt-event` lines of the trainer's process, where a drafter is trained.

The replicas' lanes are `tlt_verl.spot.service`'s; `tlt_verl.report.timeline` reads both.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from tlt_verl.config import PREFIX, load_config
from tlt_verl.spot.service import say_event


def say_policy(config: Any, state: str, step: int) -> None:
    """Print what the policy does from now on; nothing in a run that trains no drafter.

    Args:
        config: verl's, of the run.
        state: one of `tlt_verl.report.timeline.POLICY_STATES`.
        step: the trainer's global step. The replicas' lanes say the one whose weights they have, which is the one
            before: a step of the timeline goes from one sync to the next.
    """
    if load_config(OmegaConf.select(config, PREFIX)).spot.enable:
        say_event("policy", state, step - 1)

"""verl's replay buffer, asked ten times a second whether a batch is complete, not every two seconds.

For benchmarks of runs whose generation takes a few seconds: `timing_s/gen` then says when generation ended. Loaded by
verl, through `trainer.v1.sampler.custom_sampler`, in all runs that are compared. For the trainer mode `sync`.
"""

from __future__ import annotations

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class OftenReplayBuffer(ReplayBuffer):
    """verl's own but for the interval."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": 0.1})

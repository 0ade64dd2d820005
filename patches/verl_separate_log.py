"""verl's `separate_async` without colocated replicas ends in a TypeError: a line of its log is told to flush.

`logger.info(..., flush=True)`, with `actor_rollout_ref.hybrid_engine=false`. The module's logger takes the word and
does nothing about it.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from tlt_verl.patches.seam import Seam, Target

MODULE = "verl.trainer.ppo.v1.trainer_separate_async"


class _TakesFlush(logging.LoggerAdapter):
    """A logger whose lines may be told to flush, as `print` may."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {name: value for name, value in kwargs.items() if name != "flush"}


def _install() -> None:
    from verl.trainer.ppo.v1 import trainer_separate_async

    trainer_separate_async.logger = _TakesFlush(trainer_separate_async.logger, {})


SEAM = Seam(
    name="verl.separate_log",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(path=f"{MODULE}:logger"),
        Target(path=f"{MODULE}:PPOTrainerSeparateAsync._setup", source_contains=("flush=True,",)),
    ),
    why="verl's separate_async with hybrid_engine=false fails in a line of its log.",
    install=_install,
)

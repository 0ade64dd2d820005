"""What processes of spot training have in common: priority, pace, and what they say of themselves when they are up."""

from __future__ import annotations

import contextlib
import os
import sys

import psutil

from tlt_verl.board import Board, Phase

_SLOWER = 4
UPSTREAM = ("verl", "sglang")
"""What no process of spot training imports: 600 MB and 20 s, and nothing of it is used there."""


def upstream() -> list[str]:
    """What this process has imported of that."""
    return [name for name in UPSTREAM if name in sys.modules]


def started(who: str) -> str:
    """A line for the run's log."""
    rss = psutil.Process().memory_info().rss
    return f"tlt: the {who} is up with {rss / 1e6:.0f} MB, imported of upstream: {', '.join(upstream()) or 'nothing'}"


def between_looks(board: Board, seconds: float) -> float:
    """How long to wait until the next look: longer while the phase is not the rollout's, for it costs who computes."""
    return seconds if board.phase == Phase.GENERATE else _SLOWER * seconds


def yield_to_all() -> None:
    """Let this thread take only processor time that nobody else wants."""
    os.nice(19 - os.nice(0))
    with contextlib.suppress(OSError):  # a container may forbid it; niceness stays
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

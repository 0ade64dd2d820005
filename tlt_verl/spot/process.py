"""What processes of spot training have in common: their priority, and what they say of themselves when they are up."""

from __future__ import annotations

import contextlib
import os
import sys

import psutil

UPSTREAM = ("verl", "sglang")
"""What no process of spot training imports: 600 MB and 20 s, and nothing of it is used there."""


def upstream() -> list[str]:
    """What this process has imported of that."""
    return [name for name in UPSTREAM if name in sys.modules]


def started(who: str) -> str:
    """A line for the run's log."""
    rss = psutil.Process().memory_info().rss
    return f"tlt: the {who} is up with {rss / 1e6:.0f} MB, imported of upstream: {', '.join(upstream()) or 'nothing'}"


def yield_to_all() -> None:
    """Let this thread take only processor time that nobody else wants."""
    os.nice(19 - os.nice(0))
    with contextlib.suppress(OSError):  # a container may forbid it; niceness stays
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

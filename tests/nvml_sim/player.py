"""Plays a trace of the simulated NVML through the real binding: a task on standard input, a line of JSON for each step.

Runs in a process of its own, because the binding keeps the library that it found.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from tlt_verl.board import Board, Phase
from tlt_verl.spot import nvml
from tlt_verl.spot.idle import EngineProbe, IdleDetector, NvmlProbe, PhaseProbe, device_probe

GIB = 1024**3


def main() -> None:
    """One of the three tasks."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    task = json.load(sys.stdin)
    {"detect": detect, "choose": choose, "report": report}[task.pop("do")](**task)


def detect(steps: list[dict[str, Any]], **settings: Any) -> None:
    """The detector's decision at each step.

    A step sets what it names and keeps the rest: `moment` of the trace (the next one), `at` (1.5 s later), `training`
    (as the detector decided), `requests`, `phase`.
    """
    board = Board.create("player", Path(os.environ["NVML_SIM_MOMENT"]).parent)
    board.phase = Phase.GENERATE
    now = 0.0
    show(steps[0].get("moment", 0))
    try:
        probe = NvmlProbe(
            settings["device"],
            int(settings.get("least_free", 4) * GIB),
            lambda: set(settings.get("own", ())),
            engine_pids=lambda: set(settings.get("engine", ())),
            clock=lambda: now,
        )
    except ValueError as error:
        return say(error=str(error))
    clock_ns = {"clock_ns": lambda: round(now * 1e9)}
    detector = IdleDetector([PhaseProbe(board, **clock_ns), EngineProbe(board, **clock_ns), probe], idle_s=0)
    for number, step in enumerate(steps):
        show(step.get("moment", number))
        now = step.get("at", now + 1.5)
        board.beat_ns = round(now * 1e9)
        board.requests, board.phase = step.get("requests", board.requests), step.get("phase", board.phase)
        decision = detector.update(now, step.get("training"))
        error = probe.error and probe.error.name
        say(train=decision.train, cause=decision.cause, reason=decision.reason, uuid=probe.device.uuid, error=error)
    return None


def choose(devices: list[str | None]) -> None:
    """The kind of probe that each device gets."""
    for device in devices:
        probe = device_probe(device, cores=1, least_free_bytes=GIB, own_pids=set)
        say(probe=type(probe).__name__, cause=probe.read().cause)


def report() -> None:
    """What the doctor sees."""
    found = nvml.report()
    say(driver=found.driver, names=found.names, error=found.error)


def show(moment: int) -> None:
    """Make it that moment of the trace."""
    Path(os.environ["NVML_SIM_MOMENT"]).write_text(str(moment))


def say(**values: Any) -> None:
    """One line."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()

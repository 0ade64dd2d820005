"""Watches a run: keeps its whole output in a log, and shows a person what matters as it happens.

    python -m verl.trainer.main_ppo ... 2>&1 | python -m tlt_verl.report.live runs/NAME/train.log

Prints what the run is doing while it starts, one row a step, and a table at the end. Exit status 1 when no step was
completed. Knows the log's format and nothing else of ours.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from tlt_verl.report.console import (
    closing_table,
    header,
    is_training_step,
    parse_step,
    plain,
    step_row,
    validation_reward,
)

# What the run is doing, by a text that its output then contains, in the order in which it comes about.
_STAGES = (
    ("Started a local Ray instance", "Ray is up; starting the trainer"),
    ("server: rollout_mode=", "starting the rollout engine"),
    ("Training Progress:   0%", "training"),
    ("tlt fingerprint:", ""),
    ("precision mix that drifts", ""),
)
_QUIET_S = 20.0


class Watcher:
    """Follows the lines of one run.

    Args:
        log: gets every line as it came.
        show: gets what a person should see, line by line.
        clock: seconds, monotonic.
    """

    def __init__(self, log: TextIO, show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self._log, self._show, self._clock = log, show, clock
        self._start = self._shown = clock()
        self._stage, self._stages_passed = "starting", 0

    def line(self, line: str) -> None:
        """Take the next line of the run's output."""
        self._log.write(line)
        self._log.flush()
        if (step := parse_step(line)) is not None:
            self._step(*step)
            return
        text = plain(line)
        for number, (mark, stage) in enumerate(_STAGES, 1):
            if mark in text:
                self._enter(number, stage, text)

    def heartbeat(self) -> None:
        """Say that the run is alive, if nothing has been shown for a while."""
        if self._clock() - self._shown >= _QUIET_S:
            self._say(f"  ... {self._stage}, {self._clock() - self._start:.0f} s")

    def close(self) -> None:
        """Print the closing table, or that there is nothing to put into one."""
        if self.steps:
            self._say(f"\n{len(self.steps)} steps in {self._clock() - self._start:.0f} s\n{closing_table(self.steps)}")
        else:
            self._say("no step was completed")

    def _step(self, number: int, metrics: dict[str, float]) -> None:
        if (reward := validation_reward(metrics)) is not None:
            self._say(f"  validation at step {number}: reward {reward:.3f}")
        if is_training_step(metrics):
            if not self.steps:
                self._say(header())
            self.steps.append((number, metrics))
            self._say(step_row(number, metrics))

    def _enter(self, number: int, stage: str, text: str) -> None:
        """A stage is said once, and none after a later one; a line that is a message itself is shown as it is."""
        if not stage:
            self._say(text)
        elif number > self._stages_passed:
            self._stage, self._stages_passed = stage, number
            self._say(f"  {stage}, {self._clock() - self._start:.0f} s")

    def _say(self, text: str) -> None:
        self._shown = self._clock()
        self._show(text)


def watch(lines: Iterable[str], watcher: Watcher) -> None:
    """Feed all lines to the watcher, with heartbeats in between."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(1.0):
            watcher.heartbeat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        for line in lines:
            watcher.line(line)
    finally:
        done.set()
        thread.join()
    watcher.close()


def main() -> int:
    """Watch standard input."""
    parser = argparse.ArgumentParser(description="Keep a run's output in a log and show its steps.")
    parser.add_argument("log", type=Path)
    path = parser.parse_args().log
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    with path.open("w") as log:
        watcher = Watcher(log, lambda text: print(text, flush=True))
        watch(sys.stdin, watcher)
    return 0 if watcher.steps else 1


if __name__ == "__main__":
    sys.exit(main())

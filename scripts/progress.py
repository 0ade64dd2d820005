"""Progress that is visible everywhere: a line rewritten in place on a terminal, a new line every few seconds elsewhere.

Knows counts, rates and remaining time. Knows nothing about what is being counted.
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

BAR_WIDTH = 20


def format_seconds(seconds: float) -> str:
    """Seconds as `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Progress:
    """Reports steps done out of `total`; `start` steps were done before this run and do not count towards the rate."""

    def __init__(
        self,
        label: str,
        total: int,
        *,
        start: int = 0,
        interval_s: float = 5.0,
        out: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total, self.start, self.interval_s = label, total, start, interval_s
        self.out = out or sys.stdout
        self.clock = clock
        self.in_place = self.out.isatty()
        self.began = clock()
        self.last_shown = float("-inf")
        self.units = 0
        self.line_is_open = False

    def update(self, done: int, *, units: int = 0, note: str = "") -> None:
        """`done` steps of the total are finished; `units` (tokens) more were processed since the last call."""
        self.units += units
        now = self.clock()
        if done < self.total and now - self.last_shown < (0.2 if self.in_place else self.interval_s):
            return
        self.last_shown = now
        elapsed_s = max(now - self.began, 1e-9)
        eta_s = elapsed_s / max(done - self.start, 1) * (self.total - done)
        filled = BAR_WIDTH * done // self.total
        bar = "#" * filled + "." * (BAR_WIDTH - filled)
        line = f"{self.label} [{bar}] {done}/{self.total}  {note}  {self.units / elapsed_s:.0f} tokens/s"
        line += f"  {format_seconds(elapsed_s)} elapsed, {format_seconds(eta_s)} to go"
        self.line_is_open = self.in_place and done < self.total
        prefix = "\r\x1b[K" if self.in_place else ""
        print(f"{prefix}{line}", end="" if self.line_is_open else "\n", file=self.out, flush=True)

    def finish(self) -> None:
        """Ends the line that is being rewritten, where the work ended before its total."""
        if self.line_is_open:
            print(file=self.out, flush=True)
            self.line_is_open = False

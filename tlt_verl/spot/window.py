"""Where the time of one window of training went, for the log."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from tlt_verl.board import Board

logger = logging.getLogger(__name__)

_COUNTERS = ("trained_ns", "judged_ns", "trained_steps")
_TOO_SHORT_S = 0.25


class Window:
    """From idle to yielded.

    Args:
        board: whose counters say what was done in it.
    """

    def __init__(self, board: Board) -> None:
        self._board, self._begun = board, time.monotonic()
        self._before = board.values(_COUNTERS)
        self._prepared_s: dict[str, float] = {}

    @contextlib.contextmanager
    def preparing(self, what: str) -> Iterator[None]:
        """A part of what training needs is being got."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._prepared_s[what] = time.monotonic() - begun

    def report(self, rows: int, stopped_by: str) -> None:
        """Say where its time went, unless it was none."""
        seconds = time.monotonic() - self._begun
        trained, judged, steps = (getattr(self._board, name) - value for name, value in self._before.items())
        if seconds < _TOO_SHORT_S and not steps:
            return
        prepared = ", ".join(f"{what} {spent:.2f} s" for what, spent in self._prepared_s.items())
        logger.info(
            "tlt: window of %.2f s (%s): %d steps of %d rows in %.2f s, gate %.2f s; %s",
            *(seconds, prepared, steps, rows, trained / 1e9, judged / 1e9, stopped_by or "it ended itself"),
        )

"""Micro-steps: training steps that are so short that the device can be given back between two of them.

Knows how long steps took and cuts the next ones to size; knows samples and packs, neither the trainer nor the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from tlt_verl.drafter.packing import Sample, fill

_SHARE = 0.6  # of the bound that a step is planned to take; the rest is for a noisy machine
_FIRST_ROWS = 128
_UNIT = 32
_GROWTH = 1.25
_SEEN = 16  # last steps that decide


class StepSize:
    """How many rows a step may have to stay within its time.

    A step has a fixed cost (the optimizer's) and one a row. Both are in what is measured, so the rows follow the time:
    up by a quarter or a unit where they would still take less than planned then, down in proportion where it took more.

    Args:
        seconds: that a step may take.
        most_rows: upper bound, whatever the time allows.
        unit: rows are a multiple of it, and at least one: fewer would take as long.

    Raises:
        ValueError: an argument is not positive.
    """

    def __init__(self, seconds: float, most_rows: int, unit: int = _UNIT) -> None:
        if not seconds > 0 or most_rows < 1:
            raise ValueError(f"seconds and most_rows: got {seconds} and {most_rows}, take numbers above 0")
        self._planned_s, self._most, self._unit = _SHARE * seconds, most_rows, unit
        self._limit_s = seconds
        self._recent: deque[float] = deque(maxlen=_SEEN)
        self.rows = self._whole(_FIRST_ROWS)
        self.over = 0
        """Steps that took longer than they may."""

    def observe(self, rows: int, seconds: float) -> bool:
        """Take note of a step; whether `rows` changed, so that packs have to be cut anew."""
        self.over += seconds > self._limit_s
        self._recent.append(seconds)
        before, slowest = self.rows, max(self._recent)
        if seconds > self._planned_s:
            self.rows = self._whole(rows * max(0.25, self._planned_s / seconds))
        elif len(self._recent) == _SEEN:
            larger = self._whole(max(self.rows * _GROWTH, self.rows + self._unit))
            self.rows = larger if slowest * larger / self.rows < self._planned_s else self.rows
        if self.rows != before:
            self._recent.clear()
        return self.rows != before

    def _whole(self, rows: float) -> int:
        return min(self._most, max(1, int(rows / self._unit)) * self._unit)


class Packs:
    """Packs without end, epoch after epoch, from samples that may be replaced at any time.

    Args:
        seed: of the order.
    """

    def __init__(self, seed: int) -> None:
        self._order = torch.Generator().manual_seed(seed)
        self._samples: Sequence[Sample] = ()
        self._packs: Iterator[list[Sample]] = iter(())
        self.epochs = 0

    def replace(self, samples: Sequence[Sample]) -> None:
        """Go on with these samples."""
        self._samples, self._packs = samples, iter(())

    def cut_anew(self) -> None:
        """Begin the epoch again: the size of packs has changed."""
        self._packs = iter(())

    def next(self, max_rows: int) -> list[Sample] | None:
        """The next pack of at most `max_rows` rows; None where no sample has a row to learn from."""
        pack = next(self._packs, None)
        if pack is None:
            self._packs = fill(self._samples, max_rows, self._order)
            pack = next(self._packs, None)
            self.epochs += pack is not None
        return pack

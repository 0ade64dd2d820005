"""What engines and runs wrote, kept for the tests that fail afterwards: pytest shows it with the failure.

An engine runs once for many tests, so its log is long gone when one of them fails. `keep` is called by whoever runs an
engine; `shown` by the suite's report.
"""

from __future__ import annotations

from collections import deque

_SHOWN_CHARACTERS = 6000
_kept: deque[tuple[str, str]] = deque(maxlen=3)


def keep(label: str, text: str) -> None:
    """Remembers the end of a log; of those before only the last few."""
    _kept.append((label, text[-_SHOWN_CHARACTERS:]))


def shown() -> list[tuple[str, str]]:
    """A title and a text for each log that is remembered, the last one last."""
    return [(f"the end of the log of {label}", text) for label, text in _kept]

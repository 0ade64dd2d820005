"""A plugin of SGLang for tests: retraction every five steps, switched on and off by a file while the engine runs."""

from __future__ import annotations

import os

SWITCH = "TLT_TEST_SWITCH"  # names the file; as in engine_runner, which makes and removes it
STEPS = 5


class Switch:
    """True while the file is there."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __bool__(self) -> bool:
        return os.path.exists(self._path)


def install() -> None:
    """The plugin's entry point."""
    from sglang.srt.managers import scheduler

    assert scheduler.TEST_RETRACT is not None and scheduler.TEST_RETRACT_INTERVAL > 0, "SGLang's own switch is gone"
    scheduler.TEST_RETRACT, scheduler.TEST_RETRACT_INTERVAL = Switch(os.environ[SWITCH]), STEPS

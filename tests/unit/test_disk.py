"""The coordinator's disk: how long a checkpoint waits. What is on it, `test_coordinator` looks at."""

import pytest

from tlt_verl.spot.disk import Rest


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_checkpoint_waits_from_the_last_ones_end_and_not_longer():
    clock = Clock()
    rest = Rest(clock)
    assert rest.seconds() == 0, "the first one waits for nothing"
    with rest.after():
        clock.now += 0.5
    assert rest.seconds() == 10
    clock.now += 4
    assert rest.seconds() == 6
    clock.now += 100
    assert rest.seconds() == 0, "it is long past: what has changed since then is written at once"


def test_a_slow_disk_is_waited_for_a_minute_at_most():
    clock = Clock()
    rest = Rest(clock)
    with pytest.raises(OSError, match="full"), rest.after():
        clock.now += 30
        raise OSError("full")
    assert rest.seconds() == 60

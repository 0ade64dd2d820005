"""How long a publication kept the scheduler: only what it took from steps that were waiting for their turn."""

from __future__ import annotations

import time

from tlt_verl.engine.publication import PublishGap


def test_the_gap_is_from_the_step_before_to_the_step_behind():
    gap = PublishGap()
    gap.step_begins()
    gap.step_ends()
    gap.published()
    time.sleep(0.02)
    gap.step_begins()
    assert 0.02 <= gap.seconds < 2
    last = gap.seconds
    gap.step_ends()
    time.sleep(0.02)
    gap.step_begins()
    assert gap.seconds == last, "a gap without a publication was counted"


def test_a_publication_while_nothing_runs_keeps_nobody_waiting():
    gap = PublishGap()
    gap.step_begins()
    gap.step_ends()
    gap.published()
    gap.idle()
    time.sleep(0.02)
    gap.step_begins()
    assert gap.seconds == 0.0

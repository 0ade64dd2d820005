"""The spot worker and the gate: what is judged, when, and what becomes of what passes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_spot_worker import GATE_NOW, Stage, another_worker, quiet  # noqa: F401 - a fixture

from tlt_verl.board import SpotState
from tlt_verl.spot.worker import WorkerSettings


def test_a_drafter_that_passes_the_gate_is_published_and_its_version_noted(tmp_path):
    stage = Stage(tmp_path, settings=GATE_NOW)
    assert stage.tick(1) == 1, "it is judged behind a step"
    stage.tick(1)
    stage.settle(lambda: stage.coordination.serving_version >= 1)
    assert stage.learner.gate.published == stage.board.gate_published >= 1 and stage.board.gate_rejected == 0
    assert stage.board.gate_accept_micro >= 1_000_000 and stage.board.judged_ns > 0
    serving = stage.coordination.serving
    assert {tensor.dtype for tensor in serving.values()} == {torch.bfloat16}
    [accept_len, *_] = [call[1] for call in stage.links.calls if call[0] == "publish"]
    assert accept_len == pytest.approx(stage.board.gate_accept_micro / 1e6, abs=1e-6)
    version = stage.coordination.serving_version
    stage.tick(1)
    assert [call[2] for call in stage.links.calls if call[0] == "fetch"][-1] == version, "it has what it has published"


def interrupted(folder: Path) -> Stage:
    """It has learnt from one step, and the device is asked for inside the first step of the gate."""
    stage = Stage(folder, settings=GATE_NOW)
    judging, stage.judgements = stage.learner.judging, 0

    def counted(*arguments: Any) -> Any:
        stage.judgements += 1
        if stage.judgements == 1:
            stage.request()
        return judging(*arguments)

    stage.learner.judging = counted
    assert stage.tick(2) == 1 and len(stage.learner.held_out()) > 1
    assert stage.states[-2:] == [SpotState.YIELDING, SpotState.BUSY] and stage.learner.gate.published == 0
    stage.settle(lambda: stage.coordination.merged == 1)
    stage.board.requests = 0
    return stage


def test_a_judgement_that_is_interrupted_goes_on_in_the_next_window(tmp_path):
    stage = interrupted(tmp_path)
    stage.tick(1)
    assert stage.learner.gate.published == stage.judgements == 1


@pytest.mark.parametrize("change", ["policy", "master"])
def test_a_judgement_begins_anew_where_what_it_is_of_has_changed(tmp_path, change):
    """A verdict is about the current policy, and about what the worker has."""
    stage = interrupted(tmp_path)
    stage.next_policy() if change == "policy" else another_worker(stage)
    stage.tick(1)
    assert stage.judgements == 2


def test_what_was_learnt_while_a_publication_is_under_way_is_handed_in_too(tmp_path):
    """A publication takes seconds. The device may be asked for, and another worker may merge, before it ends."""
    stage, done = Stage(tmp_path, settings=GATE_NOW), threading.Event()
    stage.links.during["publish"] = lambda: done.wait(60)
    stage.tick(1)
    stage.settle(lambda: stage.coordination.merged == 1)
    assert stage.tick(2) == 2 and stage.learner.gate.published == 1
    others = another_worker(stage)
    done.set()
    stage.settle(lambda: stage.coordination.serving_version == 1)
    assert stage.tick(2) == 2
    stage.settle(lambda: stage.coordination.tokens - others == stage.board.trained_tokens, seconds=3)


def test_a_costly_judgement_is_not_made_again_before_twice_as_long_was_trained(tmp_path):
    """Idle time is for training: a gate that is due after every step would take most of it."""
    stage, slow_s = Stage(tmp_path, settings=replace(GATE_NOW, train_per_gate=WorkerSettings.train_per_gate)), 0.3
    judging, begun = stage.learner.judging, []

    def slow(*arguments: Any) -> Any:
        begun.append(stage.board.trained_ns)
        time.sleep(slow_s)
        return judging(*arguments)

    stage.learner.judging = slow
    while len(begun) < 2 and stage.board.trained_ns < 30e9:
        stage.tick(1)
    assert len(begun) == 2 and begun[1] - begun[0] >= 2 * slow_s * 1e9

"""What goes wrong at a spot worker costs the drafter's training at most, and nothing that was learnt is lost.

First in this process, on the stage of `test_spot_worker`; then a worker's process, from which the device is taken.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tlt_verl.board import SpotState
from tlt_verl.spot import worker as worker_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from sampled_target import one_thread
from test_spot_learner import SEGMENTS, poisoned, same
from test_spot_worker import GATE_NOW, Stage

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_yield.py"
PREEMPTIONS = 16


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """One that does not pause."""
    monkeypatch.setattr(worker_module, "_RETRY_S", 0.0)
    monkeypatch.setattr(worker_module, "_AGAIN_S", 0.0)
    with one_thread():
        made = Stage(tmp_path)
        yield made
        made.writer.close()


@pytest.mark.parametrize("call", ["policy", "fetch", "choose_hot"])
def test_a_link_that_is_down_is_counted_and_training_begins_when_it_is_up(stage, call):
    stage.links.down = {call}
    assert stage.tick(5) == 0
    assert stage.worker.failures == {"link": 1} and stage.board.failures == 1
    assert stage.board.state == SpotState.BUSY
    stage.links.down = set()
    assert stage.tick(5) == 5 and stage.board.failures == 1


def test_it_pauses_behind_a_failure(stage, monkeypatch):
    monkeypatch.setattr(worker_module, "_RETRY_S", 0.3)
    stage.links.down, begun = {"fetch"}, time.monotonic()
    stage.tick(5)
    stage.links.down = set()
    while stage.tick(5) == 0:
        assert stage.links.names().count("fetch") == 1
    assert time.monotonic() - begun >= 0.3


def test_a_copy_that_could_not_be_handed_in_goes_in_with_the_next(stage):
    stage.links.down = {"submit"}
    stage.tick(5)
    stage.settle(lambda: stage.board.failures)
    assert stage.worker.failures == {"link": 1} and stage.coordination.merged == 0
    stage.links.down = set()
    assert stage.tick(4) == 4
    stage.settle(lambda: stage.coordination.merged == 1)
    assert stage.coordination.state()["steps"] == 9


def test_a_drafter_that_could_not_be_published_is_no_reason_to_stop(stage):
    stage.worker.settings = GATE_NOW
    stage.links.down = {"publish"}
    assert [stage.tick(1), stage.tick(1)] == [1, 1]
    stage.settle(lambda: stage.board.failures)
    assert stage.coordination.serving_version == 0
    stage.links.down = set()
    assert [stage.tick(1), stage.tick(1)] == [1, 1]
    stage.settle(lambda: stage.coordination.serving_version)


def diverged(stage: Stage) -> None:
    assert not stage.learner.buffer.is_held_out(poisoned(SEGMENTS[0]).prompt_id)
    stage.write([poisoned(SEGMENTS[0])])
    stage.tick(10**6)
    assert stage.worker.failures == {"diverged": 1} and stage.board.failures == 1
    assert stage.board.state == SpotState.BUSY


def test_a_copy_that_diverges_is_not_handed_in_and_the_next_begins_with_the_master(stage):
    master = stage.coordination.state()["drafter"]
    diverged(stage)
    assert stage.coordination.merged == stage.coordination.version == 0
    assert same(stage.coordination.state()["drafter"], master)
    stage.next_policy()
    assert stage.tick(3) == 3
    assert same(stage.learner.loaded, master)
    stage.settle(lambda: stage.coordination.merged == 1)
    assert [call[1] for call in stage.links.calls if call[0] == "submit"] == [0]


def test_a_copy_that_diverged_is_not_handed_in_by_a_window_that_ends_early_either(stage):
    diverged(stage)
    stage.said[SpotState.IDLE] = stage.request
    assert stage.tick(3) == 0
    stage.said.clear()
    stage.board.requests = 0
    stage.next_policy()
    stage.tick(3)
    stage.settle(lambda: stage.coordination.merged == 1)
    assert [call[1] for call in stage.links.calls if call[0] == "submit"] == [0]
    assert stage.worker.failures == {"diverged": 1}


def fails(error: Exception) -> Callable[..., Any]:
    def raising(*arguments: Any) -> Any:
        raise error

    return raising


BREAKS: dict[str, Callable[[Stage], None]] = {
    "step": lambda stage: setattr(stage.learner, "micro_step", fails(RuntimeError("out of memory"))),
    "rings": lambda stage: setattr(stage.rings, "poll", fails(RuntimeError("no such ring"))),
    "release": lambda stage: setattr(stage.learner, "release", fails(RuntimeError("the device is gone"))),
    "load": lambda stage: setattr(stage.learner, "load", fails(RuntimeError("another drafter"))),
    "policy": lambda stage: setattr(stage.learner, "begin", fails(RuntimeError("another size"))),
    "hand in": lambda stage: stage.links.during.update(submit=fails(RuntimeError("unforeseen"))),
    **{f"log {s.name}": lambda stage, s=s: stage.said.update({s: fails(RuntimeError("pipe"))}) for s in SpotState if s},
}


@pytest.mark.parametrize("what", BREAKS)
def test_nothing_makes_it_raise_and_it_trains_again(stage, what):
    before = dict(vars(stage.learner)), dict(vars(stage.rings))
    BREAKS[what](stage)
    stage.tick(3)
    stage.settle(lambda: stage.board.failures)
    assert stage.worker.failures == {"RuntimeError": 1}
    for broken, attributes in zip((stage.learner, stage.rings), before, strict=True):
        for name in vars(broken).keys() - attributes:
            delattr(broken, name)
    stage.said.clear()
    stage.links.during.clear()
    assert stage.tick(3) == 3
    assert stage.board.failures == 1 and stage.board.state == SpotState.BUSY


# --- a process --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the script found: a real worker with a small drafter, and its board written by another process."""
    command = [sys.executable, str(SCRIPT), "--preemptions", str(PREEMPTIONS), "--hidden", "192", "--vocab", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.alone
@pytest.mark.slow
def test_no_step_is_lost_and_nothing_fails(report):
    assert report["preemptions"] == PREEMPTIONS
    assert report["failures"] == {}
    assert report["steps"]["optimizer"] == report["steps"]["counted"] > PREEMPTIONS


@pytest.mark.alone
@pytest.mark.slow
def test_learning_goes_on_across_preemptions(report):
    loss = report["loss"]
    assert loss["last"] < 0.9 * loss["first"]
    assert loss["largest_jump"] < 0.25 * loss["first"], "a window begins where the one before ended"


@pytest.mark.alone
@pytest.mark.slow
def test_the_device_is_given_back(report):
    """A sanity bound only: this machine may be busy with anything. The script's own run has the figures."""
    assert 0 < report["yield_ms"]["p50"] <= report["yield_ms"]["p99"] <= report["yield_ms"]["max"] < 1000

"""Spot training's metrics of a step, from boards that count since their start; figures worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tlt_verl.board import SERVER_FIELDS, WORKER_FIELDS, Board
from tlt_verl.rollout.metrics import EngineMetrics

S = 1_000_000_000  # of a board's nanoseconds
COUNTED = {
    "idle_ns": ("tlt/spot/idle_s", S),
    "trained_ns": ("tlt/spot/trained_s", S),
    "judged_ns": ("tlt/spot/judged_s", S),
    "windows": ("tlt/spot/windows", 1),
    "yields": ("tlt/spot/yields", 1),
    "failures": ("tlt/spot/failures", 1),
    "worker_starts": ("tlt/spot/worker_starts", 1),
    "host_failures": ("tlt/spot/host_failures", 1),
    "trained_tokens": ("tlt/spot/tokens", 1),
    "gate_published": ("tlt/gate/published", 1),
    "gate_rejected": ("tlt/gate/rejected", 1),
}


def spot(**fields: int) -> dict[str, int]:
    """A board as the server reports it."""
    return dict.fromkeys((*SERVER_FIELDS, *WORKER_FIELDS, "worker_starts", "host_failures"), 0) | fields


def state(board: dict[str, int] | None) -> dict[str, Any]:
    """A replica's state, with or without spot training."""
    drafter = {"version": 0, "published": 0, "rejected": {}, "pause_ms": 0.0}
    engine = {"drafting": False, "drafter": drafter, "tap": {"failures": 0}}
    return engine if board is None else engine | {"spot": board}


def spot_names(metrics: dict[str, float]) -> set[str]:
    return {name for name in metrics if name.startswith(("tlt/spot", "tlt/gate"))}


@pytest.mark.parametrize("field", COUNTED)
def test_a_counter_is_what_this_step_did_in_the_metrics_unit(field):
    name, unit = COUNTED[field]
    metrics = EngineMetrics()
    assert metrics.step([state(spot(**{field: 6 * unit}))])[name] == pytest.approx(6.0)
    assert metrics.step([state(spot(**{field: 10 * unit}))])[name] == pytest.approx(4.0)
    assert metrics.step([state(spot(**{field: 10 * unit}))])[name] == 0.0, "a step in which nothing happened says so"


def test_the_harvest_is_trained_over_idle_time_of_the_step_and_of_all_replicas():
    metrics = EngineMetrics()
    first = metrics.step([state(spot(idle_ns=10 * S, trained_ns=8 * S)), state(spot(idle_ns=2 * S, trained_ns=S))])
    assert first["tlt/spot/harvest"] == pytest.approx(9 / 12)
    second = metrics.step([state(spot(idle_ns=11 * S, trained_ns=8 * S)), state(spot(idle_ns=5 * S, trained_ns=3 * S))])
    assert second["tlt/spot/harvest"] == pytest.approx(2 / 4)


def test_idle_time_without_training_is_a_harvest_of_nothing():
    assert EngineMetrics().step([state(spot(idle_ns=S))])["tlt/spot/harvest"] == 0.0


def test_a_step_without_idle_time_has_no_harvest():
    metrics = EngineMetrics()
    metrics.step([state(spot(idle_ns=3 * S, trained_ns=2 * S))])
    busy = metrics.step([state(spot(idle_ns=3 * S, trained_ns=2 * S))])
    assert "tlt/spot/harvest" not in busy and busy["tlt/spot/idle_s"] == 0.0


def test_counters_that_begin_again_are_what_they_say_since_then():
    """A server that was started again has a new board; what it says cannot be more than happened."""
    metrics = EngineMetrics()
    metrics.step([state(spot(idle_ns=20 * S, trained_ns=10 * S, trained_tokens=900, worker_starts=3))])
    again = metrics.step([state(spot(idle_ns=4 * S, trained_ns=S, trained_tokens=50, worker_starts=1))])
    assert again["tlt/spot/idle_s"] == pytest.approx(4.0) and again["tlt/spot/trained_s"] == pytest.approx(1.0)
    assert again["tlt/spot/harvest"] == pytest.approx(0.25)
    assert (again["tlt/spot/tokens"], again["tlt/spot/worker_starts"]) == (50, 1)
    assert metrics.step([state(spot(idle_ns=6 * S, trained_ns=2 * S))])["tlt/spot/harvest"] == pytest.approx(0.5)


def test_one_replica_that_began_again_leaves_the_others_counters_alone():
    metrics = EngineMetrics()
    metrics.step([state(spot(windows=9)), state(spot(windows=5))])
    assert metrics.step([state(spot(windows=2)), state(spot(windows=8))])["tlt/spot/windows"] == 2 + 3


def test_a_replica_that_did_not_answer_is_counted_when_it_does():
    metrics = EngineMetrics()
    metrics.step([state(spot(yields=1)), state(spot(yields=4))])
    assert metrics.step([{}, state(spot(yields=5))])["tlt/spot/yields"] == 1
    assert metrics.step([state(spot(yields=7)), state(spot(yields=5))])["tlt/spot/yields"] == 6


def test_the_longest_yield_is_the_worst_replicas_in_milliseconds():
    boards = [spot(yield_ns_max=12_500_000), spot(yield_ns_max=48_000_000), spot()]
    assert EngineMetrics().step([state(board) for board in boards])["tlt/spot/yield_ms_max"] == pytest.approx(48.0)


def test_losses_are_means_over_the_replicas_that_have_trained():
    trained = spot(trained_steps=3, loss_micro=1_500_000, ce_micro=2_000_000, accept_micro=400_000)
    other = spot(trained_steps=9, loss_micro=2_500_000, ce_micro=1_000_000, accept_micro=600_000)
    metrics = EngineMetrics().step([state(trained), state(other), state(spot())])
    assert [metrics[f"tlt/drafter/{name}"] for name in ("loss", "ce", "accept")] == pytest.approx([2.0, 1.5, 0.5])


def test_before_anything_was_trained_or_judged_there_is_no_loss_and_no_accept_length():
    metrics = EngineMetrics().step([state(spot(idle_ns=S))])
    assert not {"tlt/drafter/loss", "tlt/drafter/ce", "tlt/drafter/accept", "tlt/gate/accept_len"} & metrics.keys()


def test_the_gates_accept_length_is_the_best_that_was_measured():
    boards = [spot(gate_accept_micro=1_310_000), spot(), spot(gate_accept_micro=2_040_000)]
    assert EngineMetrics().step([state(board) for board in boards])["tlt/gate/accept_len"] == pytest.approx(2.04)


def test_causes_are_counted_one_by_one():
    def counts(**links: int) -> dict[str, Any]:
        return spot() | {"counts": {"failures": links, "stops": {"requests": 3 * sum(links.values())}}}

    metrics = EngineMetrics()
    first = metrics.step([state(counts(link=2)), state(counts(diverged=1)), state(spot())])
    assert first["tlt/spot/failures/link"] == 2 and first["tlt/spot/failures/diverged"] == 1
    assert first["tlt/spot/stops/requests"] == 9
    second = metrics.step([state(counts(link=3)), state(counts(diverged=1, link=1))])
    assert second["tlt/spot/failures/link"] == 2, "one more of the one, and the first of the other"
    assert second["tlt/spot/failures/diverged"] == 0 and second["tlt/spot/stops/requests"] == 6


def test_without_spot_training_nothing_is_said_of_it():
    assert spot_names(EngineMetrics().step([state(None), state(None)])) == set()
    assert spot_names(EngineMetrics().step([{}, {}])) == set()
    assert spot_names(EngineMetrics().step([])) == set()


def test_replicas_with_and_without_it_are_one_job():
    metrics = EngineMetrics().step([state(None), {}, state(spot(idle_ns=2 * S, trained_ns=S, windows=3))])
    assert metrics["tlt/spot/windows"] == 3 and metrics["tlt/spot/harvest"] == 0.5


def test_a_board_reports_all_that_the_metrics_read(tmp_path: Path):
    """The fields are the board's own: a name that one of the two does not know would be missing here."""
    board = Board.create("metrics", tmp_path)
    board.idle_ns, board.trained_ns, board.trained_steps, board.loss_micro = 4 * S, 3 * S, 7, 250_000
    values = board.values((*SERVER_FIELDS, *WORKER_FIELDS)) | {"worker_starts": 1, "host_failures": 0}
    metrics = EngineMetrics().step([state(values)])
    assert metrics["tlt/spot/harvest"] == 0.75 and metrics["tlt/drafter/loss"] == 0.25
    assert {name for name, _ in COUNTED.values()} <= metrics.keys()

"""What a replica's board says of verl's life cycle: a device that the policy has, or awaits weights, is not idle."""

import asyncio
from collections.abc import Callable

import pytest

from tlt_verl.board import Board, Phase
from tlt_verl.rollout.spot import SpotHost


def host_on(board: Board) -> SpotHost:
    """A host whose tasks do not get a turn: nothing here waits."""

    def nobody(*_):
        raise AssertionError("no task was to run")

    return SpotHost(0, board, nobody, nobody, nobody, nobody, True)


@pytest.fixture
def play(tmp_path) -> Callable[[Callable[[SpotHost], None]], Board]:
    """Plays a scenario on a replica that has been given the policy's weights once; returns its board."""
    board = Board.create("play", tmp_path)

    async def played(scenario: Callable[[SpotHost], None]) -> None:
        host = host_on(board)
        host.phase(Phase.POLICY)
        host.weights_came(0)
        assert board.phase == Phase.GENERATE
        scenario(host)

    def run(scenario: Callable[[SpotHost], None]) -> Board:
        asyncio.run(played(scenario))
        return board

    return run


def test_a_validation_whose_weights_nobody_told_of_is_generation(play):
    def scenario(host):
        host.phase(Phase.POLICY)
        host.request_begins()

    board = play(scenario)
    assert board.phase == Phase.GENERATE and board.requests == 1


@pytest.mark.parametrize("sleeps", [True, False], ids=["colocate_async", "separate_async"])
def test_a_request_that_waits_for_the_new_weights_is_not_generation(play, sleeps):
    """In the asynchronous modes an aborted request is sent again at once, and waits for the engine to go on."""

    def scenario(host):
        host.request_begins()
        host.phase(Phase.SYNC)
        host.request_ends()
        if sleeps:
            host.phase(Phase.POLICY)
        host.request_begins()

    board = play(scenario)
    assert board.phase == (Phase.POLICY if sleeps else Phase.SYNC) and board.requests == 1


def test_weights_that_came_are_not_the_end_of_the_transfer(play):
    """verl gives the engine's memory back after it has told of the weights, and resumes the generation last."""
    seen = []

    def scenario(host):
        host.phase(Phase.SYNC)
        host.weights_came(7)
        seen.append((host.board.phase, host.board.step, host.is_awake))
        host.phase(Phase.GENERATE)
        seen.append((host.board.phase, host.board.step, host.is_awake))

    play(scenario)
    assert seen == [(Phase.SYNC, 7, False), (Phase.GENERATE, 7, True)]
    assert play(lambda host: host.weights_came(8)).step == 8

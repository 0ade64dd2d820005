"""The arithmetic that the tuner rests on: accept rates, chances to win, and the simulated engine."""

from __future__ import annotations

import random

import pytest
from test_tuner import MIDDLE, rates

from tlt_verl.engine.beliefs import Belief, accept_len, accept_rate
from tlt_verl.engine.simulated import CPU, Noise, SimulatedEngine
from tlt_verl.engine.tuner import chance_to_win
from tlt_verl.strategy import OFF


@pytest.mark.parametrize("num_steps", [1, 3, 7])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_accept_rates_and_accept_lengths_are_each_others_inverse(rate, num_steps):
    assert accept_rate(accept_len(rate, num_steps), num_steps) == pytest.approx(rate, abs=1e-3)


def test_the_chance_to_win_is_one_for_equals_and_falls_with_the_distance():
    best = Belief(1.0, 0.01)
    chances = [chance_to_win(Belief(mean, 0.01), best) for mean in (1.1, 1.0, 0.9, 0.7, 0.3)]
    assert chances[:2] == [1.0, 1.0]
    assert chances == sorted(chances, reverse=True) and chances[-1] < 1e-5
    assert chance_to_win(None, best) == 1.0


def test_the_simulated_engine_is_what_its_tables_say():
    engine = SimulatedEngine(CPU, rates(0.8), random.Random(0), Noise(sd=0, hiccups=0, first_step=0, missed=0))
    assert engine.costs.seconds(OFF, 5) == pytest.approx(0.075) and engine.costs.seconds(OFF, 64) > 0.29
    lens = [length for _ in range(500) for length in engine.step(MIDDLE, 8)[0]]
    assert sum(lens) / len(lens) == pytest.approx(accept_len(0.8, 3), rel=0.02)
    assert engine.elapsed_s == pytest.approx(engine.usual_s) == pytest.approx(500 * 0.125)
    assert max(lens) == 4 and min(lens) == 1

"""The tuner in a simulated engine: what it finds, how fast, what trying costs, and what it does when things change."""

from __future__ import annotations

import collections
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence

import pytest

from tlt_verl.config import StrategyConfig
from tlt_verl.engine.beliefs import Beliefs, Observation
from tlt_verl.engine.simulated import CPU, GPU, Costs, Fixed, Noise, Policy, SimulatedEngine, response_lengths, roll_out
from tlt_verl.engine.tuner import DWELL_STEPS, LOSS_SHARE, Tuner
from tlt_verl.strategy import OFF, Strategy

SHORT, MIDDLE, LONG = (Strategy.parse(f"eagle:{n}x1@{n + 1}") for n in (1, 3, 7))
TREE, NGRAM = Strategy.parse("eagle:6x4@24"), Strategy.parse("ngram:5x1@6")

TRAINED, FADED, UNTRAINED = 0.95, 0.5, 0.0


def rates(chain: float, tree: float = 0.0) -> Mapping[Strategy, float]:
    return {SHORT: chain, MIDDLE: chain, LONG: chain, TREE: tree}


def make(costs: Costs, accept: Mapping[Strategy, float], seed: int = 0, **options) -> tuple[Tuner, SimulatedEngine]:
    noise = options.pop("noise", None)
    tuner = Tuner(costs.strategies, random.Random(seed), **options)
    return tuner, SimulatedEngine(costs, accept, random.Random(seed + 1), noise)


def run(policy: Policy, engine: SimulatedEngine, batch_size: int, steps: int) -> list[Strategy]:
    chosen = []
    for _ in range(steps):
        chosen.append(policy.choose(batch_size))
        policy.observe(chosen[-1], batch_size, *engine.step(chosen[-1], batch_size))
    return chosen


def share_of_best(policy: Policy, engine: SimulatedEngine, batch_size: int, steps: int) -> float:
    """Tokens per second over those of the best fixed strategy, trying and switching included, luck left out."""
    before, tokens = engine.usual_s, 0.0
    for strategy in run(policy, engine, batch_size, steps):
        tokens += engine.expected(strategy, batch_size) * engine.costs.seconds(strategy, batch_size)
    return tokens / (engine.usual_s - before) / engine.expected(engine.best(batch_size), batch_size)


def check(shares: list[float], batch_size: int) -> None:
    """Within 5%: each run; at one and two requests, where 200 steps are few accept lengths, the runs' mean."""
    assert sum(shares) / len(shares) > 0.95, shares
    assert min(shares) > (0.95 if batch_size > 2 else 0.8), shares


# --- what it finds ----------------------------------------------------------------------------------------------------

CASES = [
    (CPU, rates(TRAINED)),
    (CPU, rates(FADED)),
    (CPU, rates(UNTRAINED)),
    (GPU, rates(0.7, 0.86)),
    (GPU, rates(0.3, 0.5)),
]


@pytest.mark.parametrize("batch_size", [1, 2, 8, 32, 64])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_after_200_observations_it_is_within_5_percent_of_the_best(case, batch_size):
    costs, accept = CASES[case]
    shares = []
    for seed in range(10):
        tuner, engine = make(costs, accept, seed)
        run(tuner, engine, batch_size, 200)
        shares.append(share_of_best(tuner, engine, batch_size, 200))
    check(shares, batch_size)


SHIFTS = [(UNTRAINED, TRAINED, "eagle"), (TRAINED, UNTRAINED, None), (TRAINED, FADED, None), (FADED, TRAINED, "eagle")]


@pytest.mark.parametrize("batch_size", [1, 2, 8, 32])
@pytest.mark.parametrize(("before", "after", "drafter"), SHIFTS)
def test_100_observations_after_a_shift_it_is_there_again(before, after, drafter, batch_size):
    shares = []
    for seed in range(10):
        tuner, engine = make(CPU, rates(before), seed)
        run(tuner, engine, batch_size, 300)
        engine.rates = rates(after)
        tuner.changed(drafter)
        run(tuner, engine, batch_size, 100)
        shares.append(share_of_best(tuner, engine, batch_size, 200))
    check(shares, batch_size)


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_acceptance_that_breaks_down_unannounced_is_noticed(batch_size):
    tuner, engine = make(CPU, rates(TRAINED))
    run(tuner, engine, batch_size, 300)
    engine.rates = rates(UNTRAINED)
    run(tuner, engine, batch_size, 100)
    assert share_of_best(tuner, engine, batch_size, 200) > 0.95


@pytest.mark.parametrize("rate", [0.45, 0.15])
def test_every_batch_size_of_a_bucket_is_judged_alike(rate):
    """Tokens per second grow with the batch size: what was tried at the larger ones is not the better for it."""
    costs = Costs({"off": {1: 40, 64: 72}, "eagle:3x1@4": {1: 52, 64: 93.6}})
    for seed in range(3):
        tuner, engine = make(costs, rates(rate), seed, buckets=[64])
        for _ in range(20):
            for batch_size in range(60, 20, -2):
                run(tuner, engine, batch_size, 2)
        assert share_of_best(tuner, engine, 30, 200) > 0.95


def test_results_that_come_one_choice_later_are_learnt_from():
    tuner, engine = make(CPU, rates(TRAINED))
    late: tuple | None = None
    for _ in range(200):
        strategy = tuner.choose(8)
        if late is not None:
            tuner.observe(*late)
        late = (strategy, 8, *engine.step(strategy, 8))
    assert tuner.best() == {"8": str(LONG)}


# --- what it costs ----------------------------------------------------------------------------------------------------


def rl_run(policy: Policy, engine: SimulatedEngine, policies: int, seed: int, published: Sequence[int] = ()) -> float:
    """Seconds, without luck, of an RL run's rollouts; the policy changes after each step."""
    lengths = random.Random(seed)
    for step in range(policies):
        if isinstance(policy, Tuner):
            policy.changed()
            if step in published:
                policy.changed("eagle")
        roll_out(policy, engine, response_lengths(64, lengths, 128.0))
    return engine.usual_s


@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
def test_with_an_untrained_drafter_a_run_loses_two_percent_at_most(costs):
    for seed in range(3):
        tuner, engine = make(costs, rates(UNTRAINED), seed)
        plain = SimulatedEngine(costs, {}, random.Random(seed))
        seconds, least = rl_run(tuner, engine, 8, seed), rl_run(Fixed(OFF), plain, 8, seed)
        assert seconds < 1.02 * least, f"{seconds / least - 1:.2%}"


class AdaptiveSteps:
    """SGLang's own: chains whose length follows the moving average of the accepted drafts; it is told no time."""

    def __init__(self) -> None:
        from sglang.srt.speculative import adaptive_spec_params as params

        self._params = params.AdaptiveSpeculativeParams(initial_steps=3)

    def choose(self, batch_size: int) -> Strategy:
        steps = self._params.get_steps_for_batch(batch_size)
        return Strategy("eagle", steps, 1, steps + 1) if steps else OFF

    def observe(self, strategy: Strategy, batch_size: int, accept_lens: Sequence[int], elapsed_s: float) -> None:
        self._params.on_verify_complete([length - 1 for length in accept_lens], batch_size)


@pytest.mark.parametrize("chain", [TRAINED, FADED, UNTRAINED])
@pytest.mark.parametrize("costs", [CPU, GPU], ids=["cpu", "gpu"])
def test_an_rl_run_takes_no_longer_than_with_sglangs_adaptive_steps(costs, chain):
    accept = rates(chain, chain)
    tuner, engine = make(costs, accept)
    theirs = SimulatedEngine(costs, accept, random.Random(1))
    assert rl_run(tuner, engine, 6, 0) < rl_run(AdaptiveSteps(), theirs, 6, 0)


def test_publications_of_a_drafter_that_is_no_better_are_paid_from_the_same_account():
    tuner, engine = make(CPU, rates(UNTRAINED))
    plain = SimulatedEngine(CPU, {}, random.Random(0))
    assert rl_run(tuner, engine, 8, 0, published=range(8)) < 1.02 * rl_run(Fixed(OFF), plain, 8, 0)


def test_what_was_refuted_in_one_bucket_is_not_tried_in_all():
    tuner, engine = make(CPU, rates(UNTRAINED))
    run(tuner, engine, 64, 60)
    chosen = [strategy for batch_size in (32, 16, 8, 4, 2) for strategy in run(tuner, engine, batch_size, 40)]
    assert chosen.count(LONG) + chosen.count(MIDDLE) <= 20, "of 200"


def test_what_was_seen_at_small_batches_is_compared_at_a_large_one_by_what_runs_there():
    """A benchmark's order and its measured costs: a few steps at 32 requests, then small batches, then 32. How far a
    strategy is from `off` at 8 requests says less than how far it is from what runs at 32 now: with `off` as the
    measure 8 of 20 runs never tried the best.
    """
    costs = Costs(
        {
            "off": {1: 33, 2: 40, 8: 44, 32: 71},
            "eagle:3x1@4": {1: 44, 2: 53, 8: 84, 32: 190},
            "eagle:7x1@8": {1: 54, 2: 62, 8: 127, 32: 300},
            "eagle:15x1@16": {1: 68, 2: 87, 8: 193, 32: 640},
        }
    )
    accept = {MIDDLE: 0.95, LONG: 0.965, Strategy.parse("eagle:15x1@16"): 0.955}
    found = []
    for seed in range(20):
        tuner, engine = make(costs, accept, seed)
        assert engine.best(32) == LONG
        for batch_size, steps in ((32, 8), (1, 300), (2, 150), (8, 100)):
            run(tuner, engine, batch_size, steps)
        found.append(run(tuner, engine, 32, 100)[40:].count(LONG) / 60)
    assert sum(found) / len(found) > 0.8, found


def test_what_pays_only_at_small_batches_is_found_there():
    tuner, engine = make(GPU, rates(0.7, 0.86))
    for batch_size in (128, 64, 32, 16, 8, 4, 2, 1):
        run(tuner, engine, batch_size, 120)
    best = tuner.best()
    assert best["above_64"] == best["64"] == best["32"] == "off"
    assert best["8"] != "off" and best["4"] != "off"
    assert Strategy.parse(best["1"]) == engine.best(1) == TREE


def test_what_trying_loses_stays_within_its_account():
    tuner, engine = make(CPU, rates(UNTRAINED))
    chosen = run(tuner, engine, 8, 3000)
    assert 0 < sum(strategy != OFF for strategy in chosen[500:]) < 0.05 * 2500
    metrics = tuner.metrics()
    assert metrics["lost_seconds"] <= 1.1 * LOSS_SHARE * metrics["seconds"] * (1 + 1000 / 3000)


def test_without_epsilon_each_is_tried_once():
    tuner, engine = make(CPU, rates(FADED), epsilon=0.0)
    chosen = run(tuner, engine, 8, 400)
    assert set(chosen) == set(CPU.strategies)
    assert tuner.metrics()["tried_steps"] <= 3 * (DWELL_STEPS + 1)


# --- dwell and noise --------------------------------------------------------------------------------------------------


def test_a_strategy_is_held():
    tuner, engine = make(CPU, rates(TRAINED))
    for batch_size, held in ((8, DWELL_STEPS), (1, 8)):
        chosen = run(tuner, engine, batch_size, 400)
        runs = [len(list(group)) for _, group in itertools.groupby(chosen)]
        assert min(runs[:-1]) >= min(held, 3), "the hopeless are given up after three"


def test_the_first_step_after_a_switch_is_not_judged():
    tuner, engine = make(CPU, rates(TRAINED), noise=Noise(first_step=4.0, missed=1.0, recovers=0.3))
    run(tuner, engine, 8, 200)
    assert tuner.best() == {"8": str(LONG)}


@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_steps_of_ten_times_the_time_change_nothing(batch_size):
    for seed in range(3):
        tuner, engine = make(CPU, rates(TRAINED), seed, noise=Noise(hiccups=0.05))
        run(tuner, engine, batch_size, 200)
        assert share_of_best(tuner, engine, batch_size, 300) > 0.95


def test_a_machine_that_slows_down_for_all_changes_nothing():
    engine = SimulatedEngine(CPU, rates(TRAINED), random.Random(0), load=lambda s: 1.3 if s % 40 > 20 else 1.0)
    tuner = Tuner(CPU.strategies, random.Random(0))
    run(tuner, engine, 8, 300)
    assert run(tuner, engine, 8, 1000).count(LONG) > 900


# --- bounds, and what is not there ------------------------------------------------------------------------------------


def test_above_the_bound_nothing_is_drafted_nor_learnt():
    tuner, engine = make(CPU, rates(TRAINED), max_running_for_drafting=16)
    assert set(run(tuner, engine, 17, 300)) == {OFF}
    assert tuner.best() == {}
    run(tuner, engine, 16, 200)
    assert tuner.best() == {"16": str(LONG)}
    assert tuner.choose(17) == OFF


def test_a_bound_of_zero_is_off():
    tuner, engine = make(CPU, rates(TRAINED), max_running_for_drafting=0)
    assert set(run(tuner, engine, 1, 50)) == {OFF}


def test_strategies_that_are_not_there_are_not_chosen_and_come_back():
    costs = Costs({str(s): {1: 44 + 4 * s.num_steps, 8: 95 + 5 * s.num_steps} for s in (OFF, NGRAM, LONG)})
    tuner, engine = make(costs, {LONG: 0.9, NGRAM: 0.4})
    tuner.available([])
    assert set(run(tuner, engine, 8, 100)) == {OFF}
    tuner.available(["ngram"])
    assert run(tuner, engine, 8, 100)[-1] == NGRAM
    tuner.available(["ngram", "eagle"])
    assert run(tuner, engine, 8, 100)[-1] == LONG
    tuner.available({"ngram"})
    chosen = run(tuner, engine, 8, 50)
    assert LONG not in chosen and chosen[0] == NGRAM, "what is known of it is the first choice"


def test_off_is_an_arm_and_the_first():
    tuner = Tuner([LONG, LONG], random.Random(0))
    assert tuner.arms == (OFF, LONG) and tuner.choose(8) == OFF
    assert Tuner([], random.Random(0)).choose(1) == OFF


@pytest.mark.parametrize(
    ("accept_lens", "elapsed_s"), [([], 1.0), *(([1], s) for s in (0.0, -1.0, math.nan, math.inf))]
)
def test_a_step_that_says_nothing_is_ignored(accept_lens, elapsed_s):
    tuner, _ = make(CPU, {})
    before = tuner.state()
    tuner.observe(tuner.choose(1), 1, accept_lens, elapsed_s)
    assert tuner.state()["account"] == before["account"]


# --- changes, checkpoints, reports ------------------------------------------------------------------------------------


def test_after_a_change_what_was_known_is_still_the_first_choice():
    tuner, engine = make(CPU, rates(TRAINED))
    run(tuner, engine, 8, 200)
    for drafter in (None, "eagle"):
        tuner.changed(drafter)
        assert tuner.choose(8) == LONG


def test_a_change_of_one_drafter_is_not_one_of_the_others():
    beliefs = Beliefs([OFF, LONG, NGRAM], [8], 16)
    for arm in (OFF, LONG, NGRAM):
        beliefs.learn(0, arm, Observation({1: 32}, 80.0, 8.0), 1)
    before = {arm: beliefs.of(0, arm, 1) for arm in beliefs.arms}
    beliefs.changed("eagle", 0.25)
    after = {arm: beliefs.of(0, arm, 1) for arm in beliefs.arms}
    assert after[OFF] == before[OFF] and after[NGRAM] == before[NGRAM]
    assert after[LONG].mean == pytest.approx(before[LONG].mean) and after[LONG].variance > 3 * before[LONG].variance


def test_a_restored_tuner_begins_where_the_saved_one_ended():
    tuner, engine = make(CPU, rates(TRAINED))
    for batch_size in (32, 8, 1):
        run(tuner, engine, batch_size, 200)
    state = json.loads(json.dumps(tuner.state()))
    restored = Tuner(CPU.strategies, random.Random(0))
    restored.load_state(state)
    assert restored.state() == state
    assert [restored.choose(batch_size) for batch_size in (32, 8, 1)] == [LONG] * 3
    assert {LONG} <= set(run(restored, engine, 8, 50)), "and goes on"


def test_a_state_of_other_arms_and_buckets_gives_what_is_common():
    tuner, engine = make(CPU, rates(TRAINED))
    run(tuner, engine, 8, 200)
    run(tuner, engine, 2, 200)
    other = Tuner([MIDDLE, TREE], random.Random(0), buckets=[8, 16])
    other.load_state(tuner.state())
    assert other.choose(8) == MIDDLE
    run(other, SimulatedEngine(GPU, rates(0.7, 0.8), random.Random(0)), 8, 100)


@pytest.mark.parametrize("state", [{}, {"format": 0}, {"format": "1"}])
def test_a_state_of_another_format_is_refused(state):
    with pytest.raises(ValueError, match="the tuner's state: got format"):
        Tuner([LONG], random.Random(0)).load_state(state)


def test_the_same_seed_makes_the_same_choices():
    def chosen(seed: int) -> list[Strategy]:
        tuner, _ = make(CPU, {}, seed)
        return run(tuner, SimulatedEngine(CPU, rates(FADED), random.Random(7)), 8, 400)

    assert chosen(1) == chosen(1) != chosen(2)


def test_metrics_count_what_ran():
    tuner, engine = make(CPU, rates(TRAINED), buckets=[4])
    chosen = {batch_size: collections.Counter(map(str, run(tuner, engine, batch_size, 50))) for batch_size in (3, 5)}
    metrics = tuner.metrics()
    for batch_size, name in ((3, "4"), (5, "above_4")):
        for arm, steps in chosen[batch_size].items():
            assert metrics[f"{name}/{arm}/steps"] == steps
        assert metrics.get(f"{name}/off/tokens", 0) == batch_size * chosen[batch_size]["off"]
    assert metrics["steps"] == 100 and 0 < metrics["tried_steps"] < 60
    seconds = sum(value for key, value in metrics.items() if key.endswith("/seconds"))
    assert seconds == pytest.approx(metrics["seconds"])


def test_the_options_reach_it():
    config = StrategyConfig(arms=["eagle:7x1@8", "off"], buckets=[2, 9], max_running_for_drafting=4)
    tuner = Tuner.from_config(config, random.Random(0))
    assert tuner.arms == (OFF, LONG)
    tuner.choose(2), tuner.choose(3)
    assert tuner.best() == {"2": "off", "9": "off"}

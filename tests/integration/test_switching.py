"""Strategies that change from step to step, through the real engine: what it costs the drafter, and its counters.

That tokens do not depend on it is shown where losslessness is: `test_greedy_lossless`, `test_lossless_sampling`.
"""

from __future__ import annotations

import pytest
from engine_runner import SWITCHING, job, run_engine, speculative
from shape_engines import GREEDY, TIMEOUT_S
from shared_models import greedy_prompts

pytestmark = pytest.mark.slow

CHAIN_NAME = "eagle:3x1@4"


@pytest.fixture(scope="module")
def skipped(greedy_models):
    """What the worker says of its strategies after 32 prompts, eight at a time, with its drafter skipped at random."""
    prompts, models = greedy_prompts(), greedy_models
    jobs = [job(prompts[i : i + 8], [GREEDY] * 8) for i in range(0, 32, 8)]
    options = speculative("TLT", (CHAIN_NAME,), models / "drafter")
    answers = run_engine(models / "target", jobs, timeout_s=TIMEOUT_S, **options)
    assert all(len(output) == GREEDY["max_new_tokens"] for answer in answers for output in answer["output_ids"])
    return answers[-1]["state"][0]["speculation"]


def in_section(engine, section, strategy):
    """Counts of a strategy in a section: after it, less those before it."""
    before = engine.states[section].get("speculation", {"strategies": {}})["strategies"].get(strategy, {})
    after = engine.answers[section][-1]["state"][0]["speculation"]["strategies"][strategy]
    return {name: after[name] - before.get(name, 0) for name in ("tokens", "verified")}


def accept_len(state, strategy):
    counts = state["strategies"][strategy]
    return counts["tokens"] / counts["verified"]


@pytest.mark.parametrize("engine", ["chain 3x1@4"], indirect=True)
def test_a_drafter_that_is_skipped_at_random_drafts_as_well_as_one_that_never_is(engine, skipped):
    """What its cache lacks is computed before it drafts again. Without that, half of the context is another's."""
    steps = {name: counts["steps"] for name, counts in skipped["strategies"].items()}
    assert set(steps) == {CHAIN_NAME, "off"} and min(steps.values()) > 50
    always = in_section(engine, "batch 8", CHAIN_NAME)
    found, wanted = accept_len(skipped, CHAIN_NAME), always["tokens"] / always["verified"]
    print(f"\naccept length {found:.3f} where it is skipped at random, {wanted:.3f} where it never is")
    assert skipped["caught_up_tokens"] > 500
    assert found >= 0.97 * wanted


@pytest.mark.parametrize("engine", ["switching at every step"], indirect=True)
def test_every_strategy_runs_and_is_counted_under_its_name(engine):
    state = engine.answers["batch 8"][-1]["state"][0]["speculation"]
    assert set(state["strategies"]) == set(SWITCHING)
    for name, counts in state["strategies"].items():
        width = 1 if name == "off" else int(name.partition("@")[2])
        assert counts["steps"] > 10
        assert counts["drafts"] == counts["verified"] * (width - 1)
        assert counts["verified"] <= counts["tokens"] <= counts["verified"] * width
    assert accept_len(state, "off") == 1.0
    assert all(accept_len(state, name) > 1.1 for name in SWITCHING if name.startswith("eagle"))
    assert state["ngram"]["proposals"] > 0

"""Strategies that change from step to step, through the real engine: what it costs the drafter, and its counters.

That tokens do not depend on it is shown where losslessness is: `test_greedy_lossless`, `test_lossless_sampling`.
"""

from __future__ import annotations

import pytest
from engine_runner import CHAIN, SWITCHING, job, run_engine, speculative
from fitted_drafter import fit_drafter
from test_greedy_lossless import GREEDY, TIMEOUT_S, make_prompts, make_target

pytestmark = pytest.mark.slow

CHAIN_NAME = "eagle:3x1@4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switching")
    fit_drafter(make_target(folder / "target"), folder / "drafter")
    return folder


def states(folder, shape, count=32):
    """What the worker says of its strategies after `count` prompts, eight at a time."""
    prompts = make_prompts()
    jobs = [job(prompts[i : i + 8], [GREEDY] * 8) for i in range(0, count, 8)]
    answers = run_engine(folder / "target", jobs, timeout_s=TIMEOUT_S, **speculative("TLT", shape, folder / "drafter"))
    assert all(len(output) == GREEDY["max_new_tokens"] for answer in answers for output in answer["output_ids"])
    return answers[-1]["state"][0]["speculation"]


def accept_len(state, strategy):
    counts = state["strategies"][strategy]
    return counts["tokens"] / counts["verified"]


@pytest.fixture(scope="module")
def always(folder):
    return states(folder, CHAIN)


def test_a_drafter_that_is_skipped_at_random_drafts_as_well_as_one_that_never_is(folder, always):
    """What its cache lacks is computed before it drafts again. Without that, half of the context is another's."""
    state = states(folder, (CHAIN_NAME,))
    steps = {name: counts["steps"] for name, counts in state["strategies"].items()}
    assert set(steps) == {CHAIN_NAME, "off"} and min(steps.values()) > 50
    found, wanted = accept_len(state, CHAIN_NAME), accept_len(always, CHAIN_NAME)
    print(f"\naccept length {found:.3f} where it is skipped at random, {wanted:.3f} where it never is")
    assert state["caught_up_tokens"] > 500
    assert found >= 0.97 * wanted


def test_every_strategy_runs_and_is_counted_under_its_name(folder):
    state = states(folder, SWITCHING)
    assert set(state["strategies"]) == set(SWITCHING)
    for name, counts in state["strategies"].items():
        width = 1 if name == "off" else int(name.partition("@")[2])
        assert counts["steps"] > 10
        assert counts["drafts"] == counts["verified"] * (width - 1)
        assert counts["verified"] <= counts["tokens"] <= counts["verified"] * width
    assert accept_len(state, "off") == 1.0
    assert all(accept_len(state, name) > 1.1 for name in SWITCHING if name.startswith("eagle"))
    assert state["ngram"]["proposals"] > 0

"""The metrics of a step, against figures worked out by hand; and a response that was not drafted for."""

from __future__ import annotations

import pytest

from tlt_verl.rollout.metrics import Counters, EngineMetrics, counters, step_metrics

# Two drafted responses. The first token of a response comes from its prefill: 10 = 1 + 6 accepted + 3 bonus tokens.
LONG = Counters(tokens=10, accepted=6, verifications=3)
SHORT = Counters(tokens=2, accepted=0, verifications=1)
PLAIN = Counters(tokens=8, accepted=0, verifications=0)


def test_a_step_of_drafted_responses():
    metrics = step_metrics([LONG, SHORT], generation_s=4.0)
    assert metrics == pytest.approx(
        {
            "tlt/accept_len": 10 / 4,  # 6 accepted and 4 bonus tokens from 4 verifications
            "tlt/draft_share/off": 2 / 12,
            "tlt/tokens_per_s": 3.0,
        }
    )


def test_accept_length_is_over_the_steps_tokens_and_not_a_mean_of_means():
    """A mean over responses would be (3 + 1) / 2 here, and hide what the long one costs."""
    assert step_metrics([LONG, SHORT], 1.0)["tlt/accept_len"] == 2.5


def test_drafts_that_are_all_rejected_count_one_token_a_verification():
    """Acceptance that falls to zero, the failure that users report most, must be visible as 1.0, not as missing."""
    assert step_metrics([SHORT], 1.0)["tlt/accept_len"] == 1.0


def test_without_speculation_nothing_is_drafted_for_and_ratios_are_left_out():
    metrics = step_metrics([PLAIN, PLAIN], generation_s=2.0)
    assert metrics == {"tlt/draft_share/off": 1.0, "tlt/tokens_per_s": 8.0}


def test_a_share_is_not_negative_where_a_response_was_cut_inside_a_verification():
    """The last verification can accept tokens behind a stop token, which the response does not have."""
    cut = Counters(tokens=3, accepted=3, verifications=1)
    assert step_metrics([cut], 1.0)["tlt/draft_share/off"] == 0.0


@pytest.mark.parametrize("generation_s", [0.0, 1.0])
def test_a_step_without_responses_has_no_ratios(generation_s):
    assert set(step_metrics([], generation_s)) <= {"tlt/tokens_per_s"}


def test_without_a_time_there_is_no_speed():
    assert "tlt/tokens_per_s" not in step_metrics([LONG], 0.0)


def test_counters_are_read_under_verls_names():
    fields = {"spec_num_draft_tokens": 9, "spec_num_accepted_tokens": 6, "spec_num_verify_steps": 3, "global_steps": 4}
    assert counters(fields, 10) == LONG


@pytest.mark.parametrize("fields", [{}, {"min_global_steps": 1}])
def test_a_response_without_counters_was_not_drafted_for(fields):
    assert counters(fields, 8) == PLAIN


def state(version: int, rejected: int, segments: int, **drafter) -> dict:
    return {
        "drafting": version > 0,
        "drafter": {"version": version, "published": version, "rejected": {"nan": rejected}, "pause_ms": 2.0} | drafter,
        "tap": {"segments": segments, "tokens": 10 * segments, "bytes": 0, "dropped": 0, "failures": 0},
    }


def test_counters_of_replicas_are_summed_and_each_step_has_its_own():
    metrics = EngineMetrics()
    first = metrics.step([state(1, 0, 5), state(2, 1, 7, pause_ms=3.0)])
    assert first["tlt/drafter/version"] == 1, "the oldest that serves"
    assert first["tlt/drafter/drafting"] == 1 and first["tlt/drafter/pause_ms"] == 3
    assert first["tlt/drafter/rejected"] == 1 and first["tlt/drafter/published"] == 3
    assert first["tlt/tap/segments"] == 12 and first["tlt/tap/tokens"] == 120
    second = metrics.step([state(2, 0, 9), state(2, 1, 8)])
    assert second["tlt/drafter/version"] == 2
    assert second["tlt/drafter/rejected"] == 0 and second["tlt/drafter/published"] == 1
    assert second["tlt/tap/segments"] == 5 and second["tlt/tap/failures"] == 0


def test_a_replica_that_answers_late_or_began_again_makes_no_counter_negative():
    metrics = EngineMetrics()
    metrics.step([state(1, 0, 50), state(1, 0, 70)])
    assert metrics.step([state(1, 0, 60), {}])["tlt/tap/segments"] == 10, "what did not answer is not counted"
    assert metrics.step([state(1, 0, 61), state(1, 0, 75)])["tlt/tap/segments"] == 6, "and is counted when it does"
    assert metrics.step([state(1, 0, 3), state(1, 0, 75)])["tlt/tap/segments"] == 3, "an engine that began again"
    closed = state(1, 0, 75)
    closed["tap"] = {"failures": 1}
    after = metrics.step([state(1, 0, 3), closed])
    assert after["tlt/tap/segments"] == 0 and after["tlt/tap/failures"] == 1


def test_replicas_that_do_not_speculate_or_tap_report_nothing_of_it():
    assert EngineMetrics().step([{}, {}]) == {}
    untapped = state(0, 0, 0)
    untapped["tap"] = {"failures": 0}
    names = EngineMetrics().step([untapped])
    assert names["tlt/drafter/version"] == names["tlt/drafter/drafting"] == names["tlt/tap/failures"] == 0
    assert "tlt/tap/segments" not in names


def strategies(steps: int) -> dict:
    """What a worker says after so many steps of each strategy, with two requests each."""
    return {
        "strategies": {
            "eagle:3x1@4": {"steps": steps, "verified": 2 * steps, "tokens": 6 * steps, "drafts": 6 * steps},
            "ngram:1x1@2": {"steps": steps, "verified": 2 * steps, "tokens": 3 * steps, "drafts": 2 * steps},
            "off": {"steps": steps, "verified": 2 * steps, "tokens": 2 * steps, "drafts": 0},
        },
        "tuner": {
            "steps": 3 * steps,
            "lost_seconds": 0.5 * steps,
            "2/eagle:3x1@4/steps": 3 * steps,
            "2/eagle:3x1@4/tokens": 7 * steps,
            "2/off/steps": steps,
            "8/off/steps": steps,
        },
    }


def test_what_the_strategies_did_in_the_step_is_in_shares_and_rates():
    metrics = EngineMetrics()
    metrics.step([state(1, 0, 5) | {"speculation": strategies(10)}])
    found = metrics.step([state(1, 0, 5) | {"speculation": strategies(14)}] * 2)
    assert found["tlt/accept_rate"] == pytest.approx((4 + 1 + 0) / (6 + 2))
    assert [found[f"tlt/draft_share/{drafter}"] for drafter in ("eagle", "ngram", "off")] == pytest.approx(
        [6 / 11, 3 / 11, 2 / 11]
    )
    assert found["tlt/tuner/2/eagle:3x1@4"] == 0.75 and found["tlt/tuner/2/off"] == 0.25
    assert found["tlt/tuner/8/off"] == 1.0
    assert found["tlt/tuner/lost_s"] == pytest.approx(2.0 + 7.0)
    assert not [name for name in found if name.startswith("count/")]

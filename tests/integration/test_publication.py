"""Publication into a real engine while requests are in flight: what fits serves, what does not is named and counted.

What it would catch: weights that reach the target or only part of the drafter, a publication that changes what is
sampled, waits for the requests in flight or loses the prefix cache, a broken drafter that serves or stops the engine,
a hot vocabulary whose ids and head rows do not belong together.
"""

from __future__ import annotations

import pytest
import torch
from shape_engines import ABSENT, GOOD, HOT, LONG_TOKENS, MISSING, NAN, SHAPE, WITH_PUBLICATIONS

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("engine", [WITH_PUBLICATIONS], indirect=True)]

SECTIONS = ("untrained", "published", "broken", "after broken", "hot", "after hot")


@pytest.fixture
def answers(engine):
    """An engine with an untrained drafter: plain decoding, then the publications, then decoding with what serves."""
    return [engine.answers[section][0] for section in SECTIONS]


def test_an_untrained_drafter_is_not_drafted_with_until_one_is_published(answers):
    plain, publishing = answers[0], answers[1]
    assert plain["state"][0]["drafting"] is False
    assert sum(plain["spec_verify_ct"]) == 0
    assert publishing["state"][0]["drafting"] is True
    assert publishing["state"][0]["drafter"]["version"] == GOOD
    assert sum(publishing["spec_num_correct_drafts"]) > 0


def test_greedy_text_is_the_same_before_across_and_after_publications(answers):
    assert all(len(tokens) == LONG_TOKENS for tokens in answers[0]["output_ids"])
    for answer in answers[1:]:
        calls = len(answer["output_ids"]) // 8
        assert calls >= 1 and answer["output_ids"] == answers[0]["output_ids"] * calls


def test_publications_come_while_requests_are_in_flight(answers):
    """The runner asks call after call until each was published: here that tokens were made before and after, in one."""
    counters = ("spec_num_correct_drafts", "spec_verify_ct")
    accepted, verified = (torch.tensor(answers[1][name][:8]) for name in counters)
    drafted = accepted + verified
    assert (drafted > 0).all() and (drafted < LONG_TOKENS - 5).all(), drafted


@pytest.mark.parametrize(
    ("place", "version", "kind", "words"),
    [
        (0, NAN, "nan", "fc.weight holds NaN"),
        (1, MISSING, "missing", "layers.0.mlp.up_proj.weight"),
        (2, SHAPE, "shape", "fc.bias has the shape (7,)"),
        (3, ABSENT, "unreadable", "No such file"),
    ],
)
def test_what_does_not_fit_is_named_and_counted_and_the_old_drafter_goes_on(answers, place, version, kind, words):
    published = answers[2]["publications"][0][place]
    assert published["version"] == version
    assert words in published["reason"] and f"version {version}" in published["reason"]
    assert published["drafter"]["rejected"][kind] == 1
    assert published["drafter"]["version"] == GOOD
    assert sum(answers[3]["spec_num_correct_drafts"]) > 0.5 * sum(answers[3]["spec_verify_ct"])


def test_the_target_is_untouched_and_the_drafter_is_what_was_published(answers):
    first = answers[1]["publications"][0][0]["fingerprints"]
    broken = [each["fingerprints"] for each in answers[2]["publications"][0]]
    last = answers[4]["publications"][0][0]["fingerprints"]
    own = [name for name in first if name.startswith("draft.") and "embed" not in name and "lm_head" not in name]
    for other in [*broken, last]:
        assert {n: v for n, v in other.items() if not n.startswith("draft.")} == {
            n: v for n, v in first.items() if not n.startswith("draft.")
        }
        assert [other[name] for name in own] == [first[name] for name in own]
    assert len(own) == 10


def test_a_hot_vocabulary_is_published_with_its_head(answers):
    """Half of the tokens can be drafted: fewer are accepted, none is wrong."""
    published = answers[4]["publications"][0][0]
    assert published["reason"] is None and published["drafter"]["version"] == HOT
    full, half = (sum(a["spec_num_correct_drafts"]) / sum(a["spec_verify_ct"]) for a in (answers[3], answers[5]))
    assert 0.1 * full < half < 0.9 * full

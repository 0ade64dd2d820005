"""The tap in a real engine: every kept token once, under its position, with the hidden state that the target has there.

The reference is a fresh forward pass of the Hugging Face model over prompt and response. One engine a shape of drafts;
these jobs share prefixes (32 prompts in families, each family again on prefix-cache hits), prefill in chunks, are
retracted and run again every few steps, are aborted, stop in the middle of an accepted chain, and go on with drafting
turned off and on again.

What it would catch: rows of refused drafts, rows of a tree in the wrong order, a position twice after a retraction or
with the hidden state of another request, tokens behind the end of a response, log-probs shifted by one.
"""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from engine_runner import rounding
from shape_engines import CHUNK

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def recorded(engine):
    """(jobs, answers, segments by request) of one shape of drafts."""
    return engine.asked["tap"], engine.answers["tap"], engine.segments


def requests(recorded):
    """(prompt, response, log-probs, segments, tokens of the prompt that came from the prefix cache) of each request."""
    asked, answers, segments = recorded
    for one, answer in zip(asked, answers, strict=True):
        for i, prompt in enumerate(one["prompts"]):
            found, response = segments[answer["request_ids"][i]], answer["output_ids"][i]
            cached = answer["cached_tokens"][i]
            if answer["finish"][i] == "abort":  # whose answer may lack tokens, and says nothing of the cache
                response, cached = accepted(prompt, response, found), len(prompt)
            yield prompt, response, answer["logprobs"][i], found, cached


def accepted(prompt: list[int], answered: list[int], segments: list[dict]) -> list[int]:
    """The response of an aborted request: what was answered, and what the engine had accepted behind that.

    SGLang answers a request that is aborted while it waits, after a retraction, with what it had sent before. The rest
    is known from the tap alone; whether it is what the target has there, the hidden states say.
    """
    recorded = {s["start"] + i: token for s in segments for i, token in enumerate(s["tokens"].tolist())}
    behind = range(len(prompt) + len(answered), max(recorded, default=0) + 1)
    return answered + [recorded[position] for position in behind]


def test_what_should_have_happened_did(recorded, request):
    asked, answers, _ = recorded
    assert sum(answers[2]["cached_tokens"]) > 16 * 16, "no prefix-cache hits"
    assert any(len(prompt) > CHUNK for prompt in asked[0]["prompts"])
    if "switching" not in request.node.name:  # where the model-free drafter goes on
        assert sum(answers[3]["spec_verify_ct"]) == 0, "drafting was not off"
    assert sum(answers[4]["spec_verify_ct"]) > 0
    assert sum(answers[0]["spec_num_correct_drafts"]) > 0.2 * sum(answers[0]["spec_verify_ct"])
    assert "stop" in answers[5]["finish"]
    assert "abort" in [finish for answer in answers[6:-1] for finish in answer["finish"]]


def test_nothing_is_lost_or_counted_wrongly_in_the_whole_engine(engine):
    segments, state = engine.segments, engine.states["end"]
    assert state["tap"]["failures"] == 0 and state["tap"]["dropped"] == 0
    assert state["tap"]["skipped"] > 100, "nothing was computed again: no retraction happened"
    assert state["tap"]["tokens"] == sum(len(s["tokens"]) for group in segments.values() for s in group) > 1000


def test_every_kept_token_is_recorded_once_under_its_position(recorded):
    kept, whole = 0, 0
    for prompt, response, _, segments, cached in requests(recorded):
        tokens, positions = prompt + response, []
        for segment in segments:
            start, count = segment["start"], len(segment["tokens"])
            assert segment["tokens"].tolist() == tokens[start : start + count]
            assert segment["prompt_len"] == len(prompt)
            positions += range(start, start + count)
        assert len(positions) == len(set(positions)), "a position was recorded twice"
        # the last token is never read by a forward pass, unless it was accepted before the end was known
        assert set(range(len(prompt), len(tokens) - 1)) <= set(positions) <= set(range(len(tokens)))
        assert positions == sorted(positions)
        assert positions[:1] <= [cached], "a position that was computed is missing"
        whole += positions[:1] == [0]
        kept += len(response)
    assert kept >= 1000 and whole >= 4, "prompts are recorded too, but for what came from the prefix cache"


def test_hidden_states_are_the_targets(recorded, model):
    worst = 0.0
    for prompt, response, _, segments, _ in requests(recorded):
        with torch.no_grad():
            wanted = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        for segment in segments:
            rows = wanted[segment["start"] : segment["start"] + len(segment["tokens"])]
            # a bfloat16 has 8 bits: rounding a float32 is off by 2**-9 of it at most
            torch.testing.assert_close(segment["hidden"].float(), rows, rtol=2**-8, atol=rounding(1e-4))
            worst = max(worst, float((segment["hidden"].float() - rows).abs().max()))
    print(f"largest difference of a hidden state, recorded in bfloat16: {worst:.1e}")


def test_log_probs_are_those_of_the_answer(recorded):
    compared = 0
    for prompt, _, logprobs, segments, _ in requests(recorded):
        for segment in segments:
            for position, value in enumerate(segment["logprobs"].tolist(), segment["start"]):
                if position < len(prompt) or not logprobs:
                    assert math.isnan(value)
                else:
                    assert value == pytest.approx(logprobs[position - len(prompt)], rel=2e-3, abs=2e-3)
                    compared += 1
    assert compared > 500


def test_siblings_share_a_prompt_id_and_others_do_not(recorded):
    ids = defaultdict(set)
    for prompt, _, _, segments, _ in requests(recorded):
        ids[tuple(prompt)] |= {segment["prompt_id"] for segment in segments}
    assert all(len(found) == 1 for found in ids.values())
    assert len(set.union(*ids.values())) == len(ids) == 32

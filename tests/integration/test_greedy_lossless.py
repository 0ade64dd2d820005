"""Greedy, float32: a speculating engine answers token for token as SGLang's own engine without speculation.

32 prompts of 128 tokens, chain, tree and another strategy at every step, 8 requests at a time and one at a time, on a
cold cache and on prefix-cache hits. The target has no near-ties (its smallest margin is 20 times the rounding of its
logits), so that one different token is a fault and not noise. The reference is stock attention (torch_native) and stock
decoding. Held fixed here: EOS is ignored, nothing is retracted, one rank.

What it would catch: a draft accepted that is not the argmax, a wrong tree mask or position, cache rows of refused
drafts that stay behind or are moved wrongly, prefixes that are read from the wrong slots, and requests that mix.
"""

from __future__ import annotations

import copy

import pytest
import torch
from engine_runner import job, rounding, run_engine
from shape_engines import GREEDY, TIMEOUT_S, TOKENS
from shared_models import greedy_prompts

pytestmark = pytest.mark.slow

NEAR_TIE = rounding(0.0)
"""A response is compared up to where two logits are closer than this: in float32 to its end."""


@pytest.fixture(scope="module")
def prompts():
    return greedy_prompts()


@pytest.fixture(scope="module")
def reference(greedy_models, prompts):
    """32 x 128 tokens of the stock engine without speculation."""
    jobs = [job(prompts[i : i + 8], [GREEDY] * 8) for i in range(0, 32, 8)]
    answers = run_engine(greedy_models / "target", jobs, timeout_s=TIMEOUT_S, attention_backend="torch_native")
    return [output for answer in answers for output in answer["output_ids"]]


@pytest.fixture(scope="module")
def compared(model, prompts, reference):
    """How many tokens of each response are compared: all of them in float32."""
    counts = []
    for prompt, output in zip(prompts, reference, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        first, second = logits.topk(2, -1).values.T
        near = (first - second < NEAR_TIE).nonzero()
        counts.append(int(near[0]) if len(near) else TOKENS)
    print(f"\n{sum(counts)} of {32 * TOKENS} tokens are compared")
    assert sum(counts) > 1000
    return counts


def test_the_target_has_no_near_ties(model, prompts, reference, compared):
    """And the reference is the target's argmax: otherwise the comparison would say nothing."""
    precise = copy.deepcopy(model).double()
    for prompt, output, count in zip(prompts, reference, compared, strict=True):
        with torch.no_grad():
            tokens = torch.tensor([prompt + output])
            logits, exact = (each(tokens).logits[0, len(prompt) - 1 :][:count] for each in (model, precise))
        if count:
            rounding = (exact - logits).abs().max()
            assert logits.argmax(-1).tolist() == output[:count]
            first, second = logits.topk(2, -1).values.T
            assert (first - second).min() > 20 * rounding


@pytest.mark.parametrize("name", ["batch 8", "batch 1, cached", "batch 8, cached"])
def test_every_token_is_the_one_without_speculation(engine, reference, compared, name):
    found = engine.joined(name, "output_ids")
    assert len(found) == 32 and all(len(output) == TOKENS for output in found)
    different = [i for i, count in enumerate(compared) if found[i][:count] != reference[i][:count]]
    assert not different, f"prompts {different}; first: {found[different[0]]} instead of {reference[different[0]]}"


@pytest.mark.parametrize("name", ["batch 1, cached", "batch 8, cached"])
def test_the_cached_runs_read_their_prefix_from_the_cache(engine, name):
    assert min(engine.joined(name, "cached_tokens")) >= 16


@pytest.mark.parametrize("name", ["batch 8", "batch 1, cached", "batch 8, cached"])
def test_drafts_are_accepted(engine, name):
    length = 1 + sum(engine.joined(name, "spec_num_correct_drafts")) / sum(engine.joined(name, "spec_verify_ct"))
    print(f"\n{name}: accept length {length:.2f}")
    assert length > 1.5, "too few drafts are accepted to test acceptance"

"""Greedy, float32: a speculating engine answers token for token as SGLang's own engine without speculation.

32 prompts of 128 tokens, chain and tree, 8 requests at a time and one at a time, on a cold cache and on prefix-cache
hits. The target has no near-ties (its smallest margin is 20 times the rounding of its logits), so that one different
token is a fault and not noise. The reference is stock attention (torch_native) and stock decoding.

What it would catch: a draft accepted that is not the argmax, a wrong tree mask or position, cache rows of refused
drafts that stay behind or are moved wrongly, prefixes that are read from the wrong slots, and requests that mix.
"""

from __future__ import annotations

import copy

import pytest
import torch
from engine_runner import CHAIN, SWITCHING, TREE, job, rounding, run_engine, speculative
from fitted_drafter import fit_drafter
from random_weights import spread_weights
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

VOCAB, TOKENS, TIMEOUT_S = 512, 128, 600
SHAPES = {"chain 3x1@4": CHAIN, "tree 3x2@6": TREE, "switching at every step": SWITCHING}
NEAR_TIE = rounding(0.0)
"""A response is compared up to where two logits are closer than this: in float32 to its end."""
GREEDY = {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}


def make_target(folder):
    """Nine query heads and three key/value heads, as SmolLM2 has them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=144,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    spread_weights(model, 0.05)
    model.save_pretrained(folder)
    return model


def make_prompts():
    """32 prompts of 20 to 35 tokens: four families of eight that share their first 16."""
    generator = torch.Generator().manual_seed(5)
    families = torch.randint(0, VOCAB, (4, 16), generator=generator).tolist()
    own = [torch.randint(0, VOCAB, (4 + i % 16,), generator=generator).tolist() for i in range(32)]
    return [families[i % 4] + own[i] for i in range(32)]


def jobs_of(prompts):
    """Eight at a time on a cold cache, then one at a time and eight at a time again, both on hits."""
    eights = [job(prompts[i : i + 8], [GREEDY] * 8) for i in range(0, 32, 8)]
    ones = [job([prompt], [GREEDY]) for prompt in prompts]
    return {"batch 8": eights, "batch 1, cached": ones, "batch 8, cached": eights}


def run(folder, runs, **options):
    """The answers of each run, its jobs joined: the fields of all 32 prompts in order."""
    answers = iter(
        run_engine(folder / "target", [each for jobs in runs.values() for each in jobs], timeout_s=TIMEOUT_S, **options)
    )
    joined = {}
    for name, jobs in runs.items():
        parts = [next(answers) for _ in jobs]
        joined[name] = {field: [value for part in parts for value in part[field]] for field in parts[0]}
    return joined


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("greedy")


@pytest.fixture(scope="module")
def model(folder):
    return make_target(folder / "target")


@pytest.fixture(scope="module")
def drafter(model, folder):
    return fit_drafter(model, folder / "drafter")


@pytest.fixture(scope="module")
def prompts():
    return make_prompts()


@pytest.fixture(scope="module")
def reference(model, folder, prompts):
    """32 x 128 tokens of the stock engine without speculation."""
    runs = {"batch 8": jobs_of(prompts)["batch 8"]}
    return run(folder, runs, attention_backend="torch_native")["batch 8"]["output_ids"]


@pytest.fixture(scope="module", params=SHAPES)
def tlt(request, folder, drafter, prompts):
    return run(folder, jobs_of(prompts), **speculative("TLT", SHAPES[request.param], drafter))


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
def test_every_token_is_the_one_without_speculation(tlt, reference, compared, name):
    found = tlt[name]["output_ids"]
    assert len(found) == 32 and all(len(output) == TOKENS for output in found)
    different = [i for i, count in enumerate(compared) if found[i][:count] != reference[i][:count]]
    assert not different, f"prompts {different}; first: {found[different[0]]} instead of {reference[different[0]]}"


@pytest.mark.parametrize("name", ["batch 1, cached", "batch 8, cached"])
def test_the_cached_runs_read_their_prefix_from_the_cache(tlt, name):
    assert min(tlt[name]["cached_tokens"]) >= 16


@pytest.mark.parametrize("name", ["batch 8", "batch 1, cached", "batch 8, cached"])
def test_drafts_are_accepted(tlt, name):
    length = 1 + sum(tlt[name]["spec_num_correct_drafts"]) / sum(tlt[name]["spec_verify_ct"])
    print(f"\n{name}: accept length {length:.2f}")
    assert length > 1.5, "too few drafts are accepted to test acceptance"

"""The CPU's draft loop against the trainer's model, which is another hand's: one request and one draft at a time.

What it would catch: a prefix that is cut, shifted or another request's; a mask that shows padding; positions that do
not advance; the halves of RoPE or the heads exchanged; a head's row taken for the target's token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_drafter_model import drafter_folder

from tlt_verl.cpu.draft_chain import Weights, padded_prefix, run_chain
from tlt_verl.drafter.model import EagleDrafter

H, V, POSITIONS = 32, 96, 64
KINDS = [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {})]


@pytest.fixture(params=KINDS, ids=str)
def drafter(request, tmp_path):
    return EagleDrafter.from_folder(drafter_folder(tmp_path, request.param[0], **request.param[1])).eval()


def of(drafter, embed, head, hot=None):
    """The drafter's tensors as SGLang keeps them: projections that read the same input are one."""
    layer = drafter.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj)
    angles = torch.arange(POSITIONS)[:, None] * drafter.rope_frequencies
    biased = heads[0].bias is not None
    return Weights(
        embed=embed,
        fc=(drafter.fc.weight, drafter.fc.bias),
        qkv=(torch.cat([p.weight for p in heads]), torch.cat([p.bias for p in heads]) if biased else None),
        out=(attention.o_proj.weight, attention.o_proj.bias),
        norm=(layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight,
        head=head,
        hot=hot,
        waves=torch.cat([angles.cos(), angles.sin()], dim=-1),
    )


def one_by_one(drafter, w, embeddings, features, first, hidden, steps):
    """The drafts of one request: the whole sequence anew for every draft."""
    hot = torch.arange(len(w.head)) if w.hot is None else w.hot
    tokens = [int(hot[first])]
    while len(tokens) < steps:
        embeddings = torch.cat([embeddings, w.embed[tokens[-1]][None]])
        features = torch.cat([features, hidden[None]])
        hidden = drafter(embeddings, features, [len(features)])[-1]
        tokens.append(int(hot[(w.head @ hidden).argmax()]))
    return tokens


@pytest.mark.parametrize("lengths", [[9], [5, 5, 5], [1, 12, 7]], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("has_hot", [False, True], ids=["all tokens", "hot tokens"])
@torch.inference_mode()
def test_a_chain_is_the_trainers(drafter, lengths, steps, has_hot):
    generator = torch.Generator().manual_seed(len(lengths) + steps)
    embed = torch.randn(V, H, generator=generator)
    hot = torch.randperm(V, generator=generator)[:40] if has_hot else None
    w = of(drafter, embed, embed if hot is None else embed[hot], hot)
    attention = drafter.layers[0].self_attn
    D = drafter.head_dim
    Q, K = attention.q_proj.out_features // D, attention.k_proj.out_features // D
    slots = 1 + torch.randperm(sum(lengths), generator=generator)
    pool = torch.full((2, 1 + sum(lengths), K, D), 50.0)
    table = torch.zeros(len(lengths), max(lengths) + 3, dtype=torch.int32)
    prefixes = []
    for row, length in enumerate(lengths):
        prefix = [torch.randn(length, H, generator=generator) for _ in range(2)]
        _, *cached = drafter.qkv(drafter.merge(*prefix), torch.arange(length))
        own, slots = slots[:length], slots[length:]
        table[row, :length] = own.int()
        for side, tensor in zip(pool, cached, strict=True):
            side[own] = tensor
        prefixes.append(prefix)
    first = torch.randint(len(w.head), (len(lengths),), generator=generator)
    hidden = torch.randn(len(lengths), H, generator=generator)
    cached_lens = torch.tensor(lengths)
    where, mask = padded_prefix(table, cached_lens, steps - 1)
    assert (mask is None) == (len(set(lengths)) == 1)
    drafts = run_chain(w, (Q, K, D), D**-0.5, first, hidden, cached_lens, pool[0][where], pool[1][where], mask, steps)
    requests = zip(prefixes, first, hidden, strict=True)
    assert drafts.tolist() == [one_by_one(drafter, w, *prefix, f, h, steps) for prefix, f, h in requests]


@torch.inference_mode()
def test_the_comparison_would_notice_positions_that_are_off_by_one(drafter):
    """The test above can fail: another place in the sequence gives other drafts."""
    generator = torch.Generator().manual_seed(3)
    w = of(drafter, embed := torch.randn(V, H, generator=generator), embed)
    attention = drafter.layers[0].self_attn
    D = drafter.head_dim
    Q, K = attention.q_proj.out_features // D, attention.k_proj.out_features // D
    B, L, steps = 32, 6, 6
    first, hidden = torch.randint(V, (B,), generator=generator), torch.randn(B, H, generator=generator)
    cached = [torch.randn(B, L + steps - 1, K, D, generator=generator) for _ in range(2)]
    place = torch.full((B,), L)

    def chain(weights, at):
        return run_chain(weights, (Q, K, D), D**-0.5, first, hidden, at, *(c.clone() for c in cached), None, steps)

    assert not torch.equal(chain(w, place), chain(w, place + 1))
    assert not torch.equal(chain(w, place), chain(replace(w, waves=w.waves.flip(-1)), place))
    assert torch.equal(chain(w, place), chain(w, place.clone()))

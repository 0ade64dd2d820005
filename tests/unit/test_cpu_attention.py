"""The pure functions of the CPU attention backend against a loop over queries, one key at a time.

What it would catch: a mask that shows padding, a later token or a node of another branch; a request that reads its
neighbour's slots; heads grouped the wrong way; a prefix that is forgotten; draft branches that share their slots.

Legend: B requests, n query tokens, H query heads, K key/value heads, D head size, Dv value size.
"""

from __future__ import annotations

import math

import pytest
import torch

from tlt_verl.cpu import sglang_attention
from tlt_verl.cpu.sglang_attention import Block, attend, branch_table, extend_blocks, gather, uniform_block

HEADS = [(4, 4), (4, 2), (9, 3), (6, 1)]  # H, K
D, DV, SLOTS = 8, 6, 200
SCALE = 0.3


def pools(K, seed=0):
    """A layer's keys [SLOTS, K, D] and values [SLOTS, K, Dv]. Slot 0, where padding points, would be seen at once."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(SLOTS, K, size, generator=generator) for size in (D, DV))
    keys[0], values[0] = 50.0, 1000.0
    return keys, values


def slot_table(B, width, seed=0):
    """Slots of each request in sequence order: all different, never slot 0."""
    order = torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(seed)) + 1
    return order[: B * width].view(B, width)


def queries(count, H, seed=0):
    return torch.randn(count, H, D, generator=torch.Generator().manual_seed(seed))


def naive(query, seen, keys, values):
    """Attention of one query [H, D] over a list of slots, a head and a key at a time. Returns [H, Dv]."""
    H, K = query.shape[0], keys.shape[1]
    out = torch.zeros(H, DV)
    for head in range(H):
        shared = head // (H // K)
        scores = [math.exp(SCALE * float(query[head] @ keys[slot, shared])) for slot in seen]
        for score, slot in zip(scores, seen, strict=True):
            out[head] += score / sum(scores) * values[slot, shared]
    return out


def computed(query, block, keys, values):
    """A block's attention scattered to its rows of the flat queries [tokens, H, D]; untouched rows are NaN."""
    rows = torch.arange(len(query))[block.rows] if isinstance(block.rows, slice) else block.rows
    rows = rows.view(-1, block.n)
    result = attend(query[rows], keys, values, block, SCALE)
    real = torch.ones_like(rows, dtype=torch.bool) if block.real is None else block.real
    out = torch.full((len(query), query.shape[1], DV), torch.nan)
    out[rows[real]] = result[real]
    return out


def assert_attends(query, blocks, seen, keys, values):
    """The blocks together compute every query once, each over the slots that it is to see."""
    outs = torch.stack([computed(query, block, keys, values) for block in blocks])
    done = ~outs.isnan().any(-1).any(-1)
    assert (done.sum(0) == 1).all(), "each query is computed by one block"
    wanted = torch.stack([naive(q, slots, keys, values) for q, slots in zip(query, seen, strict=True)])
    torch.testing.assert_close(outs.nan_to_num(0).sum(0), wanted, rtol=1e-4, atol=1e-4)


def causal_view(table, lengths, new):
    """The slots that each new token sees: its request's own, itself included."""
    return [
        table[request, : length - n + i + 1].tolist()
        for request, (length, n) in enumerate(zip(lengths, new, strict=True))
        for i in range(n)
    ]


@pytest.mark.parametrize(("H", "K"), HEADS)
@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 9, 4], [12]], ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_uniform_block_is_causal_over_prefixes_of_any_length(H, K, lengths, n):
    """Decode (n = 1) and chain verify: lengths before the queries differ, and rows are padded."""
    kv_lens = [length + n for length in lengths]
    table, (keys, values) = slot_table(len(lengths), 20), pools(K)
    query = queries(len(lengths) * n, H)
    block = uniform_block(table, torch.tensor(kv_lens), n)
    assert_attends(query, [block], causal_view(table, kv_lens, [n] * len(lengths)), keys, values)


def random_tree(n, generator):
    """Which nodes each node sees, [n, n]: its ancestors and itself; a parent stands before its children."""
    tree = torch.eye(n, dtype=torch.bool)
    for node in range(1, n):
        tree[node] |= tree[int(torch.randint(0, node, (), generator=generator))]
    return tree


@pytest.mark.parametrize(("H", "K"), HEADS)
@pytest.mark.parametrize("lengths", [[3, 3], [1, 8, 5], [0, 6]], ids=str)
def test_uniform_block_follows_each_requests_tree(H, K, lengths):
    n, B = 6, len(lengths)
    generator = torch.Generator().manual_seed(1)
    trees = torch.stack([random_tree(n, generator) for _ in lengths])
    table, (keys, values) = slot_table(B, 20), pools(K)
    seen = [
        table[b, :length].tolist() + [int(table[b, length + j]) for j in range(n) if trees[b, i, j]]
        for b, length in enumerate(lengths)
        for i in range(n)
    ]
    block = uniform_block(table, torch.tensor(lengths) + n, n, trees)
    assert_attends(queries(B * n, H), [block], seen, keys, values)


EXTENDS = {
    "one request, no prefix": ([7], [7]),
    "one request behind a prefix": ([9], [4]),
    "one request, one new token": ([9], [1]),
    "alike, no prefix": ([5, 6, 5], [5, 6, 5]),
    "alike, behind prefixes": ([9, 10, 8], [4, 5, 3]),
    "some without prefix": ([5, 9], [5, 4]),
    "one long among short ones": ([19, 2, 3, 2], [18, 1, 3, 2]),
    "short new parts behind a long prefix": ([19, 18, 3], [1, 2, 3]),
}


@pytest.mark.parametrize(("H", "K"), HEADS)
@pytest.mark.parametrize("name", EXTENDS)
def test_extend_blocks_are_causal_over_each_requests_prefix(H, K, name):
    kv_lens, new = EXTENDS[name]
    table, (keys, values) = slot_table(len(new), 20), pools(K)
    blocks = extend_blocks(table, kv_lens, new)
    assert_attends(queries(sum(new), H), blocks, causal_view(table, kv_lens, new), keys, values)


def test_extend_blocks_pad_where_it_is_cheap_and_split_where_it_is_not():
    table = slot_table(4, 20)
    (padded,) = extend_blocks(table[:3], [9, 10, 8], [4, 5, 3])
    assert padded.real is not None and padded.real.sum(-1).tolist() == [4, 5, 3]
    assert len(extend_blocks(table, [19, 2, 3, 2], [18, 1, 3, 2])) == 4


@pytest.mark.parametrize(("H", "K"), HEADS)
def test_attend_is_causal_for_a_request_without_prefix(H, K):
    """The mask "causal", alone, without the function that makes it."""
    table, (keys, values) = slot_table(1, 20), pools(K)
    block = Block(table[:, :7], "causal", slice(0, 7), None, 7)
    assert_attends(queries(7, H), [block], causal_view(table, [7], [7]), keys, values)


@pytest.mark.parametrize("copied_alone", [0, 1 << 40], ids=["by torch", "by NumPy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_is_indexing(monkeypatch, dtype, copied_alone):
    monkeypatch.setattr(sglang_attention, "_COPIED_ALONE", copied_alone)
    pool, slots = pools(3)[0].to(dtype), slot_table(2, 20)
    assert torch.equal(gather(pool, slots), pool[slots])


def test_attend_reads_a_cache_of_another_dtype():
    table, (keys, values) = slot_table(2, 20), pools(2)
    query, block = queries(2, 4), uniform_block(table, torch.tensor([5, 9]), 1)
    low = attend(query[:, None], keys.bfloat16(), values.bfloat16(), block, SCALE)
    same = attend(query[:, None], keys.bfloat16().float(), values.bfloat16().float(), block, SCALE)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, same)


@pytest.mark.parametrize(("topk", "steps"), [(1, 3), (2, 3), (4, 5)])
def test_branch_table_gives_each_branch_its_own_drafts(topk, steps):
    """Branch t of a request sees its sequence, then the slots L + t * S + [0, step]."""
    lengths = torch.tensor([3, 7, 1])
    rows = slot_table(3, 60)
    table = branch_table(rows, lengths, topk, steps)
    for request, length in enumerate(lengths.tolist()):
        for branch in range(topk):
            own = length + branch * steps
            wanted = rows[request, :length].tolist() + rows[request, own : own + steps].tolist()
            assert table[request * topk + branch, : length + steps].tolist() == wanted


@pytest.mark.parametrize(("topk", "steps"), [(2, 3), (3, 4)])
def test_draft_steps_attend_along_their_branch(topk, steps):
    """What the multi-step draft backend plans for each step: `uniform_block` over the branch table."""
    lengths, (keys, values) = torch.tensor([4, 2, 9]), pools(2)
    rows = slot_table(3, 40)
    table = branch_table(rows, lengths, topk, steps)
    expanded = lengths.repeat_interleave(topk)
    for step in range(steps - 1):
        seen = [
            rows[b, :length].tolist() + rows[b, length + t * steps : length + t * steps + step + 1].tolist()
            for b, length in enumerate(lengths.tolist())
            for t in range(topk)
        ]
        block = uniform_block(table, expanded + step + 1, 1)
        assert_attends(queries(3 * topk, 4, seed=step), [block], seen, keys, values)

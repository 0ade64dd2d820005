"""The operators of the `sgl_kernel` stand-in against SGLang's own Triton kernels, run by Triton's interpreter.

`test_cpu_operators.py` runs this file in a process of its own: the interpreter is chosen when triton is imported.
Every kernel gets the same made-up inputs as the stand-in; what they leave in memory must be equal, to the last element.
"""

from __future__ import annotations

import pytest
import sgl_kernel
import torch
from sglang.kernels.ops.kvcache.cache_move import copy_all_layer_kv_cache_tiled
from sglang.kernels.ops.speculative.cache_locs import assign_draft_cache_locs_contiguous, assign_extend_cache_locs
from sglang.kernels.ops.speculative.eagle import fill_accept_out_cache_loc, fill_bonus_tokens
from sglang.kernels.ops.speculative.multi_layer_eagle import rotate_input_ids_kernel
from sglang.kernels.ops.speculative.spec_tree import (
    sgl_build_tree_kernel_efficient_triton,
    verify_tree_greedy_kernel_triton,
)
from sglang.srt.mem_cache.allocation import assign_req_to_token_pool
from sglang.srt.speculative.eagle_utils import organize_draft_results
from sglang.srt.speculative.spec_utils import select_top_k_tokens

VOCAB = 20
SHAPES = [(3, 1, 3, 4), (2, 2, 3, 6), (3, 4, 4, 12), (1, 3, 5, 16), (4, 2, 1, 3), (2, 1, 1, 2)]  # B, topk, steps, N
SEEDS = range(4)


def generator_of(*numbers):
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def drafted(batch, topk, steps, nodes, generator):
    """Parents, selected candidates and tokens as SGLang's own draft loop makes them, from random probabilities."""
    scores, state, lists = None, torch.zeros(batch, 1), ([], [], [])
    for step in range(steps):
        rows = batch if step == 0 else batch * topk
        probs, index = torch.rand(rows, VOCAB, generator=generator).softmax(-1).topk(topk, -1)
        _, state, scores, info = select_top_k_tokens(step, probs, index, state, scores, topk)
        for kept, new in zip(lists, info, strict=True):
            kept.append(new)
    return organize_draft_results(*lists, nodes)


def built(batch, topk, steps, nodes, generator, by_triton):
    parents, selected, tokens = drafted(batch, topk, steps, nodes, generator)
    lengths = torch.randint(3, 40, (batch,), generator=generator)
    mask = torch.ones(batch * nodes * nodes, dtype=torch.bool)
    positions = torch.zeros(batch * nodes, dtype=torch.long)
    links = torch.full((3, batch, nodes), -1)
    if by_triton:
        sgl_build_tree_kernel_efficient_triton[(batch,)](
            parents,
            selected,
            lengths,
            torch.cumsum(lengths, 0) - lengths,
            mask,
            positions,
            *links,
            topk=topk,
            depth=steps,
            draft_token_num=nodes,
            tree_mask_mode=1,
            batch_size=batch,
            parent_list_stride=parents.stride(0),
            selected_index_stride=selected.stride(0),
        )
    else:
        sgl_kernel.build_tree_kernel_efficient_cpu(
            parents, selected, lengths, mask, positions, *links, topk, steps, nodes, 1
        )
    candidates = torch.cat([torch.zeros(batch, 1, dtype=torch.long), tokens], 1)
    return mask, positions, links, candidates


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_build_tree(shape, seed):
    ours = built(*shape, generator_of(*shape, seed), by_triton=False)
    theirs = built(*shape, generator_of(*shape, seed), by_triton=True)
    for name, found, wanted in zip(("mask", "positions", "links"), ours, theirs, strict=False):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_verify_tree_greedy(shape, seed):
    """Half of the targets are led along a path of the tree, so that deep acceptance is there to be wrong about."""
    batch, _, steps, nodes = shape
    generator = generator_of(*shape, seed)
    _, _, (index, child, sibling), candidates = built(*shape, generator, by_triton=False)
    target = torch.randint(0, VOCAB, (batch, nodes), generator=generator)
    for request in range(batch):
        for node in range(nodes):
            following = int(child[request, node])
            while following >= 0 and torch.rand((), generator=generator) < 0.4 and sibling[request, following] >= 0:
                following = int(sibling[request, following])
            if following >= 0 and torch.rand((), generator=generator) < 0.8:
                target[request, node] = candidates[request, following]

    def walked(by_triton):
        predicts = torch.zeros(batch * nodes, dtype=torch.int32)
        accepted = torch.full((batch, steps + 1), -1, dtype=torch.int32)
        count = torch.zeros(batch, dtype=torch.int32)
        tables = (predicts, accepted, count, candidates, index, child, sibling, target)
        if by_triton:
            sizes = {"batch_size": batch, "num_speculative_tokens": steps + 1, "num_draft_tokens": nodes}
            verify_tree_greedy_kernel_triton[(batch,)](*tables, **sizes)
        else:
            sgl_kernel.verify_tree_greedy_cpu(*tables)
        return predicts, accepted, count

    for name, found, wanted in zip(("predicts", "accept_index", "count"), walked(False), walked(True), strict=True):
        assert torch.equal(found, wanted), name


def ranges(generator, batch=5, pool=9, width=80):
    rows = torch.randperm(pool, generator=generator)[:batch]
    start = torch.randint(0, 30, (batch,), generator=generator)
    end = start + torch.randint(0, 40, (batch,), generator=generator)  # empty ranges and more than a Triton block
    table = torch.randint(0, 1000, (pool, width), dtype=torch.int32, generator=generator)
    return rows, table, start, end


@pytest.mark.parametrize("seed", SEEDS)
def test_assign_req_to_token_pool(seed):
    generator = generator_of(seed)
    rows, table, start, end = ranges(generator)
    slots = torch.randint(0, 1000, (int((end - start).sum()),), generator=generator)
    ours, theirs = table.clone(), table.clone()
    sgl_kernel.assign_req_to_token_pool_cpu(rows, ours, start, end, slots, table.shape[1])
    assign_req_to_token_pool[(5,)](rows, theirs, start, end, slots, table.shape[1], 8)
    assert torch.equal(ours, theirs) and not torch.equal(ours, table)


@pytest.mark.parametrize("seed", SEEDS)
def test_assign_extend_cache_locs(seed):
    rows, table, start, end = ranges(generator_of(seed))
    ours, theirs = torch.full((2, 250), -7)
    sgl_kernel.assign_extend_cache_locs_cpu(rows, table, start, end, ours, table.shape[1])
    assign_extend_cache_locs[(5,)](rows, table, start, end, theirs, table.shape[1], 8)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("topk", "steps"), [(1, 3), (2, 3), (4, 5)])
def test_assign_draft_cache_locs_contiguous(topk, steps):
    rows, table, lengths, _ = ranges(generator_of(topk, steps))
    ours, theirs = torch.full((2, 5 * topk * steps), -7)
    sgl_kernel.assign_draft_cache_locs_contiguous_cpu(rows, table, lengths, ours, table.shape[1], topk, steps)
    assign_draft_cache_locs_contiguous[(5,)](rows, table, lengths, theirs, table.shape[1], topk, steps)
    assert torch.equal(ours, theirs)


def test_fill_bonus_tokens():
    generator = generator_of(0)
    tokens = torch.randint(0, VOCAB, (6 * 4,), dtype=torch.int32, generator=generator)
    lengths = torch.tensor([1, 2, 3, 4, 1, 4], dtype=torch.int32)
    ours, theirs = torch.full((2, 6), -7, dtype=torch.int32)
    sgl_kernel.fill_bonus_tokens_cpu(tokens, lengths, ours, 4)
    fill_bonus_tokens[(6,)](tokens, lengths, theirs, 4)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_fill_accept_out_cache_loc(seed):
    generator = generator_of(seed)
    index = (
        torch.randperm(24, generator=generator)[:16]
        .to(torch.int32)
        .masked_fill(torch.rand(16, generator=generator) < 0.5, -1)
    )
    slots = torch.randint(0, 1000, (24,), generator=generator)
    ours, theirs = torch.full((2, 24), -7)
    sgl_kernel.fill_accept_out_cache_loc_cpu(index.view(4, 4), slots, ours)
    fill_accept_out_cache_loc[(16,)](index.view(4, 4), slots, theirs, 16)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_all_layer_kv_cache(dtype):
    """Source and target overlap, as they do when accepted drafts are moved down."""
    generator = generator_of(0)
    buffers = [torch.randn(20, 3, width, generator=generator).to(dtype) for width in (8, 8, 5)]
    source, target = torch.tensor([5, 7, 8, 12, 19]), torch.tensor([4, 5, 6, 7, 19])
    wanted = [buffer.clone() for buffer in buffers]
    for buffer, copied in zip(buffers, wanted, strict=True):
        copied[target] = buffer[source]

    def moved(by_triton):
        copies = [buffer.clone() for buffer in buffers]
        addresses = torch.tensor([copy.data_ptr() for copy in copies], dtype=torch.uint64)
        strides = torch.tensor([copy[0].nbytes for copy in copies])
        if by_triton:
            copy_all_layer_kv_cache_tiled[(3, 1)](addresses, strides, target, source, 5, 8, BYTES_PER_TILE=128)
        else:
            sgl_kernel.copy_all_layer_kv_cache_cpu(addresses, strides, target, source)
        return copies

    for by_triton in (False, True):
        for found, right in zip(moved(by_triton), wanted, strict=True):
            assert torch.equal(found, right), by_triton


@pytest.mark.parametrize("selects", [False, True])
def test_rotate_input_ids(selects):
    tokens, drafts = torch.arange(20), torch.tensor([[100], [101], [102], [103]])
    starts, lengths = torch.tensor([0, 6, 7, 7]), torch.tensor([6, 1, 0, 13])
    select = torch.tensor([3, 6, 0, 18]) if selects else None
    ours, theirs = tokens.clone(), tokens.clone()
    sgl_kernel.rotate_input_ids_cpu(ours, starts, lengths, drafts, select)
    rotate_input_ids_kernel[(4,)](theirs, starts, lengths, drafts, select, BLOCK_SIZE=32)
    assert torch.equal(ours, theirs)

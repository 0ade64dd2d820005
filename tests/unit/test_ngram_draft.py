"""Proposals as SGLang's verify input: the same tree, mask, positions and links as EAGLE's own way to it gives.

What it would catch: a tree that the kernel links otherwise than it was proposed, a mask that shows a node what it must
not see, padding that changes what is accepted, and tokens of requests that are missed, doubled or those of another.

Requests are SGLang's own; a batch is an object with the attributes that are read.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_utils import TreeMaskMode, organize_draft_results, verify_tree_greedy_func
from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input
from sglang.srt.speculative.spec_utils import select_top_k_tokens

from tlt_verl.engine.ngram_draft import NgramDrafter, build_verify_input, tree_arrays
from tlt_verl.engine.ngram_tree import Proposal, Shape
from tlt_verl.strategy import Strategy

TARGET = SimpleNamespace(model_runner=SimpleNamespace(attn_backend=SimpleNamespace(verify_mask=None)))
VOCAB = 20
SHAPES = [Shape(1, 1, 2), Shape(3, 1, 4), Shape(7, 1, 8), Shape(3, 2, 6), Shape(4, 4, 12), Shape(15, 2, 16)]


def batch_of(roots, lengths, reqs=()):
    lens = torch.tensor(lengths)
    return SimpleNamespace(
        reqs=list(reqs),
        seq_lens=lens,
        seq_lens_cpu=lens,
        seq_lens_sum=int(lens.sum()),
        forward_mode=ForwardMode.DECODE,
        spec_info=EagleDraftInput(bonus_tokens=torch.tensor(roots, dtype=torch.int32)),
    )


def eagle_input(batch, shape, generator):
    """What SGLang's own draft loop and builder make of random probabilities."""
    rows, scores, state, lists = len(batch.seq_lens), None, torch.zeros(len(batch.seq_lens), 1), ([], [], [])
    for step in range(shape.num_steps):
        probs = torch.rand(rows if step == 0 else rows * shape.topk, VOCAB, generator=generator).softmax(-1)
        _, state, scores, info = select_top_k_tokens(step, *probs.topk(shape.topk, -1), state, scores, shape.topk)
        for kept, new in zip(lists, info, strict=True):
            kept.append(new)
    numbers = {"topk": shape.topk, "num_steps": shape.num_steps, "num_draft_tokens": shape.num_draft_tokens}
    return build_eagle_verify_input(
        batch,
        batch.spec_info,
        *organize_draft_results(*lists, shape.num_draft_tokens),
        None,
        target_worker=TARGET,
        tree_mask_mode=TreeMaskMode.QLEN_ONLY,
        device="cpu",
        **numbers,
    )


def parents_of(verify, row):
    """Parents by node, from the links."""
    child, sibling = verify.retrieve_next_token[row].tolist(), verify.retrieve_next_sibling[row].tolist()
    parents = [-1] * len(child)
    for node, first in enumerate(child):
        while first >= 0:
            parents[first], first = node, sibling[first]
    return parents


def breadth_first(parents):
    order = [0]
    for node in order:
        order += [child for child, parent in enumerate(parents) if parent == node]
    return order


def mask_of(verify, row):
    nodes = verify.draft_token_num
    return verify.custom_mask[row * nodes**2 : (row + 1) * nodes**2].view(nodes, nodes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tree_is_the_one_that_eagles_builder_makes(shape, seed):
    """EAGLE's trees, proposed to ours breadth first: the same nodes see the same nodes at the same positions."""
    batch, generator = batch_of([3, 1, 4], [7, 19, 5]), torch.Generator().manual_seed(seed)
    theirs = eagle_input(batch, shape, generator)
    nodes, proposals, orders = shape.num_draft_tokens, [], []
    for row in range(3):
        parents, tokens = parents_of(theirs, row), theirs.draft_token.view(-1, nodes)[row].tolist()
        order = breadth_first(parents)
        place = {node: i for i, node in enumerate(order)} | {-1: -1}
        orders.append(order)
        proposals.append(Proposal([tokens[node] for node in order], [place[parents[node]] for node in order]))
    ours = build_verify_input(batch, proposals, shape, TARGET)
    assert (ours.spec_steps, ours.topk, ours.draft_token_num) == (shape.num_steps, shape.topk, nodes)
    assert (ours.max_tree_depth, ours.tree_topk) == (theirs.max_tree_depth, theirs.tree_topk)
    for name in ("draft_token", "positions", "retrieve_index", "retrieve_next_token", "custom_mask"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
        assert getattr(ours, name).shape == getattr(theirs, name).shape, name
    for row, order in enumerate(orders):
        assert parents_of(ours, row) == proposals[row].parents
        assert torch.equal(mask_of(ours, row), mask_of(theirs, row)[order][:, order])
        for name in ("draft_token", "positions"):
            ours_row, theirs_row = (getattr(v, name).view(-1, nodes)[row] for v in (ours, theirs))
            assert torch.equal(ours_row, theirs_row[order]), name


@pytest.mark.parametrize("nodes", [2, 4, 16])
def test_a_chain_has_the_arrays_of_eagles_chains(nodes):
    """`EagleDraftWorker` keeps a chain's arrays as constants; ours differ in the entry that is never read."""
    parents, selected = tree_arrays(range(-1, nodes - 1), Shape(nodes - 1, 1, nodes))
    assert selected == list(range(nodes - 1))
    assert parents[1:] == list(range(nodes - 2)) and len(parents) == nodes - 1


def random_tree(rng, shape):
    """Any tree of the shape, with few different tokens: siblings may be equal, as padding is."""
    while True:
        parents, depths, children = [-1], [0], [0]
        for node in range(1, shape.num_draft_tokens):
            fits = [i for i in range(node) if children[i] < shape.topk and depths[i] < shape.num_steps]
            fits = [i for i in fits if i >= parents[-1]]
            if not fits:
                break
            parents.append(rng.choice(fits))
            depths.append(depths[parents[-1]] + 1)
            children[parents[-1]] += 1
            children.append(0)
        inner = sum(count > 0 for count in children[1:])
        if len(parents) == shape.num_draft_tokens and inner <= shape.most_parents:
            return Proposal([rng.randrange(3) for _ in parents], parents)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_irregular_trees_are_walked_as_proposed(shape, seed):
    """SGLang's walk accepts the first child that carries the target's token, at every node; equal siblings included."""
    rng = random.Random(seed)
    proposals = [random_tree(rng, shape) for _ in range(3)]
    batch, nodes = batch_of([proposal.tokens[0] for proposal in proposals], [4, 9, 2]), shape.num_draft_tokens
    verify = build_verify_input(batch, proposals, shape, TARGET)
    target = torch.tensor([[rng.randrange(3) for _ in range(nodes)] for _ in proposals])
    predict = torch.zeros(3 * nodes, dtype=torch.int32)
    index = torch.full((3, verify.max_tree_depth), -1, dtype=torch.int32)
    accepted = torch.zeros(3, dtype=torch.int32)
    links = (verify.retrieve_index, verify.retrieve_next_token, verify.retrieve_next_sibling)
    verify_tree_greedy_func(predict, index, accepted, verify.draft_token.view(3, nodes), *links, target, shape.topk)
    for row, proposal in enumerate(proposals):
        path = [0]
        while True:
            children = (i for i, parent in enumerate(proposal.parents) if parent == path[-1])
            node = next((i for i in children if proposal.tokens[i] == target[row, path[-1]]), None)
            if node is None:
                break
            path.append(node)
        assert accepted[row] == len(path) - 1
        assert index[row, : len(path)].tolist() == [row * nodes + node for node in path]
        assert predict[index[row, : len(path)].long()].tolist() == target[row, path].tolist()


NO_TREES = {
    "too few nodes": ([-1, 0, 1], Shape(3, 1, 4)),
    "too wide": ([-1, 0, 0, 1], Shape(3, 1, 4)),
    "too deep": ([-1, 0, 1, 2, 3], Shape(3, 2, 5)),
    "not breadth first": ([-1, 0, 0, 2, 1], Shape(3, 2, 5)),
    "a node behind itself": ([-1, 0, 2, 2, 3], Shape(4, 2, 5)),
    "too many parents": ([-1, 0, 0, 0, 1, 2, 3, 3], Shape(2, 3, 8)),
    "no root": ([0, 0, 1, 2], Shape(3, 1, 4)),
}


@pytest.mark.parametrize("what", NO_TREES)
def test_what_is_no_tree_of_the_shape_is_refused(what):
    parents, shape = NO_TREES[what]
    if what == "too many parents":
        assert tree_arrays(parents, shape)[0] == [0, 0, 1, 2]  # three are allowed at 2x3
        parents, shape = [-1, 0, 0, 1, 1, 2, 2, 3, 4], Shape(3, 2, 9)
        assert tree_arrays(parents, shape)[1] == [0, 1, 2, 3, 4, 5, 6, 8]
        parents, shape = [-1, 0, 0, 1, 1, 2, 2, 3, 4, 5], Shape(3, 2, 10)
    with pytest.raises(ValueError, match="of Shape"):
        tree_arrays(parents, shape)


# --- requests


def request(name, prompt, output=()):
    req = Req(name, "", list(prompt), SamplingParams(max_new_tokens=100))
    req.output_ids.extend(output)
    return req


def decode_batch(reqs, written=None):
    """A decode batch in which each request has written so many tokens, its root among them."""
    written = [len(req.output_ids) for req in reqs] if written is None else written
    lengths = [len(req.origin_input_ids) + n - 1 for req, n in zip(reqs, written, strict=True)]
    return batch_of([req.output_ids[-1] if req.output_ids else 0 for req in reqs], lengths, reqs)


def drafts(verify):
    return verify.draft_token.view(-1, verify.draft_token_num).tolist()


STRATEGY = Strategy.parse("ngram:3x1@4")


def test_requests_are_read_as_they_go_on():
    drafter = NgramDrafter(TARGET)
    ahead, behind = request("a", [5, 6], [1, 2, 3, 4]), request("b", [5, 6], [1])
    found = drafts(drafter.verify_input(decode_batch([ahead, behind]), STRATEGY))
    assert found[1] == [1, 2, 3, 4]
    behind.output_ids.extend([2, 3])
    drafter.read([ahead, behind])
    assert drafter.metrics()["accepted/siblings"] == 2
    assert drafter.corpus.length("b") == 3


def test_a_finished_request_is_over_and_remembered():
    drafter = NgramDrafter(TARGET)
    req = request("a", [5, 6], [1, 2, 3, 4, 9, 9])
    drafter.read([req])
    req.finished_reason, req.finished_len = FINISH_LENGTH(4), 4  # what was accepted behind the end does not count
    drafter.read([req])
    drafter.read([req])
    assert "a" not in drafter.corpus and drafter.metrics()["held/stored"] == 6
    drafter.epoch += 1
    again = request("b", [5, 6], [1])
    assert drafts(drafter.verify_input(decode_batch([again]), STRATEGY))[0] == [1, 2, 3, 4]


def test_what_no_result_has_said_yet_is_read_from_the_device():
    """The scheduler is a step ahead: a prefill's token, and then a verification's, are launched, not processed."""
    drafter = NgramDrafter(TARGET)
    sibling, late = request("a", [5, 6], [1, 2, 3, 4, 7]), request("b", [5, 6])
    drafter.read([sibling])
    drafter.launched(SimpleNamespace(reqs=[late]), SimpleNamespace(next_token_ids=torch.tensor([1]), accept_lens=None))
    batch = decode_batch([sibling, late], written=[5, 1])
    batch.spec_info.bonus_tokens[1] = 1
    assert drafts(drafter.verify_input(batch, STRATEGY))[1] == [1, 2, 3, 4]
    result = SimpleNamespace(
        next_token_ids=torch.tensor([0, 0, 0, 0, 2, 3, 9, 9]), accept_lens=torch.tensor([1, 2], dtype=torch.int32)
    )
    drafter.launched(batch, result)
    sibling.output_ids.append(0)
    late.output_ids.append(1)  # the prefill's result is processed meanwhile
    batch = decode_batch([late], written=[3])
    batch.spec_info.bonus_tokens[0] = 3
    assert drafts(drafter.verify_input(batch, STRATEGY))[0][:2] == [3, 4]
    late.output_ids.extend([2, 3])
    drafter.read([late])
    assert drafter.corpus.length("b") == 3
    assert drafter.metrics()["accepted/siblings"] == 2


def test_requests_that_never_finish_are_let_go_when_nothing_runs():
    drafter = NgramDrafter(TARGET)
    drafter.read([request("a", [5, 6], [1])])
    assert "a" in drafter.corpus
    drafter.forget()
    assert "a" not in drafter.corpus

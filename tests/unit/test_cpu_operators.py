"""Every operator of the `sgl_kernel` stand-in: nine against SGLang's own Triton kernels, three against plain loops,
and one against the trees that its masks were made from.

What it would catch: a tree whose links, mask or positions are not the ones that the rest of SGLang expects, a walk that
accepts too much or too little, slots of one request written into another's row, and sampling that is not the one that a
GPU would run (the negative control in tests/statistical leans on it).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sgl_kernel
import torch

NONE = -1
CHAIN = ([1, 2, NONE], [NONE] * 3)
FORK = ([1, NONE, NONE], [NONE, 2, NONE])  # the root and two leaves


@pytest.mark.slow
def test_the_stand_in_equals_sglangs_triton_kernels():
    environment = os.environ | {"TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    oracle = Path(__file__).with_name("against_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(oracle)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def probabilities(rows, vocab, seed):
    return torch.softmax(2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)), -1)


def renormalised(row, kept):
    mass = sum(row[i] for i in kept)
    return [row[i] / mass if i in kept else 0.0 for i in range(len(row))]


def test_top_k_renorm_prob():
    probs, ks = probabilities(6, 11, seed=0), torch.tensor([1, 2, 5, 10, 11, 1 << 30])
    for row, k, found in zip(probs.tolist(), ks.tolist(), sgl_kernel.top_k_renorm_prob(probs, ks), strict=True):
        kept = sorted(range(11), key=lambda i: -row[i])[:k]
        torch.testing.assert_close(found, torch.tensor(renormalised(row, kept)))


def test_top_k_renorm_prob_keeps_ties_at_the_threshold():
    probs = torch.tensor([[0.3, 0.3, 0.3, 0.1]])
    third = 1 / 3
    torch.testing.assert_close(
        sgl_kernel.top_k_renorm_prob(probs, torch.tensor([2])), torch.tensor([[third, third, third, 0]])
    )


def test_top_p_renorm_prob():
    probs, ps = probabilities(6, 11, seed=1), torch.tensor([0.01, 0.3, 0.5, 0.8, 0.95, 1.0])
    for row, p, found in zip(probs.tolist(), ps.tolist(), sgl_kernel.top_p_renorm_prob(probs, ps), strict=True):
        kept, mass = set(), 0.0
        for i in sorted(range(11), key=lambda i: -row[i]):
            if mass > p:
                break
            kept.add(i)
            mass += row[i]
        torch.testing.assert_close(found, torch.tensor(renormalised(row, kept)))


def sampled(candidates, tree, coins, final_coins, probs):
    """The operator on B copies of one tree: predicts [B, N], accept_index [B, depth + 1], accept_token_num [B]."""
    batch, nodes = candidates.shape
    depth = 1 if tree is FORK else nodes - 1
    predicts = torch.full((batch * nodes,), -7, dtype=torch.int32)
    accepted = torch.full((batch, depth + 1), NONE, dtype=torch.int32)
    count = torch.full((batch,), -7, dtype=torch.int32)
    child, sibling = (torch.tensor(links).expand(batch, -1) for links in tree)
    index = torch.arange(batch * nodes).view(batch, nodes)
    sgl_kernel.tree_speculative_sampling_target_only(
        predicts, accepted, count, candidates, index, child, sibling, coins, final_coins, probs, torch.zeros_like(probs)
    )
    return predicts.view(batch, nodes), accepted, count


def test_tree_sampling_on_hand_made_coins():
    """Children 3 and 1 of the root with probabilities 0.2 and 0.3, the rest 0.1 and 0.4."""
    probs = torch.tensor([[0.1, 0.3, 0.4, 0.2], [0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).expand(4, -1, -1)
    candidates = torch.tensor([[0, 3, 1]]).expand(4, -1)
    coins = torch.tensor([0.1, 0.4, 0.6, 0.9])[:, None].expand(-1, 3)
    predicts, accepted, count = sampled(candidates, FORK, coins, torch.tensor([0.5, 0.5, 0.1, 0.9]), probs)
    assert count.tolist() == [1, 1, 0, 0]
    assert accepted.tolist() == [[0, 1], [3, 5], [6, NONE], [9, NONE]]
    # The first accepts 3 and samples behind it, the second 1; the others sample the root without 3 and 1.
    assert [row[0] for row in predicts.tolist()] == [3, 1, 0, 2]
    assert predicts[0, 1] == 2 and predicts[1, 2] == 0


@pytest.mark.parametrize("tree", [CHAIN, FORK], ids=["chain", "fork"])
def test_tree_sampling_emits_the_targets_distribution(tree):
    """The first emitted token over 20,000 trees: within 5 standard deviations of its probability, every token."""
    batch, vocab = 20_000, 6
    generator = torch.Generator().manual_seed(0)
    probs = probabilities(3, vocab, seed=2)
    predicts, _, count = sampled(
        torch.tensor([[0, 3, 5]]).expand(batch, -1),
        tree,
        torch.rand(batch, 3, generator=generator),
        torch.rand(batch, generator=generator),
        probs.expand(batch, -1, -1),
    )
    share = torch.bincount(predicts[:, 0], minlength=vocab) / batch
    deviation = (probs[0] * (1 - probs[0]) / batch).sqrt()
    assert ((share - probs[0]).abs() < 5 * deviation).all()
    assert 0.05 < (count > 0).double().mean() < 0.95


@pytest.mark.parametrize("topk", [1, 3])
def test_a_tree_is_reconstructed_from_its_mask(topk):
    from sgl_kernel.speculative import reconstruct_indices_from_tree_mask

    lengths = torch.tensor([5, 9])
    if topk == 1:
        nodes, parents, selected = 4, torch.tensor([[-1, 0, 1]] * 2), torch.tensor([[0, 1, 2]] * 2)
    else:  # the root's three children, then children of the first and of the third of them
        nodes, parents, selected = 6, torch.tensor([[-1, 0, 1, 2], [-1, 2, 0, 1]]), torch.tensor([[0, 1, 2, 3, 9]] * 2)
    mask = torch.empty(2 * nodes * nodes, dtype=torch.bool)

    def outputs():
        return [torch.empty(2 * nodes, dtype=torch.int64), *(torch.full((2, nodes), -7) for _ in range(3))]

    built, found = outputs(), outputs()
    sgl_kernel.build_tree_kernel_efficient_cpu(parents, selected, lengths, mask, *built, topk, 3, nodes)
    reconstruct_indices_from_tree_mask(mask, lengths, *found, 2, nodes)
    for ours, theirs in zip(found, built, strict=True):
        assert torch.equal(ours, theirs)


def test_another_mask_mode_is_refused_by_name():
    some = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="tree_mask_mode=0"):
        sgl_kernel.build_tree_kernel_efficient_cpu(some, some, some, some, some, some, some, some, 1, 3, 4, 0)


def test_an_operator_that_is_not_there_says_so_when_it_is_called():
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.rmsnorm has no torch stand-in"):
        sgl_kernel.rmsnorm(torch.zeros(1))

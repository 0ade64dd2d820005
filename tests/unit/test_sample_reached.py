"""`sample_reached`: the walk that draws a token only where it goes, over trees written by hand.

What it would catch: a walk that follows a child with another token, misses a later sibling, crosses from one request
into its neighbour, goes deeper than the tree, or draws where it never comes.
"""

from __future__ import annotations

import torch

from tlt_verl.engine.verify import sample_reached

NONE = -1


class Tokens:
    """Stands for the sampler: the token that each flat node would draw, and a note of which nodes were asked."""

    def __init__(self, *by_request):
        self.drawn = torch.tensor(by_request).flatten()
        self.asked = []

    def __call__(self, rows):
        self.asked.append(rows.tolist())
        return self.drawn[rows]


def walk(sample, candidates, first_child, next_sibling, depth):
    tables = (torch.tensor(table) for table in (candidates, first_child, next_sibling))
    return sample_reached(sample, *tables, depth=depth).tolist()


CHAIN = ([1, 2, 3, NONE], [NONE] * 4)
# 0 -> 1, 2, 3 and 1 -> 4, 2 -> 5
TREE = ([1, 4, 5, NONE, NONE, NONE], [NONE, 2, 3, NONE, NONE, NONE])


def test_a_chain_is_walked_to_its_end():
    sample = Tokens([11, 12, 13, 14])
    target = walk(sample, [[10, 11, 12, 13]], [CHAIN[0]], [CHAIN[1]], depth=4)
    assert target == [[11, 12, 13, 14]]
    assert sample.asked == [[0], [1], [2], [3]]


def test_a_chain_stops_at_the_first_refused_draft():
    sample = Tokens([11, 99, 13, 14])
    target = walk(sample, [[10, 11, 12, 13]], [CHAIN[0]], [CHAIN[1]], depth=4)
    assert target == [[11, 99, 0, 0]]
    assert sample.asked == [[0], [1]]


def test_nothing_is_drawn_behind_a_refused_root_child():
    sample = Tokens([50, 12, 13, 14])
    assert walk(sample, [[10, 11, 12, 13]], [CHAIN[0]], [CHAIN[1]], depth=4) == [[50, 0, 0, 0]]
    assert sample.asked == [[0]]


def test_a_tree_takes_the_sibling_that_carries_the_token():
    sample = Tokens([22, 0, 25, 0, 0, 77])
    target = walk(sample, [[20, 21, 22, 23, 24, 25]], [TREE[0]], [TREE[1]], depth=3)
    assert target == [[22, 0, 25, 0, 0, 77]]
    assert sample.asked == [[0], [2], [5]]


def test_the_last_sibling_is_a_leaf_that_still_draws_its_bonus_token():
    sample = Tokens([23, 0, 0, 88, 0, 0])
    target = walk(sample, [[20, 21, 22, 23, 24, 25]], [TREE[0]], [TREE[1]], depth=3)
    assert target == [[23, 0, 0, 88, 0, 0]]
    assert sample.asked == [[0], [3]]


def test_a_token_of_another_branch_is_not_followed():
    """Node 1's draw is the token of node 5, which is a child of node 2."""
    sample = Tokens([21, 25, 0, 0, 0, 0])
    assert walk(sample, [[20, 21, 22, 23, 24, 25]], [TREE[0]], [TREE[1]], depth=3) == [[21, 25, 0, 0, 0, 0]]
    assert sample.asked == [[0], [1]]


def test_siblings_with_one_token_lead_to_the_first():
    """As the greedy walk goes, which reads the drawn tokens afterwards."""
    sample = Tokens([21, 30, 31, 0, 0, 0])
    target = walk(sample, [[20, 21, 21, 23, 24, 25]], [TREE[0]], [TREE[1]], depth=3)
    assert target == [[21, 30, 0, 0, 0, 0]]


def test_a_childless_root_draws_one_token():
    """How a request that takes no drafts is given to the walk."""
    sample = Tokens([11, 12, 13, 14])
    target = walk(sample, [[10, 11, 12, 13]], [[NONE, 2, 3, NONE]], [CHAIN[1]], depth=4)
    assert target == [[11, 0, 0, 0]]


def test_requests_of_a_batch_go_their_own_ways():
    """A whole path, a refusal at the root and a refusal behind one draft; each level is drawn at once."""
    sample = Tokens([11, 12, 13, 14], [90, 91, 92, 93], [31, 99, 0, 0])
    target = walk(
        sample,
        [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]],
        [CHAIN[0]] * 3,
        [CHAIN[1]] * 3,
        depth=4,
    )
    assert target == [[11, 12, 13, 14], [90, 0, 0, 0], [31, 99, 0, 0]]
    assert sample.asked == [[0, 4, 8], [1, 9], [2], [3]]


def test_the_walk_ends_at_the_given_depth():
    sample = Tokens([11, 12, 13, 14])
    assert walk(sample, [[10, 11, 12, 13]], [CHAIN[0]], [CHAIN[1]], depth=2) == [[11, 12, 0, 0]]

"""Hot vocabularies: which tokens, how many, and those that cannot be."""

from __future__ import annotations

import pytest
import torch

from tlt_verl.drafter.hot import covering_size, hot_vocabulary


@pytest.mark.parametrize(
    ("size", "always", "said"),
    [
        (9, (), "got 9; takes 1 .* to 8"),
        (0, (), "got 0; takes 1"),
        (1, (1, 2), "got 1; takes 2 "),
        (3, (8,), "got token 8; takes ids from 0 to 7"),
        (3, (-1,), "got token -1"),
    ],
)
def test_a_hot_vocabulary_that_cannot_be(size, always, said):
    with pytest.raises(ValueError, match=said):
        hot_vocabulary(torch.zeros(8, dtype=torch.int64), size, always)


def test_a_hot_vocabulary_has_the_frequent_tokens_and_those_that_are_always_in():
    counts = torch.tensor([0, 7, 0, 3, 9, 3, 0, 1])
    hot = hot_vocabulary(counts, 4)
    assert hot.dtype == torch.int64 and hot.tolist() == [1, 3, 4, 5]
    assert hot_vocabulary(counts, 3).tolist() == [1, 3, 4]  # of equal counts the lowest id
    assert hot_vocabulary(counts, 4, always=[6, 2, 6]).tolist() == [1, 2, 4, 6]
    assert hot_vocabulary(counts, 7).tolist() == [0, 1, 2, 3, 4, 5, 7]  # filled up with the lowest ids
    assert hot_vocabulary(counts, 8).tolist() == list(range(8))
    assert hot_vocabulary(torch.zeros(8, dtype=torch.int64), 2, always=[7]).tolist() == [0, 7]
    assert counts.tolist() == [0, 7, 0, 3, 9, 3, 0, 1]


@pytest.mark.parametrize(("used", "size"), [(500, 512), (514, 512), (600, 1024), (9000, 8192)])
def test_the_smallest_size_that_holds_nearly_all(used, size):
    counts = torch.zeros(20_000, dtype=torch.int64)
    counts[torch.randperm(20_000, generator=torch.Generator().manual_seed(0))[:used]] = 7
    assert covering_size(counts) == size


def test_a_small_vocabulary_is_hot_as_a_whole():
    assert covering_size(torch.ones(96, dtype=torch.int64)) == 96

"""`inverse_cdf`: the sampler of verification at temperature alone.

What it would catch: an off-by-one at the edge of a block or of a column, a last block that is read past the vocabulary,
a column of probability zero, a bias by blocks, and rounding that pushes a coin near 0 or 1 out of the row.
"""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from tlt_verl.engine.sampling import inverse_cdf

ALMOST_ONE = 1 - 2**-53


def coins_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def sampled(row, *coins):
    return inverse_cdf(torch.tensor(row).repeat(len(coins), 1), coins_of(*coins)).tolist()


def test_coins_at_hand_made_edges():
    row = [0.25, 0.5, 0.0, 0.25]
    assert sampled(row, 0.0, 0.24, 0.25, 0.74, 0.75, ALMOST_ONE) == [0, 0, 1, 1, 3, 3]


def test_rows_need_not_be_normalised():
    assert sampled([2.0, 6.0], 0.0, 0.24, 0.26, ALMOST_ONE) == [0, 0, 1, 1]


def test_each_row_has_its_own_distribution_and_coin():
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]])
    assert inverse_cdf(probs, coins_of(0.9, 0.0, 0.6)).tolist() == [0, 2, 1]


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 511, 512, 513, 1000])
def test_equal_weights_give_the_column_of_the_coin(vocab):
    wanted = torch.arange(vocab)
    coins = (wanted.double() + 0.5) / vocab
    assert torch.equal(inverse_cdf(torch.ones(vocab, vocab), coins), wanted)


@pytest.mark.parametrize("vocab", [255, 256, 257, 512, 513, 1000])
def test_a_certain_column_is_found_wherever_it_stands(vocab):
    """The one column with weight, first and last of each block included, for coins at both ends."""
    certain = torch.eye(vocab)
    for coin in (0.0, 0.5, ALMOST_ONE):
        found = inverse_cdf(certain, torch.full((vocab,), coin, dtype=torch.float64))
        assert torch.equal(found, torch.arange(vocab))


@pytest.mark.parametrize("vocab", [300, 512, 3001])
def test_a_column_of_probability_zero_is_never_returned(vocab):
    """Most columns are zero, whole blocks among them; coins are random and at the edges between the others."""
    generator = torch.Generator().manual_seed(vocab)
    probs = torch.rand(200, vocab, generator=generator)
    probs[torch.rand(200, vocab, generator=generator) < 0.9] = 0
    probs[::2, :256] = 0
    probs[::3, 256:280] = 0
    probs[:, -1] = 0
    probs[probs.sum(-1) == 0, 290] = 0.1
    share = probs.double().cumsum(-1) / probs.double().sum(-1, keepdim=True)
    edges = share[torch.arange(200), torch.randint(0, vocab, (200,), generator=generator)].clamp(max=ALMOST_ONE)
    random = torch.rand(200, generator=generator, dtype=torch.float64)
    for coins in (torch.zeros(200, dtype=torch.float64), torch.full((200,), ALMOST_ONE).double(), edges, random):
        found = inverse_cdf(probs, coins.clamp(max=ALMOST_ONE))
        assert (probs.gather(1, found[:, None]) > 0).all()


def test_agrees_with_a_plain_cumulative_sum():
    """In float64, on coins that stand clear of the edges between two columns."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(4 * torch.randn(500, 1537, generator=generator), -1)
    coins = torch.rand(500, generator=generator, dtype=torch.float64)
    edges = probs.double().cumsum(-1)
    point = coins[:, None] * edges[:, -1:]
    clear = (edges - point).abs().min(-1).values > 1e-6
    plain = torch.searchsorted(edges, point, right=True)[:, 0]
    assert clear.sum() > 450
    assert torch.equal(inverse_cdf(probs, coins)[clear], plain[clear])


def test_very_uneven_weights_keep_their_share():
    """A tail of 100,000 columns that carries half of the mass, a part in 200,000 each: no share is lost to rounding."""
    probs = torch.full((1, 100_001), 1 / 200_000)
    probs[0, 50_000] = 0.5
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    found = inverse_cdf(probs.expand(4000, -1), grid)
    assert abs((found == 50_000).double().mean() - 0.5) < 0.001
    assert abs((found < 50_000).double().mean() - 0.25) < 0.001


def test_a_large_vocabulary_is_sampled_in_its_proportions():
    """Chi-square over 49,152 columns in pools of about 100 expected counts; false alarm 1e-5, one fixed seed."""
    generator = torch.Generator().manual_seed(3)
    row = torch.softmax(2 * torch.randn(49_152, generator=generator), -1)
    batches = [
        inverse_cdf(row.expand(500, -1), torch.rand(500, generator=generator, dtype=torch.float64)) for _ in range(100)
    ]
    pool = (row.double().cumsum(0) * 500).long().clamp(max=499)
    expected = torch.zeros(500, dtype=torch.float64).index_add_(0, pool, row.double()) * 50_000
    observed = torch.bincount(pool[torch.cat(batches)], minlength=500)
    held = expected > 5
    statistic = ((observed - expected)[held] ** 2 / expected[held]).sum()
    assert stats.chi2.sf(float(statistic), int(held.sum()) - 1) > 1e-5

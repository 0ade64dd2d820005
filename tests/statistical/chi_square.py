"""Pearson's chi-square test of samples against an exact distribution, with its power.

Cells are pooled from the exact distribution alone, never from the data, so the p value is what it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

ALPHA = 2e-5
"""Significance of one test. The suite makes fewer than 50, so that a right engine fails it less than once in 1,000."""
POWER = 0.99
_SMALLEST = 5.0  # expected counts below this are pooled


@dataclass(frozen=True)
class Result:
    """What a test says: the p value, and the smallest departure that it would see."""

    p: float
    statistic: float
    cells: int
    samples: int

    @property
    def detectable_w(self) -> float:
        """Cohen's effect size w that is found with `POWER` at `ALPHA`: w^2 = sum (q - p)^2 / p over the cells."""
        freedom = self.cells - 1
        critical = stats.chi2.isf(ALPHA, freedom)
        noncentrality = optimize.brentq(lambda x: stats.ncx2.sf(critical, freedom, x) - POWER, 1e-3, 1e5)
        return float(np.sqrt(noncentrality / self.samples))

    @property
    def detectable_distance(self) -> float:
        """Total variation over the cells that is found with `POWER` at least: w >= 2 TV, by Cauchy and Schwarz."""
        return self.detectable_w / 2

    def __str__(self) -> str:
        return (
            f"p={self.p:.3g} chi2={self.statistic:.1f} cells={self.cells} n={self.samples}; at alpha={ALPHA:g} finds, "
            f"with power {POWER}, w>={self.detectable_w:.3f}: any total variation >={self.detectable_distance:.3f}"
        )


def chi_square(samples: Iterable[tuple[int, ...]], exact: np.ndarray) -> Result:
    """Test samples, tuples of indices, against exact, an array of probabilities with a dimension an index.

    A sample whose exact probability is zero gives p = 0.
    """
    counts = Counter(samples)
    observed = np.zeros_like(exact)
    for index, count in counts.items():
        observed[index] = count
    total = observed.sum()
    if observed[exact == 0].any():
        return Result(0.0, np.inf, int((exact > 0).sum()), int(total))
    pool = _pools(exact.ravel() * total)
    seen = np.bincount(pool, observed.ravel())
    wanted = np.bincount(pool, exact.ravel() * total)
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    return Result(float(stats.chi2.sf(statistic, len(wanted) - 1)), statistic, len(wanted), int(total))


def _pools(expected: np.ndarray) -> np.ndarray:
    """The pool of each cell: rare cells, from the rarest on, share a pool until it expects enough."""
    pool, number, mass = np.empty(len(expected), dtype=np.int64), 0, 0.0
    for cell in np.argsort(expected, kind="stable"):
        pool[cell] = number
        mass += expected[cell]
        if mass >= _SMALLEST:
            number, mass = number + 1, 0.0
    if mass > 0:  # what is left over joins the last pool
        pool[pool == number] = number - 1
    return pool

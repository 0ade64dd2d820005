"""The test that the others lean on: it accepts what is right at its rate, and has the power that it states."""

from __future__ import annotations

import numpy as np
from chi_square import ALPHA, POWER, chi_square


def draw(generator, probabilities, size):
    cells = generator.choice(probabilities.size, size, p=probabilities.ravel())
    return zip(*np.unravel_index(cells, probabilities.shape), strict=True)


def skewed(generator, shape):
    weights = generator.exponential(size=shape) ** 3
    return weights / weights.sum()


def test_p_values_of_right_samples_are_uniform():
    generator = np.random.default_rng(0)
    exact = skewed(generator, (6, 6, 6))
    p = [chi_square(draw(generator, exact, 5000), exact).p for _ in range(400)]
    assert abs(np.mean(p) - 0.5) < 0.06 and min(p) > ALPHA
    assert abs(np.mean(np.array(p) < 0.1) - 0.1) < 0.06


def test_a_departure_of_the_stated_size_is_found_with_the_stated_power():
    generator = np.random.default_rng(1)
    exact = np.full((10, 10), 0.01)
    stated = chi_square(draw(generator, exact, 20000), exact)
    shifted = exact * (1 + stated.detectable_w * np.where(np.arange(100) % 2, 1, -1).reshape(10, 10))
    assert np.isclose(abs(shifted - exact).sum() / 2, stated.detectable_distance)
    found = [chi_square(draw(generator, shifted, 20000), exact).p < ALPHA for _ in range(300)]
    assert np.mean(found) > POWER - 0.02


def test_a_sample_that_cannot_be_fails_at_once():
    exact = np.array([0.5, 0.5, 0.0])
    assert chi_square([(0,)] * 5000 + [(1,)] * 5000 + [(2,)], exact).p == 0


def test_pools_are_large_enough_and_lose_nothing():
    generator = np.random.default_rng(2)
    exact = skewed(generator, (8, 8, 8))
    result = chi_square(draw(generator, exact, 2000), exact)
    assert result.samples == 2000 and 10 < result.cells < 400

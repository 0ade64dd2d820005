"""Hot vocabularies that cannot be: too large, too small for what is always in, of tokens that there are not."""

from __future__ import annotations

import pytest
import torch

from tlt_verl.drafter.buffer import hot_vocabulary


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

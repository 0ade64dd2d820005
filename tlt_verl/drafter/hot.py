"""Hot vocabularies: the tokens that a task uses, to which the draft head is restricted.

Knows counts of tokens only. Verification is over the whole vocabulary whatever is hot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_COVERED = 0.995  # share of the counted tokens that a hot vocabulary of a chosen size holds
_SIZES = (512, 1024, 2048, 4096, 8192)


def covering_size(counts: torch.Tensor) -> int:
    """The smallest of a few sizes that holds all but half a percent of the counted tokens; at most 8,192 or V.

    Args:
        counts: int64 [V], as `Buffer.token_counts` gives them.
    """
    ranked = counts.sort(descending=True).values.cumsum(0).double() / max(1, int(counts.sum()))
    return next(
        (size for size in _SIZES if size < len(counts) and ranked[size - 1] >= _COVERED), min(8192, len(counts))
    )


def hot_vocabulary(counts: torch.Tensor, size: int, always: Sequence[int] = ()) -> torch.Tensor:
    """The tokens that a drafter with a reduced head can propose.

    Args:
        counts: how often each token occurs, int64 [V].
        size: how many tokens to choose.
        always: ids that are in whatever their counts: the end of a sequence, of a turn.

    Returns:
        int64 [size], ascending: `always`, then the most frequent; of equal ones, also of those that never occur, the
        lowest ids.

    Raises:
        ValueError: `size` is not between the number of `always` and V, or an id of `always` is not below V.
    """
    V = len(counts)
    if not max(1, len(set(always))) <= size <= V:
        raise ValueError(
            f"drafter.hot_vocab: got {size}; takes {max(1, len(set(always)))} (the tokens that are always in) to {V}, "
            "the vocabulary's size."
        )
    if wrong := sorted(token for token in set(always) if not 0 <= token < V):
        raise ValueError(f"always: got token {wrong[0]}; takes ids from 0 to {V - 1}, the vocabulary's.")
    ranked = counts.clone()
    ranked[torch.tensor(sorted(set(always)), dtype=torch.int64)] = torch.iinfo(torch.int64).max
    return ranked.sort(descending=True, stable=True).indices[:size].sort().values

"""Sampling the target's token at a node of the verify tree.

Knows the engine's sampler and its parameters; knows nothing of trees.

Legend: R rows (nodes that need a token), B requests, N nodes a request, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

_BLOCK = 256


def inverse_cdf(probs: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    """Sample a column of each row by inverting its cumulative sum, in two stages: a block of columns, then a column.

    The two stages keep the sums short (so that float32 block sums are exact enough) and touch only one block at
    float64. A column of probability zero is never returned.

    Args:
        probs: float32 [R, V], non-negative, every row with a positive sum; need not be normalised.
        coins: float64 [R] in [0, 1).

    Returns:
        int64 [R]
    """
    vocab = probs.shape[1]
    whole = vocab // _BLOCK * _BLOCK
    sums = probs[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1).double()
    if whole < vocab:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True).double()], 1)
    block, rest = _first_above(sums, coins)
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(1, columns.clamp(max=vocab - 1)).double().masked_fill(columns >= vocab, 0)
    offset, _ = _first_above(inside, rest)
    return block * _BLOCK + offset


def _first_above(weights: torch.Tensor, coins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert the cumulative sum of weights float64 [R, C] at coins [R].

    Returns:
        The chosen column int64 [R], and the coin's place within it, float64 [R] in [0, 1).
    """
    edges = weights.cumsum(-1)
    point = torch.minimum(coins * edges[:, -1], torch.nextafter(edges[:, -1], torch.zeros_like(coins)))
    column = torch.searchsorted(edges, point[:, None], right=True)
    weight = weights.gather(1, column)
    place = (point[:, None] - edges.gather(1, column) + weight) / weight
    return column[:, 0], place[:, 0].clamp(0, 1 - 2**-53)


@functools.cache
def _engine_sampler() -> Any:
    from sglang.srt.layers.sampler import create_sampler

    return create_sampler()


class NodeSampler:
    """Samples tokens for nodes from the target's logits, as the engine would for the same logits without speculation.

    Temperature alone takes `inverse_cdf`; top-k, top-p, min-p and seeds go through the engine's own sampler, so that
    their order and their ties are the engine's by construction.

    Args:
        logits: [B * N, V] with penalties, biases and grammar applied; not modified.
        sampling_info: the batch's sampling parameters, a row a request.
        positions: int64 [B * N], the position of each node; seeds depend on it.
        nodes: N.
    """

    def __init__(
        self, logits: torch.Tensor, sampling_info: SamplingBatchInfo, positions: torch.Tensor, nodes: int
    ) -> None:
        self._logits, self._info, self._positions, self._nodes = logits, sampling_info, positions, nodes
        self._simple = not (
            sampling_info.need_top_p_sampling or sampling_info.need_top_k_sampling or sampling_info.need_min_p_sampling
        )

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [R] for the flat node indices rows int64 [R]; independent of one another."""
        request = rows // self._nodes
        scaled = self._logits[rows].float() / self._info.temperatures[request]
        probs = torch.softmax(scaled, dim=-1)
        if self._simple and self._info.sampling_seed is None:
            coins = torch.rand(rows.numel(), dtype=torch.float64, device=rows.device)
            return inverse_cdf(probs, coins)
        tokens = _engine_sampler()._sample_from_probs(
            probs, self._rows_of(request), self._positions[rows], self._simple
        )
        return tokens.view(-1).long()

    def _rows_of(self, request: torch.Tensor) -> SamplingBatchInfo:
        """The sampling parameters with a row a node."""
        info = self._info
        seed = info.sampling_seed
        return dataclasses.replace(
            info,
            temperatures=info.temperatures[request],
            top_ps=info.top_ps[request],
            top_ks=info.top_ks[request],
            min_ps=info.min_ps[request],
            sampling_seed=None if seed is None else seed[request],
        )

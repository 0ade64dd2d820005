"""The way back into drafting: what the drafter's cache lacks is computed when its request is drafted for again.

While the trained drafter does not run, its cache falls behind the target's. What it would have read, the target's
hidden states and the tokens behind them, is kept; one forward pass of the drafter over all of it, for the requests of
the batch that lack something, makes its cache whole and gives their first drafts. What is kept is bounded: of a longer
gap the last part is computed, and the rest costs acceptance only.

Knows SGLang's batches and its draft worker; decides nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MOST_TOKENS = 1024
"""Kept of one request."""

_GAP = "_tlt_gap"  # attribute of a Req


@dataclass
class Gap:
    """What the drafter's cache lacks of one request: the positions [start, start + count).

    Args:
        tokens: int64 pieces, the tokens at the positions one further on.
        hidden: pieces [n, W], the target's hidden states at the positions.
    """

    start: int
    count: int = 0
    tokens: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)

    def add(self, tokens: torch.Tensor, hidden: torch.Tensor, most: int) -> None:
        """Lengthen by these; beyond `most` the first pieces are let go."""
        self.tokens.append(tokens)
        self.hidden.append(hidden)
        self.count += len(tokens)
        while self.count - len(self.tokens[0]) >= most:
            gone = len(self.tokens.pop(0))
            self.hidden.pop(0)
            self.start, self.count = self.start + gone, self.count - gone


class CatchUp:
    """The gaps of a scheduler's requests.

    Args:
        draft_worker: SGLang's `EagleDraftWorker`.
        most: tokens that are kept of one request.
    """

    def __init__(self, draft_worker: Any, most: int = MOST_TOKENS) -> None:
        self._draft, self._most = draft_worker, most
        self.tokens = 0
        """Computed so far."""

    def note(
        self,
        reqs: Sequence[Any],
        starts: Sequence[int],
        counts: Sequence[int],
        predict: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """A step without the drafter: its cache lacks `counts` positions of each request, from `starts` on.

        Args:
            predict: int32 [B * N], the tokens behind the nodes, accepted ones first.
            hidden: [B * N, W] of the nodes.
        """
        width = len(predict) // max(len(reqs), 1)
        for i, (req, start, count) in enumerate(zip(reqs, starts, counts, strict=True)):
            gap = getattr(req, _GAP, None)
            if gap is None or gap.start + gap.count != start:
                gap = Gap(start)
                setattr(req, _GAP, gap)
            rows = slice(i * width, i * width + count)
            whole = width == count  # else the rest of the step's tensors would be kept with it
            tokens, states = predict[rows].to(torch.int64), hidden[rows]
            gap.add(tokens, states if whole else states.clone(), self._most)

    @staticmethod
    def forget(reqs: Sequence[Any]) -> None:
        """A prefill has made the drafter's cache whole."""
        for req in reqs:
            if hasattr(req, _GAP):
                delattr(req, _GAP)

    def close(self, batch: Any) -> None:
        """Make the drafter's cache whole for every request of a decode batch; their first drafts become its own."""
        rows = [i for i, req in enumerate(batch.reqs) if hasattr(req, _GAP)]
        if not rows:
            return
        gaps = [getattr(batch.reqs[i], _GAP) for i in rows]
        drafts = self._extend(batch, rows, gaps)
        info = batch.spec_info
        where = torch.tensor(rows, device=info.topk_p.device)
        topk = drafts.topk_p.shape[1]
        for name in ("topk_p", "topk_index"):
            whole = getattr(info, name).clone()
            whole[where, :topk] = getattr(drafts, name).to(whole.dtype)
            setattr(info, name, whole)
        info.hidden_states = info.hidden_states.index_copy(0, where, drafts.hidden_states.to(info.hidden_states.dtype))
        self.tokens += sum(gap.count for gap in gaps)
        self.forget([batch.reqs[i] for i in rows])

    def _extend(self, batch: Any, rows: list[int], gaps: list[Gap]) -> Any:
        """The drafter's extend over the gaps, as over the new part of a prompt."""
        part = copy.copy(batch)
        device = batch.seq_lens.device
        where = torch.tensor(rows, device=device)
        ends = [gap.start + gap.count for gap in gaps]
        part.reqs = [batch.reqs[i] for i in rows]
        part.req_pool_indices = batch.req_pool_indices[where]
        part.prefix_lens, part.extend_lens = [gap.start for gap in gaps], [gap.count for gap in gaps]
        part.extend_num_tokens, part.seq_lens_sum = sum(part.extend_lens), sum(ends)
        part.seq_lens_cpu = torch.tensor(ends, dtype=torch.int64)
        part.seq_lens = part.seq_lens_cpu.to(device=device, dtype=batch.seq_lens.dtype)
        part.orig_seq_lens = part.seq_lens.to(torch.int32)
        table = batch.req_to_token_pool.req_to_token
        part.out_cache_loc = torch.cat(
            [table[pool, gap.start : end] for pool, gap, end in zip(part.req_pool_indices, gaps, ends, strict=True)]
        ).to(torch.int64)
        tokens = [torch.cat(gap.tokens) for gap in gaps]
        # SGLang shifts a prompt by one, and puts the token behind it at its end: these are the tokens one further on
        part.input_ids = torch.cat([torch.cat((piece[:1], piece[:-1])) for piece in tokens])
        part.forward_mode = type(batch.forward_mode).EXTEND
        part.return_logprob, part.extend_logprob_start_lens = False, None
        part.multimodal_inputs, part.input_embeds = None, None
        hidden = torch.cat([state for gap in gaps for state in gap.hidden])
        return self._draft._draft_extend_for_prefill(part, hidden, torch.stack([piece[-1] for piece in tokens]))

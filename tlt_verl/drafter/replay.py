"""The accept length that the serving engine would have had with a drafter, replayed on sequences that it sampled.

Knows the drafter, the target's embedding and head, and tokens with features; runs no target and draws no token, and
knows neither verl nor sglang.

Chain drafting with greedy drafts, as in EAGLE (arXiv 2401.15077, section 3) and SGLang's `topk=1`. The engine draws the
target's own token at every node and follows the draft that carries it, so what it accepts along a sequence is decided
by the sequence and the drafts. At a root, token p, which is the last one drawn:

    row j, for every j < p      merge(embedding of token j + 1, target's feature at j); their keys and values are cached
    draft 1, of token p + 1     argmax of head(output of row p - 1); the output is the predicted feature at p
    draft k + 1                 row p - 1 + k = merge(embedding of draft k, the predicted feature that gave draft k), at
                                that position; it attends to the rows before p and to this verification's own rows

The verification accepts n drafts, the leading ones that equal the tokens p + 1, p + 2, ..., and produces n + 1 tokens:
those and the bonus token. The next root is p + n + 1. The first root is the response's first token, which the prefill
drew. Behind the sequence's last token there is no root, and a verification that reaches it produces only what is kept.

Conventions, against the counters of SGLang 0.5.17 for a request (`Req.spec_verify_ct`, `meta_info`):

    verifications                  spec_verify_ct
    tokens                         completion_tokens - 1: the response cut at its end, without the prefill's token
    accept_len                     (completion_tokens - 1) / spec_verify_ct; over requests, sums by sums
    completion_accept_len          spec_accept_length = completion_tokens / spec_verify_ct
    depth_accepted[k]              verifications in spec_correct_drafts_histogram at k + 1 or more; their sum over k is
                                   spec_num_correct_drafts

The last line holds but for the last verification of a response. SGLang counts its drafts past the end too; of those a
sequence knows nothing, and they are not counted here. So `tlt/accept_len` and the scheduler's "accept len", which are
1 + spec_num_correct_drafts / spec_verify_ct, are never below `accept_len`, and above it by num_steps tokens a response
at most; the scheduler's line counts the verification that overlap scheduling runs after the end as well. A request that
was retracted is prefilled again, which draws a token that no verification produced and moves the roots behind it.
Requests that the engine runs without drafts (penalties) are not what is replayed here.

Equal to the engine's counts up to rounding: at a near tie of two logits another order of summation, or another
dtype, picks another draft.

Legend: S samples, T tokens of a sample, H hidden size, D head width, A roots at once, L rows of a sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample
from tlt_verl.drafter.trainer import SharedTensors, compute_dtype

_ROWS = 2048  # rows, and roots, that are computed at once
_LOGITS = 2**25  # logits that are computed at once
_BLOCK = 64  # roots in one block of attention: it scores all rows before its last root, and all own rows of the block


@dataclass(frozen=True)
class Replay:
    """What the engine would have counted. All tensors are int64 on the CPU.

    Args:
        num_steps: drafts of one verification.
        sample_tokens: [S], tokens produced by verifications. They depend on the samples alone, not on the drafter.
        sample_verifications: [S]; two drafters on the same samples are compared pair by pair here.
        sample_depth_accepted: [S, num_steps], verifications that accepted draft k + 1 (and so all before it).
        sample_first_tokens: [S], 1 where the sample has the response's first token, which the prefill drew; else 0.
    """

    num_steps: int
    sample_tokens: torch.Tensor
    sample_verifications: torch.Tensor
    sample_depth_accepted: torch.Tensor
    sample_first_tokens: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens produced by verifications, over all samples."""
        return int(self.sample_tokens.sum())

    @property
    def verifications(self) -> int:
        """Verifications over all samples; 0 where no sample has a root."""
        return int(self.sample_verifications.sum())

    @property
    def accept_len(self) -> float:
        """Tokens produced per verification, the bonus token included: 1 to num_steps + 1; NaN without verifications."""
        return self.tokens / self.verifications if self.verifications else float("nan")

    @property
    def completion_accept_len(self) -> float:
        """As SGLang's `spec_accept_length`: the response's first token counts too; NaN without verifications."""
        completion_tokens = self.tokens + int(self.sample_first_tokens.sum())
        return completion_tokens / self.verifications if self.verifications else float("nan")

    @property
    def depth_accepted(self) -> torch.Tensor:
        """[num_steps] verifications that accepted draft k + 1, over all samples."""
        return self.sample_depth_accepted.sum(0)

    @property
    def depth_accept_rates(self) -> torch.Tensor:
        """float64 [num_steps], never rising: accepted over proposed drafts at each depth; NaN without verifications."""
        return self.depth_accepted.double() / self.verifications


def replay(
    drafter: EagleDrafter,
    shared: SharedTensors,
    samples: Sequence[Sample],
    num_steps: int,
    *,
    dtype: torch.dtype | None = None,
) -> Replay:
    """Replay the engine's walk over each sample. Deterministic; leaves the drafter as it was.

    A sample whose response begins in it has `prompt_len` >= 1; the features before the first root, however few, are the
    rows that the drafter sees. One that starts in the middle of a response has `prompt_len` 0 and its first root at its
    second token. A sample ends where its response ends: one that was cut earlier loses part of its last verification.
    The features of a sample's last two tokens are never read.

    Beside the inputs, the keys and values of all rows are kept; all else is bounded by constants of this module.

    Args:
        drafter: on the device of `shared`. Samples may be elsewhere, and are moved part by part.
        shared: the target's tensors. With `hot`, drafts are taken from `head[hot]` and mapped back.
        samples: sampled from the target whose `shared` this is, with its features.
        num_steps: drafts of one verification, SGLang's `speculative_num_steps` at `topk=1`.
        dtype: bfloat16 computes under autocast (logits are bfloat16 too, as the engine's are); float32 computes as the
            drafter's parameters are. None: bfloat16 where the device has instructions for it, else float32.

    Raises:
        ValueError: `num_steps` is below 1, or `dtype` is neither of the two.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, takes 1 or more")
    device = shared.embed.device
    dtype = dtype or compute_dtype(device)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: got {dtype}, takes torch.bfloat16 or torch.float32")
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        runs = _Drafting(drafter, shared, num_steps, dtype).runs(samples)
    walks = [_walk(run.tolist(), num_steps) for run in runs.split([_num_roots(sample) for sample in samples])]
    return Replay(
        num_steps,
        torch.tensor([_num_roots(sample) for sample in samples], dtype=torch.int64),
        torch.tensor([verifications for verifications, _ in walks], dtype=torch.int64),
        torch.tensor([accepted for _, accepted in walks], dtype=torch.int64).view(len(walks), num_steps),
        torch.tensor([int(1 <= s.prompt_len < len(s.tokens)) for s in samples], dtype=torch.int64),
    )


def _first_root(sample: Sample) -> int:
    """The first token with a feature before it that a verification may start from."""
    return max(sample.prompt_len, 1)


def _num_roots(sample: Sample) -> int:
    """Tokens that may be a root: all but the last, from the first root on. As many tokens come from verifications."""
    return max(len(sample.tokens) - 1 - _first_root(sample), 0)


def _walk(run: list[int], num_steps: int) -> tuple[int, list[int]]:
    """Verifications of one sample, and how many of them accepted each depth.

    Args:
        run: for every possible root in order, the drafts that are accepted there.
    """
    verifications, accepted, root = 0, [0] * num_steps, 0
    while root < len(run):
        verifications += 1
        for depth in range(run[root]):
            accepted[depth] += 1
        root += run[root] + 1
    return verifications, accepted


@dataclass(frozen=True)
class _Roots:
    """Roots, in the order of their rows. All int64 [A], on the drafter's device, flat over the samples.

    Args:
        row: the row before the root, whose output is the first draft's feature.
        start: the first row of the sample.
        token: where the token behind the root stands in the flat tokens.
        left: tokens behind the root.
    """

    row: torch.Tensor
    start: torch.Tensor
    token: torch.Tensor
    left: torch.Tensor

    def __getitem__(self, index: torch.Tensor | slice) -> _Roots:
        return _Roots(*(getattr(self, item.name)[index] for item in fields(self)))

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """Runs of at most `_BLOCK` roots of one sample: (begin, end, the sample's first row, row behind the last)."""
        starts, counts = self.start.unique_consecutive(return_counts=True)
        rows, begin = self.row.tolist(), 0
        for first, count in zip(starts.tolist(), counts.tolist(), strict=True):
            for low in range(begin, begin + count, _BLOCK):
                high = min(low + _BLOCK, begin + count)
                yield low, high, first, rows[high - 1] + 1
            begin += count


class _Drafting:
    """Drafts at every possible root at once, and counts the accepted ones. A root that misses drafts no further."""

    def __init__(self, drafter: EagleDrafter, shared: SharedTensors, num_steps: int, dtype: torch.dtype) -> None:
        self.drafter, self.num_steps = drafter, num_steps
        self.embed, self.hot, self.device = shared.embed, shared.hot, shared.embed.device
        self.dtype = next(drafter.parameters()).dtype
        head = shared.head if shared.hot is None else shared.head[shared.hot]  # (Vh, H)
        self.head = head.to(torch.bfloat16 if dtype == torch.bfloat16 else self.dtype)

    def runs(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Accepted drafts at every possible root, int64 on the CPU, flat over the samples.

        Rows are computed in order, so the keys and values that a root attends to are there when its turn comes.
        """
        usable = [sample for sample in samples if _num_roots(sample) > 0]
        if not usable:
            return torch.zeros(0, dtype=torch.int64)
        roots = self._roots(usable)
        tokens = torch.cat([s.tokens for s in usable]).to(self.device, torch.int64)
        following = torch.cat([s.tokens[1:-1] for s in usable]).to(self.device, torch.int64)  # (rows,)
        positions = torch.cat([torch.arange(len(s.tokens) - 2, device=self.device) for s in usable])
        keys = values = torch.empty(0)
        runs, done = [], 0
        for low, features in _chunks(usable):
            rows = slice(low, low + len(features))
            x = self.drafter.merge(self._embedded(following[rows]), features.to(self.device, self.dtype))
            q, k, v = self.drafter.qkv(x, positions[rows])
            if low == 0:
                keys, values = (t.new_empty(len(following), *t.shape[1:]) for t in (k, v))
            keys[rows], values[rows] = k, v
            end = int(torch.searchsorted(roots.row, rows.stop))
            here, done = roots[done:end], end
            runs.append(self._accepted(here, x[here.row - low], q[here.row - low], (keys, values), tokens))
        return torch.cat(runs).cpu()

    def _roots(self, samples: Sequence[Sample]) -> _Roots:
        """The possible roots of all samples. Sample s has T - 2 rows: the last two tokens' would serve no root."""
        columns, first_row, first_token = [], 0, 0
        for sample in samples:
            length = len(sample.tokens)
            root = torch.arange(_first_root(sample), length - 1)
            start = torch.full_like(root, first_row)
            columns.append(torch.stack([first_row + root - 1, start, first_token + root + 1, length - 1 - root]))
            first_row, first_token = first_row + length - 2, first_token + length
        return _Roots(*torch.cat(columns, dim=1).to(self.device))

    def _accepted(
        self,
        roots: _Roots,
        x: torch.Tensor,
        q: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """Accepted drafts of each root, int64 [A].

        Args:
            x, q: the merged input (A, H) and the queries (A, heads, D) of the row before each root.
            cache: keys and values of the rows, (rows, KV heads, D) each.
            tokens: int64, flat over the samples.
        """
        accepted = torch.zeros_like(roots.row)
        alive = torch.arange(len(roots.row), device=self.device)
        own = [side.new_empty(len(alive), 0, *side.shape[1:]) for side in cache]  # keys, values: (A, k, KV heads, D)
        for depth in range(self.num_steps):
            if not len(alive):
                break
            features = self.drafter.finish(x, _attend(q, cache, roots, own))
            drafts = self._drafts(features)
            hit = drafts == tokens[roots.token + depth]
            accepted[alive] += hit
            if depth == self.num_steps - 1:
                break
            on = (hit & (roots.left > depth + 1)).nonzero()[:, 0]
            alive, roots = alive[on], roots[on]
            x = self.drafter.merge(self._embedded(drafts[on]), features[on].to(self.dtype))
            q, *new = self.drafter.qkv(x, roots.row - roots.start + depth + 1)
            own = [torch.cat([old[on], row[:, None]], dim=1) for old, row in zip(own, new, strict=True)]
        return accepted

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed[tokens].to(self.dtype)  # (A, H)

    def _drafts(self, features: torch.Tensor) -> torch.Tensor:
        """Greedy drafts int64 [A] of predicted features (A, H)."""
        rows = max(1, _LOGITS // len(self.head))
        best = [F.linear(part.to(self.head.dtype), self.head).argmax(-1) for part in features.split(rows)]
        drafts = torch.cat(best) if best else torch.zeros(0, dtype=torch.int64, device=self.device)
        return drafts if self.hot is None else self.hot[drafts]


def _chunks(samples: Sequence[Sample]) -> Iterator[tuple[int, torch.Tensor]]:
    """The features of all rows in runs of at most `_ROWS`, over the borders of samples: (first row, (rows, H))."""
    low, gathered, count = 0, [], 0
    for sample in samples:
        rest = sample.features[:-2]
        while len(rest):
            part, rest = rest[: _ROWS - count], rest[_ROWS - count :]
            gathered.append(part)
            count += len(part)
            if count == _ROWS:
                yield low, torch.cat(gathered)
                low, gathered, count = low + count, [], 0
    if gathered:
        yield low, torch.cat(gathered)


def _attend(
    q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], roots: _Roots, own: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Each root's query over the rows of its sample up to its own, and over its own drafts' rows: (A, heads * D).

    Args:
        q: (A, heads, D).
        cache: keys and values of the rows, (rows, KV heads, D) each.
        own: keys and values of each root's drafts, (A, k, KV heads, D) each.
    """
    out = torch.empty_like(q)
    for low, high, first, behind in roots.blocks():
        keys, values = (
            torch.cat([rows[first:behind], drafts[low:high].flatten(0, 1)]).transpose(0, 1)[None]
            for rows, drafts in zip(cache, own, strict=True)
        )  # (1, KV heads, L + block * k, D)
        queries = q[low:high].unflatten(1, (keys.shape[1], -1))  # (block, KV heads, group, D)
        seen = _seen(roots.row[low:high] - first, behind - first, own[0].shape[1])
        mixed = F.scaled_dot_product_attention(
            queries.transpose(0, 1).flatten(1, 2)[None],
            keys,
            values,
            attn_mask=seen.repeat_interleave(queries.shape[2], dim=0),
        )
        out[low:high] = mixed[0].unflatten(1, (high - low, -1)).transpose(0, 1).flatten(1, 2)
    return out.flatten(1)


def _seen(last: torch.Tensor, rows: int, own_rows: int) -> torch.Tensor:
    """What each root of a block attends to: cached rows up to `last` (int64 [block]), then its own of all own rows.

    Returns:
        bool [block, rows + block * own_rows].
    """
    cached = torch.arange(rows, device=last.device) <= last[:, None]
    own = torch.eye(len(last), dtype=torch.bool, device=last.device).repeat_interleave(own_rows, dim=1)
    return torch.cat([cached, own], dim=1)

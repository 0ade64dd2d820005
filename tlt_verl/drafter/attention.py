"""Causal attention over packed sequences: block-diagonal, so that no sequence sees another. Forward and backward.

Knows queries, keys, values and lengths; knows no model, and neither verl nor sglang.

On CUDA torch's variable-length attention (`torch.nn.attention.varlen`, flash attention) takes the pack as it is, where
this torch and this device have it. Elsewhere the sequences are taken one by one, as written out here:

forward     `scaled_dot_product_attention(is_causal=True)` for each sequence
backward    the five products of the chain rule, in blocks of rows (FlashAttention-2, arXiv 2307.08691, section 2.3.2:
            the scores are computed again, nothing of size T x T is kept). torch's own backward for bfloat16 on CPUs
            is slower than the one for float32, whatever the CPU can do
layout      each sequence begins at a multiple of `_ROUND` rows. oneDNN compiles a kernel for every new shape, 0.5 to
            5 ms each, and the lengths of samples are new all the time; rounded, there are few

Milliseconds for 1,500 tokens, lengths log-normal (median 64, p90 150, at most 400) and new in every round, 9 heads,
3 KV heads, D 64, two cores with AMX, torch 2.13, forward and forward + backward:

    |                                                            | bfloat16    | float32     |
    |------------------------------------------------------------|-------------|-------------|
    | SDPA for each sequence, enable_gqa                         | 4.6 / 40.5  | 5.0 / 16.2  |
    | the same, lengths rounded up to multiples of 16            | 4.7 / 41.5  | 6.5 / 30.0  |
    | products written out, both ways, rounded to 16             | 6.0 / 15.9  | 6.3 / 17.0  |
    | SDPA forward, products backward, rounded to 16 (this)      | 4.5 / 14.9  | 5.7 / 16.4  |

Keys and values that were repeated for each query head, before or in the loop, were no faster than `enable_gqa`;
sequences of nearly equal length in one padded call were slower (36 to 51 against 31 on fixed lengths).

Legend: N rows of the pack, T of a sequence, R of the rounded layout, K KV heads, G query heads for each, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention import varlen
except ImportError:
    varlen_attn = None
else:
    varlen_attn = varlen.varlen_attn

_WIDEST_HEAD = 256  # that flash attention takes
_ROUND = 16
_BLOCK = 512  # rows of a sequence whose scores exist at once in the backward


def block_diagonal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Attention of each row to the rows of its own sequence up to itself, scaled by D ** -0.5.

    Differentiable once in q, k and v. Under autocast it computes in autocast's dtype, else in the inputs'.

    Args:
        q: [N, K * G, D], floating. Query head h reads KV head h // G.
        k, v: [N, K, D].
        lengths: rows of each sequence, in order, zeros allowed. Rows behind the last sequence are padding.

    Returns:
        [N, K * G, D]; zeros in padding rows.

    Raises:
        ValueError: a negative length, or more rows in `lengths` than in `q`; or heads that no KV head divides.
    """
    if min(lengths, default=0) < 0 or sum(lengths) > len(q):
        raise ValueError(f"lengths: got {list(lengths)}, takes lengths >= 0 that add up to at most {len(q)} rows")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q: got {q.shape[1]} heads, takes a multiple of the {k.shape[1]} KV heads")
    device = q.device.type
    if torch.is_autocast_enabled(device):
        q, k, v = (side.to(torch.get_autocast_dtype(device)) for side in (q, k, v))
    if not any(lengths):
        return q * 0
    if device == "cuda" and _runs_varlen(q):
        return _varlen(q, k, v, lengths)
    return _OneByOne.apply(q, k, v, tuple(lengths))


def _runs_varlen(q: torch.Tensor) -> bool:
    """Whether this torch has variable-length attention with a causal window, and it takes such heads on their device:
    16 bits, at most 256 wide, Ampere on.
    """
    if varlen_attn is None or "window_size" not in inspect.signature(varlen_attn).parameters:
        return False
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > _WIDEST_HEAD:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    assert varlen_attn is not None
    rows, longest = sum(lengths), max(lengths)
    options: dict[str, Any] = {"window_size": (-1, 0)}  # every earlier row, none behind: causal
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for side in (k, v))
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
    out = varlen_attn(q[:rows], k[:rows], v[:rows], borders, borders, longest, longest, **options)
    return F.pad(out, (0, 0, 0, 0, 0, len(q) - rows))


class _OneByOne(torch.autograd.Function):
    """The sequences one after another, in the rounded layout. Padding rows have zero keys, and only they see them."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        N, heads, D = q.shape
        K, G = k.shape[1], heads // k.shape[1]
        spans, rows, R = _layout(lengths, q.device)
        qh = _by_head(q.view(N, K, G, D), rows, R)  # (K, R, G, D)
        kh, vh = _by_head(k, rows, R), _by_head(v, rows, R)  # (K, R, D)
        mixed = torch.empty_like(qh)
        for begin, end in spans:
            queries = qh[:, begin:end].transpose(1, 2)  # (K, G, T, D): K is the batch here
            keys, values = (side[:, None, begin:end].expand_as(queries) for side in (kh, vh))
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
            mixed[:, begin:end] = out.transpose(1, 2)
        ctx.save_for_backward(qh, kh, vh, rows)
        ctx.spans, ctx.N = spans, N
        return _by_row(mixed, rows, N).view(N, heads, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        qh, kh, vh, rows = ctx.saved_tensors
        N, (K, R, G, D) = ctx.N, qh.shape
        qh = qh * D**-0.5
        gh = _by_head(grad.reshape(N, K, G, D), rows, R)
        dq, dk, dv = torch.empty_like(qh), torch.zeros_like(kh), torch.zeros_like(vh)
        size = min(_BLOCK, max(end - begin for begin, end in ctx.spans))
        later = torch.full((size, size), float("-inf"), dtype=qh.dtype, device=qh.device).triu(1)
        for begin, end in ctx.spans:
            for low in range(begin, end, _BLOCK):
                high = min(low + _BLOCK, end)
                block, seen = slice(low, high), slice(begin, high)
                dq[:, block], dk_seen, dv_seen = _block_gradients(
                    qh[:, block], kh[:, seen], vh[:, seen], gh[:, block], later[: high - low, : high - low]
                )
                dk[:, seen] += dk_seen
                dv[:, seen] += dv_seen
        dq *= D**-0.5
        return _by_row(dq, rows, N).view(N, K * G, D), _by_row(dk, rows, N), _by_row(dv, rows, N), None


def _block_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, later: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of B rows that see M keys, the last B of which are their own.

    Args:
        q: scaled queries (K, B, G, D).
        k, v: (K, M, D).
        grad: of the output, (K, B, G, D).
        later: (B, B), -inf where the key is behind the query, else 0.

    Returns:
        Gradients of the scaled queries (K, B, G, D), of k and of v (K, M, D).
    """
    K, B, G, D = q.shape
    q, grad = q.reshape(K, B * G, D), grad.reshape(K, B * G, D)
    scores = torch.bmm(q, k.mT)  # (K, B * G, M)
    scores.view(K, B, G, -1)[..., -B:] += later[:, None]
    weights = scores.softmax(-1)
    d_scores = torch._softmax_backward_data(torch.bmm(grad, v.mT), weights, -1, weights.dtype)
    return torch.bmm(d_scores, k).view(K, B, G, D), torch.bmm(d_scores.mT, q), torch.bmm(weights.mT, grad)


def _layout(lengths: Sequence[int], device: torch.device) -> tuple[list[tuple[int, int]], torch.Tensor, int]:
    """Each sequence's (begin, end) in the rounded layout, the place of each row int64 [sum(lengths)], and R."""
    spans, places, begin = [], [], 0
    for length in lengths:
        end = begin + -(-length // _ROUND) * _ROUND
        if length:
            spans.append((begin, end))
            places.append(torch.arange(begin, begin + length, device=device))
        begin = end
    return spans, torch.cat(places), begin


def _by_head(side: torch.Tensor, rows: torch.Tensor, R: int) -> torch.Tensor:
    """(N, K, ...) to (K, R, ...): the row at its place, zeros elsewhere."""
    out = side.new_zeros(side.shape[1], R, *side.shape[2:])
    return out.index_copy_(1, rows, side[: len(rows)].transpose(0, 1))


def _by_row(side: torch.Tensor, rows: torch.Tensor, N: int) -> torch.Tensor:
    """(K, R, ...) to (N, K, ...): the reverse of `_by_head`, zeros in padding rows."""
    out = side.new_zeros(N, side.shape[0], *side.shape[2:])
    out[: len(rows)] = side.index_select(1, rows).transpose(0, 1)
    return out

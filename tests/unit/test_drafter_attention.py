"""Block-diagonal attention against the same attention with a dense mask, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tlt_verl.drafter.attention import block_diagonal_attention

PACKS = ([5], [1, 1, 1], [16, 32, 3], [0, 7, 0, 40, 0], [600, 1, 513])


def sides(lengths: list[int], padding: int = 0, heads: int = 6, kv_heads: int = 2, D: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    N = sum(lengths) + padding
    return [torch.randn(N, n, D, generator=generator).requires_grad_() for n in (heads, kv_heads, kv_heads)]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (sequence[:, None] == sequence) & torch.ones(len(q), len(q)).tril().bool()
    q, k, v = (side.transpose(0, 1) for side in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(0, 1)


def with_gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_it_is_dense_attention_with_a_mask(lengths, heads, kv_heads):
    inputs = sides(lengths, heads=heads, kv_heads=kv_heads)
    found = with_gradients(block_diagonal_attention(*inputs, lengths), inputs)
    for one, other in zip(found, with_gradients(dense(*inputs, lengths), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_the_difference_quotient():
    inputs = [side.detach().double().requires_grad_() for side in sides([3, 5], heads=2, kv_heads=1, D=4)]
    assert torch.autograd.gradcheck(lambda *sides: block_diagonal_attention(*sides, [3, 5]), inputs)


def test_rows_behind_the_last_sequence_are_zero_and_reach_nothing():
    inputs = sides([9, 4], padding=6)
    found = with_gradients(block_diagonal_attention(*inputs, [9, 4]), inputs)
    for one in found:
        assert torch.equal(one[13:], torch.zeros_like(one[13:]))
    short = [side.detach()[:13].requires_grad_() for side in inputs]
    assert torch.equal(found[0][:13], block_diagonal_attention(*short, [9, 4]))
    assert torch.equal(block_diagonal_attention(*inputs, [0, 0]), torch.zeros(19, 6, 8))


def test_nothing_of_one_sequence_reaches_another_not_even_a_nan():
    inputs = sides([9, 20, 4])
    before = with_gradients(block_diagonal_attention(*inputs, [9, 20, 4]), inputs)
    with torch.no_grad():
        for side in inputs:
            side[9:29] = float("nan")
    after = with_gradients(block_diagonal_attention(*inputs, [9, 20, 4]), inputs)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:9], other[:9]) and torch.equal(one[29:], other[29:])
        assert other[9:29].isnan().any()


def test_autocast_computes_in_bfloat16():
    inputs = sides([50, 130, 7], D=64)
    exact = with_gradients(block_diagonal_attention(*inputs, [50, 130, 7]), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_diagonal_attention(*inputs, [50, 130, 7])
    assert out.dtype == torch.bfloat16
    for one, other in zip(with_gradients(out, inputs), exact, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("lengths", [[3, 6], [-1, 3]])
def test_lengths_that_do_not_fit_are_an_error(lengths):
    with pytest.raises(ValueError, match=r"lengths: got .* at most 8 rows"):
        block_diagonal_attention(*sides([8]), lengths)


def test_heads_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="q: got 5 heads, takes a multiple of the 2 KV heads"):
        block_diagonal_attention(*sides([8], heads=5), [8])

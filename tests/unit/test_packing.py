"""Packs: which row predicts what, and that a pack is its samples one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_targets import SIZES

from tlt_verl.drafter.loss import eagle_loss
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample, fill, pack

LENGTHS = (2, 37, 9, 1, 120, 16)
CONFIG = SIZES | {"architectures": ["Qwen2ForCausalLMEagle"], "model_type": "qwen2", "num_hidden_layers": 1}
CONFIG |= {"rms_norm_eps": 1e-5}


def sample(T: int, prompt_len: int = 0, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(1000 * seed + T)
    tokens = torch.randint(0, 96, (T,), generator=generator)
    return Sample(tokens, torch.randn(T, 32, generator=generator), prompt_len)


def random_drafter() -> EagleDrafter:
    torch.manual_seed(3)
    return EagleDrafter(CONFIG)


def table(seed: int) -> torch.Tensor:
    return torch.randn(96, 32, generator=torch.Generator().manual_seed(seed))


def outputs(drafter: EagleDrafter, samples: list[Sample]) -> torch.Tensor:
    batch = pack(samples)
    return drafter(F.embedding(batch.embedding_tokens, table(1)), batch.features, batch.lengths)


def loss_of(drafter: EagleDrafter, samples: list[Sample]) -> torch.Tensor:
    batch = pack(samples)
    weights = {"feature_weight": 1.0, "ce_weight": 0.5}
    return eagle_loss(outputs(drafter, samples), batch.wanted, table(2), batch.mask, **weights).loss


# --- one pack -------------------------------------------------------------------------------------------------------


def test_rows_by_hand():
    first = Sample(torch.tensor([10, 11, 12, 13, 14]), torch.arange(5.0)[:, None], prompt_len=3)
    second = Sample(torch.tensor([20, 21, 22]), torch.arange(7.0, 10.0)[:, None], prompt_len=0)
    batch = pack([first, Sample(torch.tensor([9]), torch.zeros(1, 1), 0), second])
    assert batch.lengths == [4, 2]
    assert batch.embedding_tokens.tolist() == [11, 12, 13, 14, 21, 22]
    assert batch.features.flatten().tolist() == [0, 1, 2, 3, 7, 8]
    assert batch.wanted.flatten().tolist() == [1, 2, 3, 4, 8, 9]
    assert batch.mask.tolist() == [False, True, True, True, True, True]  # row 0 drafts token 2, of the prompt


@pytest.mark.parametrize("prompt_len", range(9))
def test_the_mask_is_where_the_draft_is_a_response_token(prompt_len):
    batch = pack([sample(6, prompt_len), sample(4, 0)])
    assert batch.mask.tolist() == [i + 2 >= prompt_len for i in range(5)] + [True] * 3


def test_the_loss_and_all_gradients_of_a_pack_are_those_of_its_samples():
    samples = [sample(T, prompt_len) for T, prompt_len in zip(LENGTHS, (0, 12, 0, 0, 5, 40), strict=True)]
    together, one_by_one = random_drafter(), random_drafter()
    loss_of(together, samples).backward()

    rows = [int(pack([s]).mask.sum()) if s.rows else 0 for s in samples]
    total = 0.0
    for each, count in zip(samples, rows, strict=True):
        if count:
            part = loss_of(one_by_one, [each]) * (count / sum(rows))
            part.backward()
            total += part.item()
    torch.testing.assert_close(loss_of(together, samples).item(), total, rtol=1e-5, atol=0)
    for (name, one), other in zip(together.named_parameters(), one_by_one.parameters(), strict=True):
        assert one.grad.norm() > 0, name
        assert (one.grad - other.grad).norm() < 1e-4 * other.grad.norm(), name


def test_a_sample_does_not_see_what_is_packed_with_it():
    drafter = random_drafter()
    kept = sample(37)
    here = slice(8, 44)
    before = outputs(drafter, [sample(9), kept, sample(30)])[here]
    after = outputs(drafter, [sample(9, seed=1), kept, sample(30, seed=1)])[here]
    assert torch.equal(before, after)
    other_lengths = outputs(drafter, [sample(50), sample(3), kept])[-36:]
    torch.testing.assert_close(before, other_lengths, rtol=1e-5, atol=1e-6)


def test_a_pack_without_rows_is_an_error():
    with pytest.raises(ValueError, match="samples: got 1 without a row"):
        pack([sample(1)])


@pytest.mark.parametrize(
    ("tokens", "features", "prompt_len", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 2), 0, r"tokens: got torch.float32 \[3\]"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2), 0, r"features: .* \[2, 2\], .* T = 3 tokens"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int32), 0, "features: got torch.int32"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2), -1, "prompt_len: got -1"),
    ],
)
def test_what_is_no_sample_is_an_error(tokens, features, prompt_len, message):
    with pytest.raises(ValueError, match=message):
        Sample(tokens, features, prompt_len)


# --- an epoch -------------------------------------------------------------------------------------------------------


def numbered(lengths: list[int], prompt_lens: list[int]) -> list[Sample]:
    """Samples whose every token is another number, which is its feature too."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    spans = [torch.arange(start, start + T) for start, T in zip(starts, lengths, strict=False)]
    return [Sample(t, t[:, None].double(), p) for t, p in zip(spans, prompt_lens, strict=True)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("max_tokens", [1, 7, 64, 10_000])
def test_no_token_is_lost_and_none_is_twice(max_tokens):
    lengths = torch.randint(1, 90, (60,), generator=seeded(0)).tolist()
    samples = numbered(lengths, torch.randint(0, 30, (60,), generator=seeded(1)).tolist())
    packs = list(fill(samples, max_tokens, seeded(2)))
    assert all(sum(s.rows for s in members) <= max_tokens for members in packs)
    learnt = [batch.wanted[batch.mask].flatten() for batch in map(pack, packs)]
    whole = pack(samples)
    assert torch.cat(learnt).sort().values.tolist() == whole.wanted[whole.mask].flatten().tolist()
    assert all(batch.mask.any() for batch in map(pack, packs))


def test_a_long_sample_is_cut_at_the_size_of_a_pack():
    packs = list(fill(numbered([10], [6]), 4, seeded(0)))
    pieces = sorted((members[0].tokens.tolist(), members[0].prompt_len) for members in packs)
    assert pieces == [([4, 5, 6, 7, 8], 2), ([8, 9], 0)]  # rows 0 to 3 draft tokens 2 to 5, of the prompt: left out


def test_the_order_is_random_and_the_generators():
    samples = numbered([9] * 40, [0] * 40)

    def order(seed: int) -> list[int]:
        return [int(s.tokens[0]) for members in fill(samples, 16, seeded(seed)) for s in members]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != sorted(order(0))


def test_packs_are_nearly_full():
    lengths = (torch.randn(500, generator=seeded(0)) * 0.66 + 4.16).exp().clamp(4, 400).long().tolist()
    packs = list(fill(numbered(lengths, [0] * 500), 1024, seeded(1)))
    rows = [sum(s.rows for s in members) for members in packs]
    assert sum(rows) == sum(lengths) - 500
    assert sum(rows) / (len(rows) * 1024) > 0.95


def test_nothing_gives_no_pack():
    assert list(fill([], 8, seeded(0))) == []
    assert list(fill([sample(1), sample(6, prompt_len=7)], 8, seeded(0))) == []
    with pytest.raises(ValueError, match="max_tokens: got 0"):
        list(fill([sample(4)], 0, seeded(0)))

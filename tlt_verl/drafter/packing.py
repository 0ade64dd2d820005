"""Samples, and packs of them: sequences laid end to end, so that no row is computed for padding.

Knows tokens, features and where the prompt ends; knows neither the model nor the loss.

A sample of T tokens has T - 1 rows. Row i takes the target's feature at i and token i + 1, and predicts the feature at
i + 1, from which the head drafts token i + 2 (EAGLE, arXiv 2401.15077, section 3.1):

    position      0    1    2    3   ...   T - 1
    row i              feature i and token i + 1  ->  feature i + 1  ->  draft of token i + 2

Only drafts of response tokens are wanted: at inference none other is asked for. The last row drafts the token behind
the sample, which the sample does not hold but whose distribution the last feature gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sample:
    """A contiguous stretch of one sequence, with the target's features.

    Args:
        tokens: int64 [T].
        features: [T, H], any float dtype: the target's hidden states behind its final norm, position by position.
        prompt_len: leading tokens of this stretch that belong to the prompt; 0 where it begins in the response, T or
            more where it ends in the prompt.

    Raises:
        ValueError: the shapes or dtypes are others, or `prompt_len` is negative.
    """

    tokens: torch.Tensor
    features: torch.Tensor
    prompt_len: int

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.dtype != torch.int64:
            raise ValueError(f"tokens: got {self.tokens.dtype} {list(self.tokens.shape)}, takes int64 [T]")
        if self.features.ndim != 2 or len(self.features) != len(self.tokens) or not self.features.is_floating_point():
            found = f"{self.features.dtype} {list(self.features.shape)}"
            raise ValueError(f"features: got {found}, takes floats [T, H] for T = {len(self.tokens)} tokens")
        if self.prompt_len < 0:
            raise ValueError(f"prompt_len: got {self.prompt_len}, takes 0 or more")

    @property
    def rows(self) -> int:
        """Rows of the drafter's input: T - 1, or 0 where there is no token."""
        return max(len(self.tokens) - 1, 0)

    @property
    def first_wanted(self) -> int:
        """The first row whose draft is a response token; `rows` or more where there is none."""
        return max(self.prompt_len - 2, 0)


@dataclass(frozen=True)
class PackedBatch:
    """Rows of several samples, end to end.

    Args:
        embedding_tokens: int64 [N], the token whose embedding goes into each row.
        features: [N, H], the feature that goes into each row.
        wanted: [N, H], the feature that each row predicts.
        mask: bool [N], rows that are learnt from: their draft is a response token.
        lengths: rows of each sample; they add up to N.
    """

    embedding_tokens: torch.Tensor
    features: torch.Tensor
    wanted: torch.Tensor
    mask: torch.Tensor
    lengths: list[int]


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """The rows of the samples, in order. A sample of one token has no row and is left out.

    Raises:
        ValueError: no sample has a row.
    """
    used = [sample for sample in samples if sample.rows]
    if not used:
        raise ValueError(f"samples: got {len(samples)} without a row, takes one of two tokens or more")
    return PackedBatch(
        embedding_tokens=torch.cat([sample.tokens[1:] for sample in used]),
        features=torch.cat([sample.features[:-1] for sample in used]),
        wanted=torch.cat([sample.features[1:] for sample in used]),
        mask=torch.cat([torch.arange(s.rows, device=s.tokens.device) >= s.first_wanted for s in used]),
        lengths=[sample.rows for sample in used],
    )


def fill(samples: Sequence[Sample], max_tokens: int, generator: torch.Generator) -> Iterator[list[Sample]]:
    """One epoch: the samples in random order, each in the first pack that has room for it.

    A sample of more than `max_tokens` rows is cut into pieces of as many, which overlap by one token: every row is in
    one piece, but what a row attends to ends at the border. What has no row to learn from is left out.

    Args:
        samples: any lengths.
        max_tokens: rows of a pack at most.
        generator: of the order; on the CPU.

    Yields:
        The samples of one pack, for `pack`.

    Raises:
        ValueError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: got {max_tokens}, takes 1 or more")
    pieces = [p for sample in samples for p in _pieces(sample, max_tokens) if p.first_wanted < p.rows]
    order = torch.randperm(len(pieces), generator=generator).tolist()
    yield from _first_fit([pieces[index] for index in order], max_tokens)


def _pieces(sample: Sample, max_rows: int) -> Iterator[Sample]:
    """The sample itself, or pieces of `max_rows` rows (`max_rows` + 1 tokens) and a last one of the rest."""
    if sample.rows <= max_rows:
        yield sample
        return
    for begin in range(0, sample.rows, max_rows):
        tokens = slice(begin, begin + max_rows + 1)
        yield Sample(sample.tokens[tokens], sample.features[tokens], max(sample.prompt_len - begin, 0))


def _first_fit(samples: Sequence[Sample], max_rows: int) -> Iterator[list[Sample]]:
    """Packs in the order of their first sample, each as soon as no sample fits into it; then the rest."""
    smallest = min((sample.rows for sample in samples), default=0)
    open_packs: list[tuple[list[Sample], int]] = []  # and the rows that are left in each
    for sample in samples:
        index = next((i for i, (_, left) in enumerate(open_packs) if left >= sample.rows), len(open_packs))
        if index == len(open_packs):
            open_packs.append(([], max_rows))
        members, left = open_packs[index]
        members.append(sample)
        open_packs[index] = (members, left - sample.rows)
        if left - sample.rows < smallest:
            yield open_packs.pop(index)[0]
    for members, _ in open_packs:
        yield members

"""Context that the buffer gives a sequence whose beginning came from the prefix cache."""

from __future__ import annotations

import torch
from test_buffer import buffer, features_of, segment


def test_a_cached_prompt_is_given_back_from_a_sibling_as_context():
    """The prefix cache has no hidden states: the sibling's are the same, and are not trained on twice."""
    found = buffer()
    prompt, first, second = list(range(10, 16)), [20, 21, 22], [30, 31, 32]
    found.add([segment("a", 0, prompt + first, prompt_len=6, final=True)])
    found.add([segment("b", 5, [prompt[5], *second], prompt_len=6, final=True)])
    samples = found.samples()
    assert sorted(sample.tokens.tolist() for sample in samples) == [prompt + first, prompt + second]
    for sample in samples:
        assert sample.prompt_len == 6
        assert torch.equal(sample.features, features_of(sample.tokens, 0))
    assert found.token_counts(90).nonzero().flatten().tolist() == first + second


def test_a_resubmitted_sibling_with_a_cached_prompt_is_not_stored_again():
    found = buffer()
    found.add([segment("a", 0, [*range(10, 16), 20, 21, 22], prompt_len=6, final=True)])
    for name in ("b", "c"):
        found.add([segment(name, 5, [15, 30, 31, 32], prompt_len=6, final=True)])
    assert len(found.samples()) == 2 and found.counts.duplicates == 1


def test_a_response_that_goes_on_in_its_middle_is_given_no_other_ones_context():
    found = buffer()
    found.add([segment("a", 0, [*range(10, 16), 20, 21, 22], prompt_len=6, final=True)])
    found.add([segment("b", 8, [40, 41, 42], prompt_len=6, final=True)])
    assert sorted(sample.tokens.tolist() for sample in found.samples())[1] == [40, 41, 42]

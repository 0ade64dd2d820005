"""The buffer: which sequences it makes of segments, which it keeps, and for whom."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from tlt_verl.drafter.buffer import Buffer
from tlt_verl.segments import Segment

W = 4
PLENTY = 1 << 30


def features_of(tokens: torch.Tensor, start: int, seed: int = 0) -> torch.Tensor:
    """Hidden states bfloat16 [T, W] that tell token and position."""
    positions = torch.arange(start, start + len(tokens))
    return torch.stack([tokens, positions % 97, positions // 97, torch.full_like(tokens, seed)], dim=1).bfloat16()


def segment(
    request: str, start: int, tokens: list[int], *, version: int = 1, prompt_len: int = 2, final: bool = False, **given
) -> Segment:
    ids = torch.tensor(tokens, dtype=torch.int32)
    return Segment(
        policy_version=version,
        request_id=request,
        prompt_id=given.pop("prompt_id", 7),
        start=start,
        prompt_len=prompt_len,
        final=final,
        tokens=ids,
        hidden=given.pop("hidden", features_of(ids, start)),
        logprobs=torch.full((len(ids),), float("nan"), dtype=torch.float16),
    )


def sequence(request: str, length: int, step: int = 5, first: int = 0, **given) -> list[Segment]:
    """A finished request of `length` tokens, cut into segments of `step`; its tokens are `base`'s, or its own."""
    base = given.pop("base", request)
    rng = random.Random(base)
    tokens = [rng.randrange(90) for _ in range(first + length)][first:]
    starts = range(0, length, step)
    return [segment(request, first + at, tokens[at : at + step], final=at + step >= length, **given) for at in starts]


def buffer(max_bytes: int = PLENTY, held_out: float = 0.0, kept_share: float = 0.25, least_tokens: int = 2) -> Buffer:
    return Buffer(max_bytes, held_out=held_out, kept_share=kept_share, least_tokens=least_tokens)


def lengths(found: Buffer) -> list[int]:
    return sorted(len(sample.tokens) for sample in found.samples())


def prompt_ids(found: Buffer, held_out: bool, count: int) -> list[int]:
    ids = (i for i in range(100_000) if found.is_held_out(i) == held_out)
    return [next(ids) for _ in range(count)]


def test_segments_of_a_request_become_one_sample():
    found = buffer()
    found.add(sequence("a", 23, prompt_len=6))
    (sample,) = found.samples()
    wanted = [s.tokens for s in sequence("a", 23)]
    assert sample.tokens.dtype == torch.int64 and sample.tokens.tolist() == torch.cat(wanted).tolist()
    assert sample.features.dtype == torch.bfloat16
    assert torch.equal(sample.features, features_of(torch.cat(wanted), 0))
    assert sample.prompt_len == 6


@pytest.mark.parametrize(("first", "prompt_len", "wanted"), [(0, 6, 6), (4, 6, 2), (6, 6, 0), (9, 6, 0)])
def test_the_prompt_length_of_a_sample_is_counted_from_its_own_beginning(first, prompt_len, wanted):
    found = buffer()
    found.add(sequence("a", 12, first=first, prompt_len=prompt_len))
    assert found.samples()[0].prompt_len == wanted


def test_what_is_in_flight_is_seen_and_goes_on_growing():
    found, segments = buffer(), sequence("a", 100, step=7)
    seen = []
    for i, part in enumerate(segments):
        found.add([part])
        (sample,) = found.samples()
        assert len(sample.tokens) == min(7 * (i + 1), 100)
        seen.append((sample, sample.tokens.clone(), sample.features.clone()))
    for sample, tokens, features in seen:  # what was handed out stays as it was
        assert torch.equal(sample.tokens, tokens) and torch.equal(sample.features, features)


def test_samples_are_not_copied():
    found = buffer()
    found.add(sequence("a", 40))
    first, again = found.samples()[0], found.samples()[0]
    assert first.features.data_ptr() == again.features.data_ptr()
    found.add(sequence("b", 40))
    assert first.features.data_ptr() in {sample.features.data_ptr() for sample in found.samples()}


def test_a_sequence_in_flight_is_copied_seldom():
    found, places = buffer(), set()
    for part in sequence("a", 4000, step=10):
        found.add([part])
        places.add(found.samples()[0].features.untyped_storage().data_ptr())
    assert len(places) < 40  # of 400: storage grows by a quarter
    assert found.counts.bytes <= 1.25 * 4000 * (8 + 2 * W)


def test_requests_and_versions_are_apart():
    found = buffer(kept_share=1.0)
    found.add(sequence("a", 10) + sequence("b", 12))
    found.add(sequence("a", 14, first=10, version=2))  # a request that goes on under the next policy
    assert lengths(found) == [10, 12, 14]


def test_interleaved_requests():
    found = buffer()
    found.add(part for pair in zip(sequence("a", 30), sequence("b", 30), strict=True) for part in pair)
    assert lengths(found) == [30, 30]


def test_a_gap_begins_a_new_sequence():
    found, segments = buffer(), sequence("a", 20)
    found.add([segments[0], *segments[2:]])
    assert lengths(found) == [5, 10]
    assert {sample.features[0, 1].item() for sample in found.samples()} == {0, 10}


def test_positions_are_stored_once():
    found, segments = buffer(), sequence("a", 20)
    found.add(segments[:3])
    found.add(segments[1:])  # read again from an earlier place
    assert lengths(found) == [20]
    assert found.counts.duplicates == 2


def test_an_overlap_is_cut_off():
    found = buffer()
    found.add([segment("a", 0, list(range(10))), segment("a", 6, [6, 7, 8, 9, 10, 11]), segment("a", 3, [3, 4])])
    assert found.samples()[0].tokens.tolist() == list(range(12))
    assert found.counts.tokens == 12 and found.counts.duplicates == 1


def test_a_request_under_a_new_id_is_not_stored_again():
    found = buffer()
    found.add(sequence("a", 33))
    before = found.counts
    found.add(sequence("retry", 33, base="a"))
    after = found.counts
    assert lengths(found) == [33] and after.tokens == before.tokens and after.duplicates == 7
    found.add(sequence("retry, cut otherwise", 33, step=8, base="a"))
    assert lengths(found) == [33] and found.counts.duplicates == 12
    found.add(sequence("other prompt", 33, base="a", prompt_id=8))
    found.add(sequence("later", 33, base="a", first=1))
    assert lengths(found) == [33, 33, 34], "another prompt, and another beginning, behind the token that it lacks"


def test_siblings_share_their_prompt_as_context_and_train_on_their_own_response():
    found = buffer()
    prompt = list(range(8))
    for request in "abc":
        found.add([segment(request, 0, prompt, prompt_len=8)])
    for request, token in zip("abc", (50, 60, 70), strict=True):
        found.add([segment(request, 8, [token] * 4, prompt_len=8, final=True)])
    samples = found.samples()
    assert sorted(sample.tokens.tolist() for sample in samples) == [prompt + [token] * 4 for token in (50, 60, 70)]
    assert {sample.prompt_len for sample in samples} == {8}
    assert found.counts.duplicates == 2


def test_what_siblings_have_in_common_behind_the_prompt_is_trained_on_once():
    found = buffer()
    common = [segment("a", 0, [1, 2, 3, 4]), segment("a", 4, [5, 6])]
    found.add([*common, segment("a", 6, [7, 8])])
    found.add([segment("b", s.start, s.tokens.tolist()) for s in common])
    assert len(found.samples()) == 1
    found.add([segment("b", 6, [17, 18])])
    by_end = {sample.tokens[-1].item(): sample for sample in found.samples()}
    assert (by_end[8].prompt_len, by_end[18].prompt_len) == (2, 6)
    assert by_end[18].tokens.tolist() == [1, 2, 3, 4, 5, 6, 17, 18]
    assert torch.equal(by_end[18].features, features_of(by_end[18].tokens.int(), 0))
    assert found.token_counts(20).max() == 1


def test_equal_short_segments_of_different_sequences_are_not_duplicates():
    found = buffer()
    found.add([segment("a", 0, [1, 2, 3]), segment("b", 0, [1, 2, 4])])
    found.add([segment("a", 3, [0], final=True), segment("b", 3, [0], final=True)])  # both end at the same place
    assert sorted(s.tokens.tolist() for s in found.samples()) == [[1, 2, 3, 0], [1, 2, 4, 0]]
    assert found.counts.duplicates == 0


def test_an_empty_last_segment_only_ends_the_request():
    found = buffer()
    found.add([segment("a", 0, [1, 2, 3]), segment("a", 3, [], final=True)])
    assert lengths(found) == [3] and found.counts.duplicates == 0


def test_short_sequences_and_bare_prompts_are_no_samples():
    found = buffer(least_tokens=8)
    found.add([*sequence("a", 7), *sequence("b", 8), *sequence("prompt", 30, prompt_len=30)])
    assert lengths(found) == [8]
    assert [len(s.tokens) for s in found.samples(min_tokens=3)] == [7, 8]
    assert found.samples(min_tokens=9) == []
    assert found.counts.sequences == 3


def test_of_the_last_step_the_long_ones_stay_and_of_older_ones_nothing():
    found = buffer(kept_share=0.25)
    found.add(part for n in range(10, 18) for part in sequence(f"old {n}", n))
    found.add(sequence("new", 20, version=2))
    assert lengths(found) == [16, 17, 20]
    assert found.counts.expired == 6
    assert len(found.samples()[0].tokens) == 20  # the newest first
    found.add(sequence("newer", 30, version=3))
    assert lengths(found) == [20, 30]
    found.add(sequence("much newer", 9, version=9))
    assert lengths(found) == [9, 30]


def test_length_is_the_responses():
    found = buffer(kept_share=0.5)
    found.add([*sequence("long prompt", 50, prompt_len=48), *sequence("long response", 30, prompt_len=2)])
    found.add(sequence("new", 20, version=2))
    assert lengths(found) == [20, 30]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_all_of_the_last_step(share):
    found = buffer(kept_share=share)
    found.add(sequence("a", 10) + sequence("b", 11))
    found.add(sequence("c", 12, version=2))
    assert lengths(found) == ([12] if share == 0 else [10, 11, 12])


def test_segments_that_come_late():
    found = buffer(kept_share=0.5)
    late = sequence("late", 40)
    found.add(late[:4] + sequence("short", 10))
    found.add(sequence("new", 12, version=2))
    found.add(late[4:])  # the previous step's, of a sequence that is kept
    assert lengths(found) == [12, 40]
    found.add(sequence("newer", 13, version=3))
    before = found.counts.expired
    found.add(sequence("stale", 50, version=1))  # of a step that is over
    assert lengths(found) == [12, 13] and found.counts.expired > before
    for _ in range(5):  # looking again does not take more away
        found.add([])
    assert lengths(found) == [12, 13]


def test_with_one_version_everything_stays():
    found = buffer()
    found.add(part for n in range(2, 60) for part in sequence(str(n), n, step=9, prompt_len=1))
    assert lengths(found) == list(range(2, 60))
    assert found.counts.expired == found.counts.dropped == 0


def test_the_bound_takes_old_steps_first_then_short_finished_ones_then_the_rest():
    row = 4 + 2 * W
    found = buffer(max_bytes=100 * row, kept_share=1.0)
    found.add(sequence("old", 60, step=60))
    in_flight = sequence("in flight", 20, step=8, version=2)[:2]
    found.add([*in_flight, *sequence("b", 24, step=24, version=2)])
    assert found.counts.tokens == 100 and found.counts.dropped == 0
    found.add(sequence("c", 30, step=30, version=2))
    assert found.counts.tokens == 70 and found.counts.dropped == 1  # the old step, though it was the longest
    found.add(sequence("d", 50, step=50, version=2))
    assert found.counts.tokens == 16 + 30 + 50 and found.counts.dropped == 2  # b; what is in flight stays
    found.add(sequence("e", 200, step=200, version=2))
    assert found.counts.tokens == 96 and found.counts.dropped == 3  # what is too large by itself takes nothing with it
    found.add(sequence("f", 60, step=60, version=2))
    assert found.counts.tokens == 16 + 60 and found.counts.dropped == 5
    found.add(sequence("g", 98, step=7, version=2)[:-1])  # in flight, as the other one is: now the shorter of the two
    assert found.counts.tokens == 91 and found.counts.dropped == 7


def test_the_bound_holds_whatever_comes():
    rng, max_bytes = random.Random(3), 20_000
    found = buffer(max_bytes=max_bytes, held_out=0.2)
    streams = [sequence(f"r{i}", rng.randrange(3, 200), step=rng.randrange(1, 40), prompt_id=i) for i in range(200)]
    for version in (1, 2, 3):
        active = [list(stream) for stream in streams]
        while active:
            stream = rng.choice(active)
            part = stream.pop(0)
            if not stream:
                active.remove(stream)
            found.add([dataclasses.replace(part, policy_version=version)])
            if rng.random() < 0.1:
                found.samples()
                found.held_out_samples()
            assert found.counts.bytes <= max_bytes
    for sample in found.samples() + found.held_out_samples():
        start = int(sample.features[0, 1] + 97 * sample.features[0, 2])
        assert torch.equal(sample.features, features_of(sample.tokens.int(), start))
    assert found.counts.dropped > 100


def test_what_was_dropped_frees_its_memory_and_is_nobodys_beginning():
    found = buffer(max_bytes=600)
    found.add([segment("a", 0, [1] * 20), segment("b", 0, [1] * 20)])
    found.add(sequence("c", 45, step=45))
    assert found.counts.dropped == 1 and lengths(found) == [20]
    found.add([segment("d", 0, [2] * 25)])
    assert found.counts.dropped == 2  # a, whose beginning b shares
    found.add([segment("b", 20, [4] * 3), segment("a", 20, [5] * 4)])
    assert found.counts.bytes <= 600
    assert all(s.tokens.unique().numel() == 1 for s in found.samples())


def test_held_out_prompts_are_for_the_gate_alone():
    found = Buffer(PLENTY, held_out=0.2, least_tokens=2)
    for i in range(500):
        for sibling in "xy":
            found.add(sequence(f"{i}{sibling}", 10, prompt_id=i, base=f"{i}{sibling}"))
    training, gate = found.samples(), found.held_out_samples()
    assert len(training) + len(gate) == 1000
    assert len(gate) % 2 == 0 and 140 < len(gate) < 260
    assert found.counts.held_out == len(gate)
    assert {s.features.data_ptr() for s in training}.isdisjoint(s.features.data_ptr() for s in gate)


def test_the_decision_is_the_prompts_own():
    shares = [0.0, 0.1, 0.3, 0.6]
    decisions = [[Buffer(1, held_out=share).is_held_out(i) for i in range(2000)] for share in shares]
    assert decisions == [[Buffer(9, held_out=share).is_held_out(i) for i in range(2000)] for share in shares]
    assert not any(decisions[0])
    for less, more in itertools.pairwise(decisions):
        assert all(b for a, b in zip(less, more, strict=True) if a)  # a larger share only adds prompts
    assert [round(sum(d) / 2000, 1) for d in decisions] == shares
    assert [Buffer(1, held_out=0.1).is_held_out(i) for i in (19, 2**64 - 1)] == [True, False]  # in every process


def test_the_gate_sees_the_current_policy_only():
    found = Buffer(PLENTY, held_out=0.2, kept_share=1.0, least_tokens=2)
    held_out = prompt_ids(found, True, 3)
    assert found.held_out_samples() == [] and found.newest_version is None
    found.add(sequence("a", 10, prompt_id=held_out[0]) + sequence("b", 11, prompt_id=held_out[1]))
    found.add(sequence("c", 12, prompt_id=held_out[2], version=2))
    assert [len(s.tokens) for s in found.held_out_samples()] == [12] and found.newest_version == 2
    assert [len(s.tokens) for s in found.held_out_samples(policy_version=1)] == [10, 11]
    assert found.held_out_samples(policy_version=3) == [] == found.samples()


def test_token_counts_are_of_responses_that_are_trained_on():
    found = Buffer(PLENTY, held_out=0.2, least_tokens=2)
    (gates,), (ours,) = prompt_ids(found, True, 1), prompt_ids(found, False, 1)
    found.add([segment("a", 0, [1, 1, 5, 5, 6], prompt_len=2, prompt_id=ours)])
    found.add([segment("b", 0, [1, 1, 9, 9, 9], prompt_len=2, prompt_id=gates)])
    counts = found.token_counts(10)
    assert counts.dtype == torch.int64 and counts.tolist() == [0, 0, 0, 0, 0, 2, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="vocab_size: got 6, and the buffer holds token 6"):
        found.token_counts(6)


def test_another_width_is_refused():
    found = buffer()
    found.add(sequence("a", 10))
    with pytest.raises(ValueError, match="request 'b' sent hidden states of width 3, and the buffer holds width 4"):
        found.add([segment("b", 0, [1, 2], hidden=torch.zeros(2, 3, dtype=torch.bfloat16))])
    assert lengths(found) == [10]


@pytest.mark.parametrize(
    ("option", "value"), [("max_bytes", 0), ("held_out", 1.0), ("kept_share", 1.5), ("least_tokens", 1)]
)
def test_an_argument_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"^{option}: got {value}; takes "):
        Buffer(**{"max_bytes": 1, option: value})

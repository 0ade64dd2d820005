"""The replayed accept length equals that of an engine written out literally: one root, one draft, one row at a time.

The literal engine recomputes every row for every draft with the reference drafter of `tiny_targets`, keeps no cache,
and shares nothing with the replay but the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sampled_target import World, one_thread
from tiny_targets import FAMILIES, ReferenceDrafter

from tlt_verl.drafter import replay as replay_module
from tlt_verl.drafter.eagle import tensor_shapes
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample
from tlt_verl.drafter.replay import replay
from tlt_verl.drafter.trainer import SharedTensors


@torch.no_grad()
def simulate(reference: ReferenceDrafter, shared: SharedTensors, sample: Sample, num_steps: int) -> tuple[Any, ...]:
    """The literal engine on one sample: tokens produced, verifications, verifications that accepted each depth."""
    head = shared.head if shared.hot is None else shared.head[shared.hot]
    tokens, end = sample.tokens.tolist(), len(sample.tokens)
    produced, verifications, depth_accepted = 0, 0, [0] * num_steps
    root = max(sample.prompt_len, 1)
    while root < end - 1:
        embeddings = [shared.embed[tokens[row + 1]] for row in range(root)]
        features = [sample.features[row] for row in range(root)]
        drafts = []
        for _ in range(num_steps):
            predicted = reference(torch.stack(embeddings)[None], torch.stack(features)[None])[0, -1]
            best = int((head @ predicted).argmax())
            drafts.append(best if shared.hot is None else int(shared.hot[best]))
            embeddings.append(shared.embed[drafts[-1]])
            features.append(predicted)
        accepted = 0
        while accepted < num_steps and root + 1 + accepted < end and drafts[accepted] == tokens[root + 1 + accepted]:
            depth_accepted[accepted] += 1
            accepted += 1
        produced += min(accepted + 1, end - 1 - root)
        verifications += 1
        root += accepted + 1
    return produced, verifications, depth_accepted


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World("llama", tmp_path_factory.mktemp("replay"))


def assert_as_simulated(world: World, shared: SharedTensors, samples: list[Sample], num_steps: int) -> float:
    """Every count of every sample is the literal engine's. Returns the accept length."""
    found = replay(world.drafter, shared, samples, num_steps, dtype=torch.float32)
    wanted = [simulate(world.reference, shared, sample, num_steps) for sample in samples]
    assert found.sample_tokens.tolist() == [tokens for tokens, _, _ in wanted]
    assert found.sample_verifications.tolist() == [verifications for _, verifications, _ in wanted]
    assert found.sample_depth_accepted.tolist() == [depth_accepted for _, _, depth_accepted in wanted]
    assert found.accept_len == sum(w[0] for w in wanted) / sum(w[1] for w in wanted)
    return found.accept_len


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_equals_the_literal_engine(world: World, num_steps: int) -> None:
    accept_len = assert_as_simulated(world, world.shared, world.samples, num_steps)
    assert 1.2 < accept_len < num_steps + 0.9  # some drafts are accepted and some are not, or nothing was compared


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_equals_the_literal_engine_for_every_family(family: str, tmp_path: Path) -> None:
    world = World(family, tmp_path)
    assert assert_as_simulated(world, world.shared, world.samples, 4) > 1.2


@pytest.mark.parametrize("share", [0.25, 0.1])
def test_a_hot_vocabulary_maps_back(world: World, share: float) -> None:
    shared = world.with_hot(share)
    accept_len = assert_as_simulated(world, shared, world.samples, 3)
    assert accept_len > 1.1
    assert accept_len != replay(world.drafter, world.shared, world.samples, 3, dtype=torch.float32).accept_len


def test_a_sample_may_start_anywhere(world: World) -> None:
    """In the middle of a response, in the middle of a prompt, behind a prompt, with a prompt and nothing else."""
    whole = world.samples[2]
    starts = [
        Sample(
            tokens=whole.tokens[start:], features=whole.features[start:], prompt_len=max(0, whole.prompt_len - start)
        )
        for start in (30, 7, 12, 11)
    ]
    only_a_prompt = Sample(tokens=whole.tokens[:12], features=whole.features[:12], prompt_len=12)
    one_token = Sample(tokens=whole.tokens[:1], features=whole.features[:1], prompt_len=0)
    samples = [*starts, only_a_prompt, one_token, whole]
    assert_as_simulated(world, world.shared, samples, 3)
    found = replay(world.drafter, world.shared, samples, 3, dtype=torch.float32)
    length = len(whole.tokens)
    first_roots = (1, 5, 1, 1)
    assert found.sample_tokens.tolist()[:6] == [
        *(length - start - 1 - root for start, root in zip((30, 7, 12, 11), first_roots, strict=True)), 0, 0
    ]  # fmt: skip
    assert found.sample_first_tokens.tolist() == [0, 1, 0, 1, 0, 0, 1]


def test_the_last_two_features_are_not_read(world: World) -> None:
    sample = world.samples[0]
    unknown = torch.cat([sample.features[:-2], torch.full_like(sample.features[:2], float("nan"))])
    cut = Sample(tokens=sample.tokens, features=unknown, prompt_len=sample.prompt_len)
    assert_as_simulated(world, world.shared, [cut], 3)


def test_small_blocks_change_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end inside samples, blocks of a few roots and logits row by row give the counts of one pass."""
    monkeypatch.setattr(replay_module, "_ROWS", 37)
    monkeypatch.setattr(replay_module, "_BLOCK", 5)
    monkeypatch.setattr(replay_module, "_LOGITS", 96)
    assert_as_simulated(world, world.shared, world.samples, 3)


def test_samples_do_not_see_each_other(world: World) -> None:
    together = replay(world.drafter, world.shared, world.samples, 3, dtype=torch.float32)
    alone = [replay(world.drafter, world.shared, [sample], 3, dtype=torch.float32) for sample in world.samples]
    assert together.sample_verifications.tolist() == [one.verifications for one in alone]


def test_bfloat16_differs_by_rounding_only(world: World) -> None:
    exact = replay(world.drafter, world.shared, world.samples, 3, dtype=torch.float32)
    rounded = replay(world.drafter, world.shared, world.samples, 3, dtype=torch.bfloat16)
    assert rounded.tokens == exact.tokens
    assert rounded.accept_len == pytest.approx(exact.accept_len, rel=0.1)
    assert world.drafter.fc.weight.dtype == torch.float32 and world.drafter.fc.weight.grad is None


# By hand: the feature of a token is its embedding, and the drafter says that token t is followed by t + 1.

V = H = 16
BY_HAND: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "vocab_size": V,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


def counting_drafter() -> tuple[EagleDrafter, SharedTensors]:
    tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes(BY_HAND).items()}
    tensors["fc.weight"] = torch.cat([torch.eye(H), torch.zeros(H, H)], dim=1)
    drafter = EagleDrafter(BY_HAND)
    drafter.load_state_dict(tensors)
    return drafter, SharedTensors(embed=torch.eye(V), head=torch.eye(V).roll(1, 0), hot=None)


def sequence(tokens: list[int], prompt_len: int) -> Sample:
    return Sample(tokens=torch.tensor(tokens) % V, features=torch.zeros(len(tokens), H), prompt_len=prompt_len)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_a_perfect_drafter(num_steps: int, dtype: torch.dtype) -> None:
    drafter, shared = counting_drafter()
    counting = sequence(list(range(4 + 5 * (num_steps + 1))), prompt_len=3)
    found = replay(drafter, shared, [counting, counting], num_steps, dtype=dtype)
    assert found.accept_len == num_steps + 1
    assert found.sample_verifications.tolist() == [5, 5]
    assert found.depth_accept_rates.tolist() == [1.0] * num_steps


def test_a_drafter_that_is_never_right() -> None:
    drafter, shared = counting_drafter()
    found = replay(drafter, shared, [sequence(list(range(100, 50, -1)), prompt_len=3)], 3)
    assert found.accept_len == 1.0
    assert found.verifications == found.tokens == 50 - 1 - 3
    assert found.depth_accept_rates.tolist() == [0.0] * 3


def test_the_response_is_cut_at_its_end() -> None:
    """10 tokens behind the first: 4 + 4, then 2 drafts accepted with no bonus token behind them."""
    drafter, shared = counting_drafter()
    found = replay(drafter, shared, [sequence(list(range(3 + 1 + 10)), prompt_len=3)], 3)
    assert (found.tokens, found.verifications) == (10, 3)
    assert found.accept_len == 10 / 3
    assert found.completion_accept_len == 11 / 3  # SGLang's spec_accept_length counts the prefill's token
    assert found.depth_accepted.tolist() == [3, 3, 2]


def test_a_miss_ends_the_verification_and_its_token_is_the_bonus() -> None:
    drafter, shared = counting_drafter()
    found = replay(drafter, shared, [sequence([0, 1, 2, 3, 9, 10, 11, 12, 13, 0, 5], prompt_len=1)], 3)
    # root 1: drafts 2 3 4, of which 2, bonus 9; root 9: 10 11 12, bonus 13; root 13: 14, bonus 0; root 0: 1, bonus 5
    assert (found.tokens, found.verifications) == (9, 4)
    assert found.depth_accepted.tolist() == [2, 2, 1]


def test_nothing_to_replay() -> None:
    drafter, shared = counting_drafter()
    for samples in ([], [sequence([1, 2], prompt_len=1)]):
        found = replay(drafter, shared, samples, 2)
        assert (found.tokens, found.verifications, len(found.sample_tokens)) == (0, 0, len(samples))
        assert math.isnan(found.accept_len) and math.isnan(found.completion_accept_len)
        assert found.sample_depth_accepted.shape == (len(samples), 2)


def test_wrong_arguments_are_named() -> None:
    drafter, shared = counting_drafter()
    with pytest.raises(ValueError, match="num_steps: got 0"):
        replay(drafter, shared, [], 0)
    with pytest.raises(ValueError, match=r"dtype: got torch\.float16"):
        replay(drafter, shared, [], 1, dtype=torch.float16)

"""What a spot worker knows between two windows: its state goes out and comes in whole; what it is judged on fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from check_yield import LocalLinks, policy_of, segments, sizes
from sampled_target import one_thread

from tlt_verl.drafter.eagle import drafter_config
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.trainer import DrafterDiverged
from tlt_verl.segments import Segment
from tlt_verl.spot.coordination import Coordination
from tlt_verl.spot.learner import LearnerSettings, SpotLearner
from tlt_verl.spot.links import LinkError, Master, Policy, Published

H, V = 32, 64
CONFIG = drafter_config({**sizes(H), "vocab_size": V})
POLICY = policy_of(H, V)
SEGMENTS = segments(H, V, 40)
PIECE = 160  # tokens of a held-out sample that are replayed at once


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with one_thread():
        yield


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return EagleDrafter(CONFIG).state_dict()


def learner(count: int = 40, **settings: Any) -> SpotLearner:
    """One that has segments, the policy and the master, and the device."""
    made = SpotLearner(CONFIG, weights(), LearnerSettings(**{"step_s": 100.0, "most_rows": 256} | settings))
    made.add(SEGMENTS[:count])
    made.follow(POLICY.version, POLICY.embed, POLICY.head)
    assert made.begin()
    return made


def losses(of: SpotLearner, steps: int) -> list[float]:
    return [of.micro_step().loss for _ in range(steps)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# --- steps ------------------------------------------------------------------------------------------------------------


def test_it_learns_and_says_from_how_much():
    learning = learner(held_out=0.0, lr=5e-3)
    reports = [learning.micro_step() for _ in range(80)]
    first, last = reports[:8], reports[-8:]
    assert sum(report.loss for report in last) < sum(report.loss for report in first)
    assert sum(report.top1 for report in first) < 0.5 < sum(report.top1 for report in last), "of eight"
    assert learning.tokens == sum(report.tokens for report in reports)
    assert list(learning.reports) == reports[-len(learning.reports) :] and len(learning.reports) > 8


def test_a_step_has_the_rows_that_its_size_allows():
    learning = learner(most_rows=70)
    for _ in range(20):
        before = learning.tokens
        learning.micro_step()
        assert 0 < learning.tokens - before <= 70


def test_without_segments_or_policy_there_is_nothing_to_do():
    empty = SpotLearner(CONFIG, weights(), LearnerSettings())
    assert empty.begin() is False and empty.propose_hot() is None and empty.held_out() == []
    assert empty.micro_step() is None
    empty.follow(POLICY.version, POLICY.embed, POLICY.head)
    assert empty.begin() and empty.micro_step() is None
    assert empty.tokens == 0 and empty.policy_version == 0


def test_segments_that_come_later_are_in_the_next_pack():
    learning = learner(count=1, held_out=0.0)
    learning.micro_step()
    few = learning.reports[-1].tokens
    learning.add(SEGMENTS[1:3])
    learning.micro_step()
    assert learning.reports[-1].tokens > few


def test_it_trains_against_the_newest_policy():
    one, other = learner(), learner()
    other.follow(1, POLICY.embed * 2, POLICY.head * 2)
    assert other.begin() and other.policy_version == 1
    assert losses(one, 1) != losses(other, 1)


# --- its state --------------------------------------------------------------------------------------------------------


def test_a_state_goes_out_and_comes_in_and_training_goes_on_as_if_nothing_had_been():
    straight, moved = learner(), learner(seed=5)
    losses(straight, 10)
    losses(moved, 3)
    moved.load(straight.state(), None)
    assert moved.tokens == 0 and same(moved.state(), straight.state())
    assert moved.state()["steps"] == 10


@pytest.mark.parametrize("released", [False, True])
def test_released_or_not_nothing_that_was_learnt_is_lost(released):
    straight, interrupted = learner(), learner()
    before = losses(straight, 6)
    assert losses(interrupted, 6) == before
    if released:
        interrupted.release()
        interrupted.release()
    assert same(interrupted.state(), straight.state()), "also while the device is another's"
    assert interrupted.begin()
    assert losses(interrupted, 6) == losses(straight, 6)
    assert interrupted.tokens == straight.tokens


def test_a_released_learner_loads_a_master():
    trained, released = learner(), learner()
    losses(trained, 4)
    released.release()
    released.load(trained.state(), torch.tensor([1, 2, 3]))
    assert same(released.state(), trained.state()) and released.hot.tolist() == [1, 2, 3]


def test_what_was_handed_out_is_a_copy():
    learning = learner()
    losses(learning, 3)
    state, serving = learning.state(), learning.weights(torch.bfloat16)
    kept = {"state": [t.clone() for t in state["drafter"].values()], "serving": [t.clone() for t in serving.values()]}
    losses(learning, 3)
    assert same(list(state["drafter"].values()), kept["state"]) and state["steps"] == 3
    assert same(list(serving.values()), kept["serving"])
    assert {tensor.dtype for tensor in serving.values()} == {torch.bfloat16}
    assert serving.keys() == state["drafter"].keys()


def test_a_master_that_nobody_has_trained_has_no_moments():
    fresh, used = learner(seed=1), learner(seed=2)
    losses(used, 5)
    used.load({"drafter": weights()}, None)
    assert same(used.state()["drafter"], fresh.state()["drafter"])
    assert used.state()["optimizer"]["state"] == {}
    assert used.tokens == 0


def test_a_master_that_nobody_has_trained_has_no_steps():
    """Else a copy that begins anew, without moments, begins behind the warm-up, and its steps are counted twice."""
    used = learner()
    losses(used, 5)
    used.load({"drafter": weights()}, None)
    assert used.state()["steps"] == 0


@pytest.mark.parametrize(
    "change", [lambda w: {}, lambda w: {"fc.weight": w["fc.weight"]}, lambda w: w | {"x": w["fc.bias"]}]
)
def test_a_state_of_another_drafter_is_an_error(change):
    with pytest.raises((KeyError, RuntimeError, ValueError)):
        learner().load({"drafter": change(weights())}, None)


def test_a_step_that_diverges_leaves_what_was_learnt():
    learning = learner(count=2, held_out=0.0)
    losses(learning, 2)
    before, tokens = learning.state(), learning.tokens
    learning.add([poisoned(SEGMENTS[5])])
    with pytest.raises(DrafterDiverged):
        losses(learning, 10)
    assert learning.state()["steps"] >= 2 and learning.tokens >= tokens
    assert all(bool(torch.isfinite(tensor).all()) for tensor in learning.state()["drafter"].values())
    learning.load(before, None)
    assert same(learning.state(), before)


def poisoned(segment: Segment) -> Segment:
    hidden = segment.hidden.clone()
    hidden[len(hidden) // 2] = float("nan")
    return replace(segment, request_id="poisoned", prompt_id=9999, hidden=hidden)


# --- the hot vocabulary -----------------------------------------------------------------------------------------------


def test_a_hot_vocabulary_is_proposed_once_enough_is_known():
    few, enough = learner(count=2, hot_size=16), learner(hot_size=16, always_hot=(0, 63))
    assert few.propose_hot() is None, "two responses have too few tokens"
    hot = enough.propose_hot()
    assert hot.dtype == torch.int64 and len(hot) == 16 and {0, 63} <= set(hot.tolist())
    counts = enough.buffer.token_counts(V)
    assert counts.sum() >= 1000
    chosen = set(hot.tolist()) - {0, 63}
    assert min(counts[token] for token in chosen) >= max(counts[t] for t in range(V) if t not in hot.tolist())


def test_its_size_is_what_the_rollouts_need_where_none_is_given():
    assert learner().propose_hot().tolist() == list(range(V)), "a vocabulary of 64 is all hot"


def test_none_is_proposed_where_none_is_wanted_or_the_vocabulary_is_not_known():
    assert learner(hot_size=0).propose_hot() is None
    blind = SpotLearner(CONFIG, weights(), LearnerSettings(hot_size=16))
    blind.add(SEGMENTS)
    assert blind.propose_hot() is None


def test_the_loss_is_over_the_hot_vocabulary_from_the_next_beginning():
    whole, hot = learner(), learner()
    hot.load({"drafter": weights()}, torch.arange(24))
    assert hot.begin()
    assert whole.micro_step().ce != hot.micro_step().ce


# --- what it is judged on ---------------------------------------------------------------------------------------------


def segment_of(version: int, prompt_id: int, T: int, prompt_len: int = 2) -> Segment:
    generator = torch.Generator().manual_seed(prompt_id)
    tokens = torch.randint(0, V, (T,), generator=generator, dtype=torch.int32)
    hidden = torch.randn(T, H, generator=generator).bfloat16()
    return Segment(
        version, f"{version}-{prompt_id}", prompt_id, 0, prompt_len, True, tokens, hidden, torch.zeros(T).half()
    )


def ids(of: SpotLearner, held_out: bool, count: int) -> list[int]:
    """The first prompts that are held out, or not."""
    found = (number for number in range(10_000) if of.buffer.is_held_out(number) is held_out)
    return [next(found) for _ in range(count)]


@pytest.mark.parametrize("T", [PIECE, PIECE + 1, PIECE + 2, 3 * PIECE, 1000])
def test_no_piece_is_longer_than_a_step_may_take(T):
    learning = SpotLearner(CONFIG, weights(), LearnerSettings(gate_tokens=10_000))
    [prompt] = ids(learning, True, 1)
    whole = segment_of(0, prompt, T, prompt_len=200 if T == 1000 else 2)
    learning.add([whole])
    pieces = learning.held_out()
    assert max(len(piece.tokens) for piece in pieces) <= PIECE
    joined = torch.cat([piece.tokens for piece in pieces])
    assert torch.equal(joined, whole.tokens[: len(joined)].long()) and T - len(joined) <= 2
    assert torch.equal(torch.cat([piece.features for piece in pieces]), whole.hidden[: len(joined)])
    wanted = sum(len(piece.tokens) - min(piece.prompt_len, len(piece.tokens)) for piece in pieces)
    assert wanted == len(joined) - whole.prompt_len, "every piece knows what of it is prompt"


@pytest.mark.parametrize("gate_tokens", [1, 500, 2000])
def test_a_judgement_takes_no_more_than_it_may_and_the_piece_that_fills_it(gate_tokens):
    learning = SpotLearner(CONFIG, weights(), LearnerSettings(gate_tokens=gate_tokens))
    learning.add([segment_of(0, prompt, 300) for prompt in ids(learning, True, 20)])
    total = sum(len(piece.tokens) for piece in learning.held_out())
    assert gate_tokens <= total < gate_tokens + PIECE


def test_the_newest_policys_are_judged_first_and_those_before_until_there_are_enough():
    learning = SpotLearner(CONFIG, weights(), LearnerSettings(gate_tokens=80))
    held, other = ids(learning, True, 3), ids(learning, False, 3)

    def lengths() -> list[int]:
        return [len(piece.tokens) for piece in learning.held_out()]

    learning.add([segment_of(3, held[0], 40), segment_of(3, other[0], 20)])
    assert lengths() == [40]
    learning.add([segment_of(4, prompt, 20) for prompt in other])
    assert lengths() == [40], "version 4 has sampled none yet"
    learning.add([segment_of(4, held[1], 30)])
    assert lengths() == [30, 40]
    learning.add([segment_of(6, prompt, 20) for prompt in other])
    assert lengths() == [30, 40], "the buffer has dropped them, and few prompts a step are held out"
    learning.add([segment_of(7, held[2], 60)])
    assert lengths() == [60, 30], "as much as a judgement takes, the newest first"
    learning.add([segment_of(8, held[0], 70), segment_of(8, held[1], 20)])
    assert lengths() == [70, 20]
    learning.add([segment_of(16, other[0], 20)])
    assert lengths() == [], "eight policies later they say nothing about this one"


def test_what_is_held_out_is_not_learnt_from():
    learning = SpotLearner(CONFIG, weights(), LearnerSettings(step_s=100.0))
    learning.add([segment_of(0, prompt, 40) for prompt in ids(learning, True, 3)])
    learning.follow(0, POLICY.embed, POLICY.head)
    assert learning.begin() and learning.micro_step() is None
    assert learning.held_out()


def test_a_judgement_is_over_the_held_out_samples_and_counted_at_its_end():
    learning = learner(held_out=0.3, least=1.0)
    candidate = learning.weights(torch.bfloat16)
    judging = learning.judging(candidate, None)
    steps = 0
    while True:
        try:
            next(judging)
            steps += 1
            assert (learning.gate.published, learning.gate.rejected) == (0, 0)
        except StopIteration as end:
            verdict = end.value
            break
    assert steps == len(learning.held_out()) > 1
    assert verdict.published and verdict.candidate_accept_len >= 1 and learning.gate.published == 1


# --- for the worker's tests -------------------------------------------------------------------------------------------


class NotedLinks(LocalLinks):
    """Links that note the calls, are down where they are told to be, and in which something may happen meanwhile."""

    def __init__(self, coordination: Coordination) -> None:
        super().__init__(coordination, POLICY)
        self.calls: list[tuple[Any, ...]] = []
        self.down: set[str] = set()
        self.during: dict[str, Callable[[], None]] = {}
        self.now = POLICY

    def _call(self, name: str, *what: Any) -> None:
        self.calls.append((name, *what))
        self.during.get(name, lambda: None)()
        if name in self.down:
            raise LinkError(f"{name}: nobody answers")

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    def policy(self) -> Policy:
        self._call("policy")
        return self.now

    def fetch(self, version: int, serving_version: int) -> Master:
        self._call("fetch", version, serving_version)
        return super().fetch(version, serving_version)

    def choose_hot(self, hot: torch.Tensor) -> torch.Tensor:
        self._call("choose_hot")
        return super().choose_hot(hot)

    def submit(self, base: int, state: Any, tokens: int, report: Any) -> int:
        self._call("submit", base, tokens)
        return super().submit(base, state, tokens, report)

    def publish(self, weights: Any, hot: Any, accept_len: float) -> Published:
        self._call("publish", accept_len)
        return super().publish(weights, hot, accept_len)


class NotedLearner(SpotLearner):
    """A learner in whose steps something may happen."""

    during: Callable[[], None] = staticmethod(lambda: None)
    loaded: Any = None

    def micro_step(self) -> Any:
        self.during()
        return super().micro_step()

    def load(self, master: Any, hot: torch.Tensor | None) -> None:
        super().load(master, hot)
        self.loaded = self.state()["drafter"]

"""The master of the drafter: what a merge makes of it, what is refused, what serves, and what outlives a death.

States are those of real trainers; where a mean must be exact, their tensors are replaced by drawn ones of equal shape.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sampled_target import one_thread
from small_trainer import CONFIG, H, V, sample, trainer

from tlt_verl.drafter.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint
from tlt_verl.drafter.eagle import DrafterError
from tlt_verl.spot.coordination import HISTORY, Coordination, SubmissionRefused
from tlt_verl.spot.links import Master

HOT = torch.tensor([0, 5, 17, 95])


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with one_thread():
        yield


def start(trained: bool = False, **changes: Any) -> Checkpoint:
    training = trainer()
    if trained:
        training.step([sample(0)])
    weights = dict(sorted(training.weights(torch.bfloat16).items()))  # as a file has them: not in the optimizer's order
    state = training.state_dict() if trained else None
    fields = {"folder": Path("start"), "config": CONFIG, "weights": weights, "trainer_state": state}
    return Checkpoint(**fields | {"hot": None, "version": 0} | changes)


def drawn(seed: int, steps: int = 3) -> dict[str, Any]:
    """A trainer's state whose tensors are random: nothing in it is another's by chance."""
    training = trainer(seed)
    training.step([sample(seed)])
    state = training.state_dict()
    generator = torch.Generator().manual_seed(seed)
    state["drafter"] = {name: torch.randn(t.shape, generator=generator) for name, t in state["drafter"].items()}
    for entries in state["optimizer"]["state"].values():
        entries["step"] = torch.tensor(float(steps))
        for moment in ("exp_avg", "exp_avg_sq"):
            entries[moment] = torch.rand(entries[moment].shape, generator=generator)
    return state | {"steps": steps}


def averaged(state: dict[str, Any]) -> list[torch.Tensor]:
    """All that a mean is taken of, in one order."""
    moments = [e[key] for e in state["optimizer"]["state"].values() for key in ("exp_avg", "exp_avg_sq")]
    return [*(state["drafter"][name] for name in sorted(state["drafter"])), *moments]


def assert_mean(found: dict[str, Any], copies: list[tuple[dict, int]]) -> None:
    """Token by token, in float64. 1e-6 is some ten roundings of float32 at the size of these numbers."""
    total = sum(tokens for _, tokens in copies)
    parts = [[tensor.double() * tokens / total for tensor in averaged(state)] for state, tokens in copies]
    for tensor, *wanted in zip(averaged(found), *parts, strict=True):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), sum(wanted), rtol=0, atol=1e-6)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_copies_of_one_version_end_as_their_mean_in_any_order(order):
    copies = [(drawn(1), 100), (drawn(2), 700), (drawn(3), 1)]
    coordination = Coordination(start(trained=order[0] > 0))  # the start has no share in it, whatever it was
    for number, index in enumerate(order):
        merge = coordination.merge(0, *copies[index])
        merged = [copies[i] for i in order[: number + 1]]
        assert merge.version == coordination.version == number + 1
        assert merge.share == pytest.approx(copies[index][1] / sum(tokens for _, tokens in merged))
        assert_mean(coordination.state(), merged)
    assert coordination.tokens == 801


def test_one_worker_alone_is_the_master():
    coordination = Coordination(start(trained=True))
    for version, seed in enumerate((1, 2, 3)):
        state = drawn(seed)
        assert coordination.merge(version, state, 10).share == 1
        assert same(coordination.state(), state)


def test_a_late_copy_has_the_share_of_its_tokens_among_all_since_its_base():
    coordination = Coordination(start())
    coordination.merge(0, drawn(9), 5000)  # before the late one's base: no part of C
    coordination.merge(1, drawn(1), 100)
    coordination.merge(2, drawn(2), 200)  # replaces drawn(1), and carries its tokens
    assert coordination.merge(1, drawn(3), 100).share == pytest.approx(100 / 400)
    assert_mean(coordination.state(), [(drawn(2), 300), (drawn(3), 100)])


def test_a_base_behind_the_history_counts_what_is_kept():
    coordination = Coordination(start())
    for version in range(HISTORY + 6):
        coordination.merge(version, drawn(version % 2), 10)
    assert coordination.merge(3, drawn(5), 10).share == pytest.approx(10 / (10 * HISTORY + 10))
    assert coordination.merge(HISTORY + 6, drawn(5), 10).share == pytest.approx(0.5)


def test_steps_are_the_larger_and_the_noise_is_the_newcomers():
    coordination = Coordination(start())
    coordination.merge(0, drawn(1, steps=9), 10)
    newcomer = drawn(2, steps=4)
    newcomer["optimizer"]["param_groups"][0]["lr"] = 0.5
    coordination.merge(0, newcomer, 10)
    state = coordination.state()
    assert state["steps"] == 9
    assert {float(entries["step"]) for entries in state["optimizer"]["state"].values()} == {9}
    assert torch.equal(state["noise"], newcomer["noise"])
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.5


def test_a_trainer_goes_on_from_the_mean():
    coordination = Coordination(start())
    for seed in (1, 2):
        training = trainer(seed)
        training.step([sample(seed)])
        coordination.merge(0, training.state_dict(), 20)
    training = trainer(3)
    training.load_state_dict(coordination.state())
    training.step([sample(3)])
    assert training.steps == 2
    coordination.merge(2, training.state_dict(copies=False), 20)


def test_a_state_that_was_given_away_does_not_change():
    coordination = Coordination(start())
    coordination.merge(0, drawn(1), 10)
    given, saved = coordination.state(), coordination.checkpoint()
    coordination.merge(0, drawn(2), 10)
    assert same(given, drawn(1)) and same(saved.trainer_state, given)
    assert not same(coordination.state(), given)


def test_a_copy_is_neither_kept_nor_written_to():
    """What Ray hands over may be read-only memory that goes when the call ends."""
    coordination, copies = Coordination(start()), [drawn(1), drawn(2)]
    for state in copies:
        coordination.merge(0, state, 10)
    assert same(copies, [drawn(1), drawn(2)])
    for state in copies:
        for tensor in (*averaged(state), state["noise"], *(e["step"] for e in state["optimizer"]["state"].values())):
            tensor.fill_(77)
    found = coordination.state()
    assert_mean(found, [(drawn(1), 10), (drawn(2), 10)])
    assert torch.equal(found["noise"], drawn(2)["noise"])
    assert {float(entries["step"]) for entries in found["optimizer"]["state"].values()} == {3}


def spoilt(name: str, key: str, number: float) -> dict[str, Any]:
    """A state with one number changed: of a drafter's tensor, or of what the optimizer has of a parameter."""
    state = drawn(2)
    entries = state["drafter"] if name == "drafter" else state["optimizer"]["state"][3]
    entries[key].view(-1)[-1] = number
    return state


def reshaped(name: str, key: str, value: Any) -> dict[str, Any]:
    """A state in which something has another value; None takes it away."""
    state = drawn(2)
    entries = {"drafter": state["drafter"], "state": state, "moments": state["optimizer"]["state"][3]}[name]
    entries.pop(key, None)
    return state if value is None else (entries.update({key: value}), state)[1]


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "fc.weight holds NaN": ("nan", {"state": lambda: spoilt("drafter", "fc.weight", NAN)}),
    "fc.bias holds infinity": ("nan", {"state": lambda: spoilt("drafter", "fc.bias", INF)}),
    "exp_avg of .* is not finite": ("nan", {"state": lambda: spoilt("moments", "exp_avg", NAN)}),
    "exp_avg_sq of .* is not finite": ("nan", {"state": lambda: spoilt("moments", "exp_avg_sq", -INF)}),
    "step of .* is not finite": ("nan", {"state": lambda: spoilt("moments", "step", NAN)}),
    "loss is nan": ("nan", {"report": {"ce": 1.0, "loss": NAN}}),
    r"fc.bias has the shape \(33,\)": ("shape", {"state": lambda: reshaped("drafter", "fc.bias", torch.zeros(33))}),
    "lack fc.bias": ("shape", {"state": lambda: reshaped("drafter", "fc.bias", None)}),
    "hold lm_head": ("shape", {"state": lambda: reshaped("drafter", "lm_head.weight", torch.zeros(V, H))}),
    "torch.int64": ("shape", {"state": lambda: reshaped("drafter", "fc.bias", torch.zeros(H).long())}),
    r"exp_avg of .* shape \(5,\)": ("shape", {"state": lambda: reshaped("moments", "exp_avg", torch.zeros(5))}),
    "which is not AdamW's": ("shape", {"state": lambda: reshaped("moments", "step", None)}),
    "no state for each": ("shape", {"state": lambda: reshaped("state", "optimizer", {"state": {}})}),
    "not the entries": ("shape", {"state": lambda: reshaped("state", "noise", None)}),
    "no generator's state": ("shape", {"state": lambda: reshaped("state", "noise", torch.zeros(4))}),
    " 0 tokens; takes 1 or more": ("tokens", {"tokens": 0}),
    "-5 tokens; takes 1 or more": ("tokens", {"tokens": -5}),
    "of version -1; takes 0 to 1": ("base", {"base": -1}),
    "of version 2; takes 0 to 1": ("base", {"base": 2}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_copy_is_refused_and_the_master_is_as_it_was(message):
    kind, wrong = REFUSED[message]
    coordination = Coordination(start())
    coordination.merge(0, drawn(1), 10, {"loss": 1.5})
    before = copy.deepcopy(coordination.checkpoint())
    submission = {"base": 0, "state": lambda: drawn(2), "tokens": 10, "report": {"loss": 0.5}} | wrong
    with pytest.raises(SubmissionRefused, match=message) as refusal:
        coordination.merge(**submission | {"state": submission["state"]()})
    assert refusal.value.kind == kind
    assert coordination.refused == {kind: 1}
    coordination.refused.clear()
    assert same(vars(coordination.checkpoint()), vars(before))
    assert coordination.merge(0, drawn(2), 10).share == 0.5  # and goes on


def test_a_worker_is_given_what_it_lacks():
    coordination = Coordination(start(), serves=False)
    first = Master(**coordination.fetch(-1, 0))
    assert first.version == 0 and first.state is not None and first.state.keys() == {"drafter"}
    assert {t.dtype for t in first.state["drafter"].values()} == {torch.float32}
    assert first.hot is None and first.serving_version == 0 and first.serving is None
    coordination.merge(0, drawn(1), 10)
    coordination.choose_hot(HOT)
    assert Master(**coordination.fetch(1, 0)).state is None
    second = Master(**coordination.fetch(0, 0))
    assert same(second.state, drawn(1)) and torch.equal(second.hot, HOT)


def test_a_trained_start_serves_and_lends_its_optimizer():
    given = start(trained=True, version=4, info={"accept_len": 2.5})
    coordination = Coordination(given)
    master = Master(**coordination.fetch(-1, 0))
    assert same(master.state, given.trainer_state)
    assert master.serving_version == 4 and same(master.serving, given.weights)
    assert Master(**coordination.fetch(-1, 4)).serving is None
    assert coordination.serving_accept_len == 2.5 and not coordination.to_send
    assert Coordination(start()).serving_version == 1  # 0 would say that nothing serves


def test_a_start_with_another_drafters_state_is_an_error():
    state = reshaped("drafter", "fc.bias", torch.zeros(3))
    with pytest.raises(DrafterError, match="trainer's state in start is not its drafter's"):
        Coordination(start(trainer_state=state))


def test_the_first_hot_vocabulary_is_everybodys():
    coordination = Coordination(start())
    assert coordination.choose_hot(None) is None
    proposed = HOT.clone()
    assert torch.equal(coordination.choose_hot(proposed), HOT)
    proposed.zero_()
    assert torch.equal(coordination.choose_hot(torch.tensor([1, 2])), HOT)
    assert torch.equal(coordination.choose_hot(None), HOT)
    assert torch.equal(Coordination(start(hot=torch.tensor([3]))).choose_hot(HOT), torch.tensor([3]))


@pytest.mark.parametrize("hot", [[1, 1], [5, 3], [-1, 3], [3, 96], [1.0], [], [[1, 2]]])
def test_what_is_no_hot_vocabulary_is_an_error(hot):
    coordination = Coordination(start())
    hot = torch.tensor(hot) if hot else torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"takes (each token once, ascending, from 0 to 95|int64 \[Vh\])"):
        coordination.choose_hot(hot)
    assert coordination.hot is None


def test_serving_versions_count_up_and_are_never_given_twice():
    coordination = Coordination(start(), serves=False)
    assert [coordination.next_serving(), coordination.next_serving()] == [1, 2]  # all engines rejected the first
    assert coordination.serving is None and not coordination.to_send
    weights = trainer().weights(torch.bfloat16)
    kept = copy.deepcopy(weights)
    coordination.published(weights, 2, 2.75)
    weights["fc.bias"].zero_()
    assert same(coordination.serving, kept) and coordination.to_send
    assert (coordination.serving_version, coordination.serving_accept_len) == (2, 2.75)
    for version in (2, 3):
        with pytest.raises(ValueError, match=f"version: got {version}"):
            coordination.published(weights, version, None)
    assert coordination.next_serving() == 3


def written(coordination: Coordination, folder: Path) -> Coordination:
    saved = coordination.checkpoint()
    with CheckpointWriter(folder) as writer:
        writer.save(saved.config, saved.weights, saved.trainer_state, version=7, info=saved.info, hot=saved.hot)
    return Coordination.from_checkpoint(load_checkpoint(folder / "v7"))


def test_a_checkpoint_continues_bit_for_bit(tmp_path):
    coordination = Coordination(start(), serves=False)
    coordination.merge(0, drawn(1), 100, {"loss": 2.0, "ce": 1 / 3, "accept": 0.4})
    coordination.merge(0, drawn(2), 50)
    coordination.choose_hot(HOT)
    coordination.next_serving()
    coordination.published(trainer().weights(torch.bfloat16), coordination.next_serving(), 2.125)
    with pytest.raises(SubmissionRefused):
        coordination.merge(0, drawn(1), 0)
    restored = written(coordination, tmp_path)
    assert same(vars(restored.checkpoint()), vars(coordination.checkpoint()))
    assert restored.metrics() == coordination.metrics()
    for each in (restored, coordination):
        assert each.merge(1, drawn(3), 50).share == 0.5
        assert each.next_serving() == 3
    assert same(restored.state(), coordination.state())
    training, other = trainer(), trainer(5)
    training.load_state_dict(restored.state())
    other.load_state_dict(coordination.state())
    assert training.step([sample(4)]).loss == other.step([sample(4)]).loss


def test_an_untrained_master_continues_too_and_other_checkpoints_do_not(tmp_path):
    coordination = Coordination(start(), serves=False)
    restored = written(coordination, tmp_path)
    assert not restored.trained and restored.serving is None and restored.version == 0
    assert same(restored.state(), coordination.state())
    with pytest.raises(DrafterError, match="was not written by spot training"):
        Coordination.from_checkpoint(start(trained=True))


def died(told: bool, tmp_path: Path) -> tuple[Coordination, Coordination]:
    """One that merged two copies after its last checkpoint, and its successor."""
    coordination = Coordination(start(), serves=False)
    coordination.merge(0, drawn(1), 100)
    restored = written(coordination, tmp_path)
    coordination.merge(1, drawn(2), 200)
    coordination.merge(2, drawn(3), 400)
    coordination.next_serving()
    restored.recover(coordination.told() if told else {})
    return coordination, restored


def test_numbers_do_not_go_back_when_the_coordinator_dies(tmp_path):
    before, after = died(True, tmp_path)
    assert (after.version, after.tokens) == (before.version, before.tokens) == (3, 700)
    assert after.next_serving() == 2
    assert same(after.state(), drawn(1))
    assert Master(**after.fetch(3, 0)).state is None  # who has what was lost goes on with it
    assert after.merge(0, drawn(5), 100).share == 0.5  # what was not lost is as ever
    assert after.recovered == 0


@pytest.mark.parametrize(("told", "base", "version"), [(True, 3, 4), (True, 2, 4), (False, 3, 4), (False, 2, 3)])
def test_a_copy_of_a_lost_version_becomes_the_master(told, base, version, tmp_path):
    _, after = died(told, tmp_path)
    if not told:
        master = Master(**after.fetch(base, 0))
        assert (master.version, master.state) == (base, None)  # goes on with its own
    merge = after.merge(base, drawn(5), 50)
    assert (merge.version, merge.share) == (version, 1)
    assert same(after.state(), drawn(5))
    assert after.metrics()["tlt/spot/recovered"] == 1
    assert after.merge(base, drawn(6), 150).share == 0.75  # another of the lost line is averaged with it
    assert after.merge(version + 1, drawn(7), 1).share == 1  # and from here all is as ever
    assert not after.refused


def test_metrics_are_the_counters_and_the_last_report():
    coordination = Coordination(start())
    names = ("tlt/drafter/tokens", "tlt/spot/merged", "tlt/spot/refused", "tlt/spot/recovered")
    assert coordination.metrics() == dict.fromkeys(names, 0)
    coordination.merge(0, drawn(1), 10, {"loss": 3.0, "ce": 2.0, "accept": 0.1})
    coordination.merge(1, drawn(2), 30, {"loss": 2.5, "ce": 1.5, "accept": 0.2})
    with pytest.raises(SubmissionRefused):
        coordination.merge(0, drawn(1), 0)
    losses = {"tlt/drafter/loss": 2.5, "tlt/drafter/ce": 1.5}
    assert coordination.metrics() == dict(zip(names, (40, 2, 1, 0), strict=True)) | losses
    assert coordination.report["accept"] == 0.2

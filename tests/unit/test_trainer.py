"""The trainer's steps: they teach, they resume, they warm up and clip, and a bad one is not applied."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from random_weights import spread_weights
from tiny_targets import make_target

from tlt_verl.drafter.eagle import drafter_config, tensor_shapes
from tlt_verl.drafter.loss import eagle_loss
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample, pack
from tlt_verl.drafter.trainer import DrafterDiverged, DrafterTrainer, SharedTensors, TrainerSettings

EXACT = {"dtype": "float32", "noise": 0.0}
PROMPT = 6


@cache
def target():
    """A tiny Llama that is nearly sure of its next token, as a trained model is."""
    model = make_target("llama")
    torch.manual_seed(0)
    spread_weights(model, 0.3)
    with torch.no_grad():
        model.lm_head.weight.mul_(80)
    return model


@cache
@torch.no_grad()
def segment(T: int = 60, seed: int = 0) -> Sample:
    """A prompt and a response that the target sampled at temperature 1, with its features."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 96, (1, PROMPT), generator=generator)
    while ids.shape[1] < T:
        probabilities = target()(ids).logits[0, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)[None]], dim=1)
    return Sample(ids[0], target().model(ids).last_hidden_state[0].bfloat16(), PROMPT)


def config() -> dict:
    return drafter_config(target().config.to_dict() | {"architectures": ["LlamaForCausalLM"]})


def shared(hot: torch.Tensor | None = None) -> SharedTensors:
    return SharedTensors(target().model.embed_tokens.weight, target().lm_head.weight, hot)


def trainer(seed: int = 0, hot: torch.Tensor | None = None, **settings) -> DrafterTrainer:
    torch.manual_seed(0)  # of the drafter's random start
    drafter = EagleDrafter(config())
    return DrafterTrainer(drafter, shared(hot), TrainerSettings(**settings), seed=seed)


def same(one: DrafterTrainer, other: DrafterTrainer) -> bool:
    pairs = zip(one.drafter.parameters(), other.drafter.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --- it learns ------------------------------------------------------------------------------------------------------


def accept_rates(lr_scale: float, **settings) -> list[float]:
    """Before each of 100 steps on one segment; the last 30 settle at a tenth of the learning rate."""
    training = trainer(noise=0.0, lr=5e-3, warmup_steps=10, **settings)
    return [training.step([segment()], lr_scale * (1.0 if step < 70 else 0.1)).accept for step in range(100)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_segment_is_learnt_by_heart(dtype):
    batch = pack([segment()])
    best = (batch.wanted.float() @ shared().head.T).softmax(-1).max(-1).values[batch.mask].mean()
    assert best > 0.97  # the target is sure enough for the drafter to be
    rates = accept_rates(1.0, dtype=dtype)
    assert rates[0] < 0.2
    assert rates[-1] > 0.95


def test_a_trainer_that_does_not_move_learns_nothing():
    assert max(accept_rates(0.0)) < 0.2


# --- one step -------------------------------------------------------------------------------------------------------


def test_the_report_is_the_loss_of_the_pack_before_the_step():
    training = trainer(**EXACT, feature_weight=0.6, ce_weight=0.2)
    batch = pack([segment(), segment(20, 1)])
    embeddings = shared().embed.detach()[batch.embedding_tokens]
    predicted = training.drafter(embeddings, batch.features, batch.lengths)
    losses = eagle_loss(predicted, batch.wanted, shared().head, batch.mask, feature_weight=0.6, ce_weight=0.2)
    losses.loss.backward()
    norm = torch.cat([p.grad.flatten() for p in training.drafter.parameters()]).norm().item()
    report = training.step([segment(), segment(20, 1)])
    for name in ("loss", "feature", "ce", "accept", "top1"):
        assert getattr(report, name) == pytest.approx(getattr(losses, name).item(), rel=1e-5), name
    assert report.grad_norm == pytest.approx(norm, rel=1e-4)
    assert report.tokens == (60 - 1 - 4) + (20 - 1 - 4)  # the first rows draft tokens 2 to 5, of the prompt
    assert 0 < report.seconds < 60


def test_the_noise_is_on_the_input_and_the_seeds():
    quiet, one, two, other = trainer(**EXACT), *(trainer(seed, dtype="float32", noise=0.5) for seed in (0, 0, 1))
    losses = [each.step([segment()]).loss for each in (quiet, one, two, other)]
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


def first_moment(training: DrafterTrainer) -> torch.Tensor:
    return torch.cat([s["exp_avg"].flatten() for s in training.state_dict()["optimizer"]["state"].values()])


def test_a_large_gradient_is_clipped_and_a_small_one_is_not():
    clipped = trainer(**EXACT, clip=1e-3)
    report = clipped.step([segment()])
    assert report.grad_norm > 1e-2
    assert first_moment(clipped).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta1) g
    free = trainer(**EXACT, clip=1e6)
    report = free.step([segment()])
    assert first_moment(free).norm().item() == pytest.approx(0.1 * report.grad_norm, rel=1e-3)


def test_the_learning_rate_warms_up_and_is_scaled():
    training = trainer(**EXACT, lr=1e-3, warmup_steps=4)
    rates, largest = [], []
    for scale in (1.0, 1.0, 1.0, 1.0, 1.0, 0.25):
        before = training.weights(torch.float32)
        training.step([segment()], lr_scale=scale)
        rates.append(training.state_dict()["optimizer"]["param_groups"][0]["lr"])
        after = training.weights(torch.float32)
        largest.append(max((after[name] - before[name]).abs().max().item() for name in before))
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 0.25e-3])
    assert largest[0] == pytest.approx(0.25e-3, rel=1e-2)  # AdamW's first step is the learning rate
    assert trainer(**EXACT, warmup_steps=0).step([segment()]).tokens


def test_weights_are_copies_with_the_names_of_the_file():
    training = trainer(**EXACT)
    weights = training.weights(torch.bfloat16)
    shapes = tensor_shapes(config())
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    kept = training.weights(torch.float32)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    training.step([segment()])
    assert all(torch.equal(kept[name], before[name]) for name in kept)
    assert not all(torch.equal(kept[name], tensor) for name, tensor in training.weights(torch.float32).items())


# --- the target's tensors -------------------------------------------------------------------------------------------


def test_the_loss_is_over_the_hot_vocabulary():
    hot = torch.tensor([3, 5, 8, 13, 21, 34, 55, 89])
    few = SharedTensors(shared().embed, torch.cat([shared().head[hot], torch.zeros(88, 32)]), torch.arange(8))
    one, other = trainer(**EXACT, hot=hot), trainer(**EXACT)
    other.follow(few)
    assert one.step([segment()]).ce == other.step([segment()]).ce
    assert same(one, other)
    assert trainer(**EXACT).step([segment()]).ce != trainer(**EXACT, hot=hot).step([segment()]).ce


def test_it_follows_the_policy():
    moved = SharedTensors(shared().embed.detach() * 1.5, shared().head.detach() + 1, torch.arange(0, 96, 2))
    one, other = trainer(**EXACT), trainer(**EXACT)
    for training in (one, other):
        training.step([segment()])
    one.follow(moved)
    assert one.shared is moved
    assert one.step([segment()]).loss != other.step([segment()]).loss
    assert one.steps == other.steps == 2


def test_the_targets_tensors_are_left_alone():
    before = [shared().embed.detach().clone(), shared().head.detach().clone()]
    training = trainer()
    training.step([segment()])
    assert torch.equal(shared().embed, before[0]) and torch.equal(shared().head, before[1])
    assert shared().embed.grad is None and shared().head.grad is None


@pytest.mark.parametrize(
    ("embed", "head", "hot", "message"),
    [
        (torch.zeros(9, 4), torch.zeros(8, 4), None, r"embed and head: got \[9, 4\] and \[8, 4\]"),
        (torch.zeros(9, 4), torch.zeros(9, 4), torch.tensor([1.0]), "hot: got torch.float32"),
        (torch.zeros(9, 4), torch.zeros(9, 4), torch.tensor([3, 9]), "hot: got tokens up to 9, takes 0 to 8"),
    ],
)
def test_tensors_that_do_not_fit_together_are_an_error(embed, head, hot, message):
    with pytest.raises(ValueError, match=message):
        SharedTensors(embed, head, hot)


def test_a_target_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="got hidden size 4, takes the drafter's, 32"):
        trainer().follow(SharedTensors(torch.zeros(9, 4), torch.zeros(9, 4)))


# --- resume, and divergence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_resumes_bit_for_bit(dtype):
    packs = [[segment(), segment(20, 1)], [segment(20, 1)], [segment(20, 2)]] * 2
    straight = trainer(dtype=dtype, warmup_steps=5)
    for members in packs[:3]:
        straight.step(members)
    state = straight.state_dict()
    wanted = [straight.step(members) for members in packs[3:]]

    resumed = trainer(seed=9, dtype=dtype, warmup_steps=5)
    resumed.step(packs[0])
    resumed.load_state_dict(state)
    assert resumed.steps == 3
    found = [resumed.step(members) for members in packs[3:]]
    assert [(r.loss, r.grad_norm) for r in found] == [(r.loss, r.grad_norm) for r in wanted]
    assert same(straight, resumed)
    again = trainer(dtype=dtype, warmup_steps=5)
    again.load_state_dict(state)  # the steps since did not reach into it
    assert again.step(packs[3]).loss == wanted[0].loss


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_not_applied(bad):
    training, control = trainer(dtype="float32"), trainer(dtype="float32")
    for each in (training, control):
        each.step([segment()])
    features = segment().features.clone()
    features[20] = float(bad)
    with pytest.raises(DrafterDiverged, match=r"step 2: loss is (nan|inf)"):
        training.step([Sample(segment().tokens, features, PROMPT)])
    assert same(training, control) and training.steps == 1
    assert torch.equal(first_moment(training), first_moment(control))
    assert training.step([segment()]).loss < float("inf")


def test_a_gradient_that_is_not_finite_is_not_applied():
    training, control = trainer(**EXACT), trainer(**EXACT)
    features = segment().features.float()
    features[20] = 1e19  # the loss is finite; the gradient, times the feature, is not
    with pytest.raises(DrafterDiverged, match=r"step 1: grad_norm is (nan|inf)"):
        training.step([Sample(segment().tokens, features, PROMPT)])
    assert same(training, control) and training.steps == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", 0.0),
        ("clip", float("inf")),
        ("noise", -0.1),
        ("warmup_steps", -1),
        ("betas", (0.9, 1.0)),
        ("dtype", "int8"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ValueError, match=f"^{setting}: got"):
        TrainerSettings(**{setting: value})


def test_the_tensors_to_come_are_those_of_the_first_step():
    training = trainer()
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in training.tensors_to_come().items()}
    training.step([segment()])
    found = {name: (t.shape, t.dtype) for name, t in training.own_tensors().items() if not name.startswith("step.")}
    assert found == expected

"""Low-rank updates: what is trained, what 8 bits lose of it, and what is refused. On layers of random sizes."""

from __future__ import annotations

import json

import low_rank
import pytest
import torch
from finetune import MasterAdamW, Recipe, finetune
from low_rank import Factors, UpdateError
from safetensors.torch import save_file
from test_prepare_model import RECIPE, rows, tiny_model

RANK = 4


def random_factors(seed: int) -> Factors:
    """Of random sizes and rank, with columns of very different size, as training makes them."""
    generator = torch.Generator().manual_seed(seed)
    out, into, rank = (int(torch.randint(low, 60, (1,), generator=generator)) for low in (20, 20, 1))
    sizes = torch.logspace(-3, 1, rank)
    up = torch.randn(out, rank, generator=generator) * sizes
    return Factors(up, torch.randn(rank, into, generator=generator) / sizes.flip(0)[:, None])


def trained():
    """A tiny model with an update, after a few steps, and its float32 masters by name."""
    model = tiny_model()
    low_rank.attach(model, RANK)
    optimizer = MasterAdamW(model, RECIPE)
    finetune(model, rows(), RECIPE, optimizer=optimizer)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return model, dict(zip(names, optimizer.masters, strict=True))


def test_an_update_is_nothing_at_first():
    tokens = torch.arange(20)[None]
    plain, with_update = tiny_model(), tiny_model()
    low_rank.attach(with_update, RANK)
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, with_update(tokens).logits)


def test_only_the_factors_are_trained_and_they_learn():
    before = {name: tensor.clone() for name, tensor in tiny_model().named_parameters()}
    losses = []
    model = tiny_model()
    low_rank.attach(model, RANK)
    finetune(model, rows(), Recipe(steps=30, row_tokens=48, lr=1e-2), on_step=lambda step, loss, _: losses.append(loss))
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    after = dict(model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    changed = [name for name, tensor in after.items() if name.endswith(".up") and tensor.abs().max() > 0]
    assert len(changed) == 7 * 2


def test_the_merged_model_computes_what_the_trained_one_does():
    model, masters = trained()
    plain, tokens = tiny_model(), torch.arange(20)[None]
    low_rank.merge(plain, low_rank.factors_of(model, masters))
    with torch.no_grad():
        found, wanted = plain(tokens).logits.float(), model(tokens).logits.float()
        untrained = tiny_model()(tokens).logits.float()
    assert (found - wanted).norm() < 0.05 * (wanted - untrained).norm()


@pytest.mark.parametrize("seed", range(50))
def test_balancing_keeps_the_product_and_eight_bits_lose_a_hundredth(seed):
    factors = random_factors(seed)
    balanced = low_rank.balanced(factors)
    torch.testing.assert_close(balanced.product, factors.product, rtol=1e-3, atol=1e-4 * float(factors.product.norm()))
    torch.testing.assert_close(balanced.up.norm(dim=0), balanced.down.norm(dim=1), rtol=1e-3, atol=1e-4)
    stored = low_rank.dequantise(low_rank.quantise(balanced))
    assert (stored.product - balanced.product).norm() < 0.02 * balanced.product.norm()


def test_a_file_comes_back(tmp_path):
    model, masters = trained()
    factors = {name: low_rank.balanced(each) for name, each in low_rank.factors_of(model, masters).items()}
    low_rank.save(tmp_path / "update", factors, {"layer": [1.0, 2.0]}, {"steps": 3})
    found, merged, about = low_rank.load(tmp_path / "update")
    assert merged == {"layer": [1.0, 2.0]} and about == {"steps": 3}
    for name, each in factors.items():
        stored = low_rank.dequantise(low_rank.quantise(each))
        assert torch.equal(found[name].up, stored.up) and torch.equal(found[name].down, stored.down)
    assert [path.name for path in tmp_path.iterdir()] == ["update"]


def test_what_does_not_fit_is_refused(tmp_path):
    model, masters = trained()
    factors = low_rank.factors_of(model, masters)
    name = next(iter(factors))
    with pytest.raises(UpdateError, match="differ in layers"):
        low_rank.merge(tiny_model(), {other: each for other, each in factors.items() if other != name})
    with pytest.raises(UpdateError, match=name):
        low_rank.merge(tiny_model(), factors | {name: Factors(torch.zeros(5, 2), torch.zeros(2, 5))})
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(UpdateError, match=r"is not a low-rank update made by prepare_model\.py --train"):
        low_rank.load(tmp_path / "foreign")
    with pytest.raises(UpdateError, match="bias"):
        low_rank.LowRankLinear(torch.nn.Linear(4, 4), 2, torch.Generator())


@pytest.mark.parametrize("change", ["transposed", "scaled", "rolled", "another"])
def test_figures_tell_weights_apart(change):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 48, generator=generator).bfloat16()
    changed = {
        "transposed": weight.T,
        "scaled": weight * 1.01,
        "rolled": weight.roll(1, dims=1),
        "another": torch.randn(48, 48, generator=generator),
    }[change]
    wanted = {"layer": low_rank.figures(weight)}
    low_rank.check_merged(json.loads(json.dumps(wanted)), wanted)
    low_rank.check_merged({"layer": low_rank.figures(weight.float() + 1e-4 * weight.float().roll(1))}, wanted)
    with pytest.raises(UpdateError, match="layer is off by"):
        low_rank.check_merged({"layer": low_rank.figures(changed)}, wanted)

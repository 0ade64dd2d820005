"""The loss against its equations, written out with loops."""

from __future__ import annotations

import math

import pytest
import torch

from tlt_verl.drafter.loss import eagle_loss

WEIGHTS = {"feature_weight": 0.7, "ce_weight": 0.3}
MASK = torch.tensor([True, False, True, True, False, True])


def tensors(N: int = 6, H: int = 5, V: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) * 1.5 for shape in ((N, H), (N, H), (V, H)))


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def written_out(predicted, wanted, head, mask) -> dict[str, float]:
    feature = ce = accept = top1 = 0.0
    rows = [i for i in range(len(mask)) if mask[i]]
    H, V = predicted.shape[1], len(head)
    for i in rows:
        for j in range(H):
            gap = abs(float(predicted[i, j] - wanted[i, j]))
            feature += (0.5 * gap**2 if gap < 1 else gap - 0.5) / H
        p = softmax([sum(float(head[v, j] * wanted[i, j]) for j in range(H)) for v in range(V)])
        q = softmax([sum(float(head[v, j] * predicted[i, j]) for j in range(H)) for v in range(V)])
        ce -= sum(p[v] * math.log(q[v]) for v in range(V))
        draft = max(range(V), key=lambda v: q[v])
        accept += p[draft]
        top1 += draft == max(range(V), key=lambda v: p[v])
    found = {"feature": feature, "ce": ce, "accept": accept, "top1": top1}
    means = {name: value / len(rows) for name, value in found.items()}
    return means | {"loss": WEIGHTS["feature_weight"] * means["feature"] + WEIGHTS["ce_weight"] * means["ce"]}


def test_it_is_the_equations():
    predicted, wanted, head = tensors()
    losses = eagle_loss(predicted, wanted, head, MASK, **WEIGHTS)
    for name, value in written_out(predicted, wanted, head, MASK).items():
        assert getattr(losses, name).item() == pytest.approx(value, rel=1e-5), name
    assert 0 < losses.accept < 1


def test_rows_outside_the_mask_count_for_nothing():
    predicted, wanted, head = tensors()
    predicted.requires_grad_()
    before = eagle_loss(predicted, wanted, head, MASK, **WEIGHTS)
    before.loss.backward()
    assert torch.equal(predicted.grad[~MASK], torch.zeros(2, 5))
    assert (predicted.grad[MASK].abs().sum(1) > 0).all()
    changed = torch.where(MASK[:, None], predicted.detach(), float("nan"))
    after = eagle_loss(changed, torch.where(MASK[:, None], wanted, float("nan")), head, MASK, **WEIGHTS)
    assert torch.equal(before.loss, after.loss)


def test_the_gradient_is_the_difference_quotient():
    predicted, wanted, head = tensors()
    predicted.requires_grad_()
    eagle_loss(predicted, wanted, head, MASK, **WEIGHTS).loss.backward()
    with torch.no_grad():
        for i, j in ((0, 0), (2, 3), (5, 4)):
            step = torch.zeros_like(predicted)
            step[i, j] = 1e-2
            up, down = (written_out(predicted + s, wanted, head, MASK)["loss"] for s in (step, -step))
            assert predicted.grad[i, j].item() == pytest.approx((up - down) / 2e-2, rel=1e-2, abs=1e-4)


def test_nothing_flows_into_the_target():
    predicted, wanted, head = (tensor.requires_grad_() for tensor in tensors())
    losses = eagle_loss(predicted, wanted, head, MASK, **WEIGHTS)
    losses.loss.backward()
    assert wanted.grad is None and head.grad is None and predicted.grad is not None
    assert not any(t.requires_grad for t in (losses.feature, losses.ce, losses.accept, losses.top1))


def test_the_targets_own_features_are_the_least_loss():
    _, wanted, head = tensors()
    best = eagle_loss(wanted.clone().requires_grad_(), wanted, head, MASK, **WEIGHTS)
    probabilities = (wanted[MASK] @ head.T).softmax(-1)
    assert best.feature == 0 and best.top1 == 1
    torch.testing.assert_close(best.ce, torch.distributions.Categorical(probabilities).entropy().mean())
    torch.testing.assert_close(best.accept, probabilities.max(-1).values.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    predicted, wanted, head = (tensor.to(dtype) for tensor in tensors())
    losses = eagle_loss(predicted, wanted, head, MASK, **WEIGHTS)
    exact = eagle_loss(predicted.float(), wanted.float(), head.float(), MASK, **WEIGHTS)
    assert losses.loss.dtype == torch.float32
    torch.testing.assert_close(losses.loss, exact.loss)


def test_no_row_to_learn_from_is_an_error():
    with pytest.raises(ValueError, match="mask: got no row of 6"):
        eagle_loss(*tensors(), torch.zeros(6, dtype=torch.bool), **WEIGHTS)

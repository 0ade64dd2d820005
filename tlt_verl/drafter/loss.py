"""What the drafter is trained on: EAGLE's loss on features and on the head's distribution.

Knows features, a head and a mask; knows neither the model nor where the rows come from.

    L = w_feature L_reg + w_ce L_cls                                        (EAGLE, arXiv 2401.15077, section 3.2)
    L_reg = mean over rows and channels of SmoothL1(f, f')                  f the target's feature, f' the predicted one
    L_cls = mean over rows of - sum_v softmax(W f)_v log softmax(W f')_v    W the target's head, or rows of it

The paper has w_feature = 1 and w_cls = 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tlt_verl.drafter.shapes import repeated_rows


@dataclass(frozen=True)
class Losses:
    """Scalars, float32. Only `loss` carries a gradient.

    Args:
        loss: what is minimised.
        feature: L_reg.
        ce: L_cls, in nats. Its least value is the target's entropy over the head's rows, not 0.
        accept: the target's probability of the token that the drafter thinks likeliest. At temperature 1 this is the
            rate at which a greedy draft is accepted, where the head is the whole vocabulary.
        top1: share of rows whose likeliest token is the target's.
    """

    loss: torch.Tensor
    feature: torch.Tensor
    ce: torch.Tensor
    accept: torch.Tensor
    top1: torch.Tensor


def eagle_loss(
    predicted: torch.Tensor,
    wanted: torch.Tensor,
    head: torch.Tensor,
    mask: torch.Tensor,
    *,
    feature_weight: float,
    ce_weight: float,
) -> Losses:
    """EAGLE's loss over the rows of the mask.

    Under autocast the logits are computed in autocast's dtype, else in float32; all else is float32. Memory is several
    times rows * Vh * 4 bytes: a head of hot tokens keeps it small.

    Args:
        predicted: [N, H], the drafter's. The gradient goes here and nowhere else.
        wanted: [N, H], the target's.
        head: [Vh, H], the target's head or its rows for the hot vocabulary.
        mask: bool [N], rows that count.
        feature_weight, ce_weight: weights of the two losses.

    Raises:
        ValueError: no row counts.
    """
    rows = mask.nonzero()[:, 0]
    count = len(rows)
    if not count:
        raise ValueError(f"mask: got no row of {len(mask)} to learn from, takes one or more")
    rows = F.pad(rows, (0, repeated_rows(count, rows.device) - count))  # row 0 again, as often as needed; cut off below
    predicted, wanted = (side.index_select(0, rows).float() for side in (predicted, wanted.detach()))
    feature = F.smooth_l1_loss(predicted[:count], wanted[:count])

    head = head.detach()
    logits = _logits(predicted, head)[:count]  # (rows, Vh)
    with torch.no_grad():
        target = _logits(wanted, head)[:count].softmax(-1)
        drafts = logits.argmax(-1)
        accept = target.gather(1, drafts[:, None]).mean()
        top1 = (drafts == target.argmax(-1)).float().mean()
    ce = F.cross_entropy(logits, target)
    loss = feature_weight * feature + ce_weight * ce
    return Losses(loss, feature.detach(), ce.detach(), accept, top1)


def _logits(features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """float32 [rows, Vh]."""
    if not torch.is_autocast_enabled(features.device.type):
        head = head.float()
    return F.linear(features, head).float()

"""Random weights for small targets: spread enough that a model says something, and in one order for one seed."""

from __future__ import annotations

import torch

_SCALES = {"embed_tokens": 1.0, "lm_head": 0.25}


def spread_weights(model: torch.nn.Module, scale: float) -> None:
    """Redraw every parameter in place: norms uniform in [0.8, 1.25], matrices normal with `scale` or their own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.25)
            else:
                parameter.normal_(0, next((own for part, own in _SCALES.items() if part in name), scale))

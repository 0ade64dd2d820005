"""The state of torch's Adam, where Megatron's distributed optimizer expects that of Apex's or TransformerEngine's.

Those keep the step count in the parameter group; torch keeps one a parameter, as a tensor that it increments in place,
and none before the first step. Knows torch; `patches/megatron_adam_resume.py` puts it where Megatron saves and loads.
"""

from __future__ import annotations

from typing import Any

import torch


def start_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter that was never stepped the state that torch's Adam would start from."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state: dict[str, Any] = optimizer.state[param]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(param.data)
                state["exp_avg_sq"] = torch.zeros_like(param.data)


def set_adam_step(optimizer: torch.optim.Optimizer, step: float) -> None:
    """Give every parameter its own count of the steps taken."""
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(step))

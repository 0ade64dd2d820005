"""A copy of a Megatron model's parameters in host memory, where they already are: what verl's decoupled PPO keeps.

In the form that verl's `restore_megatron_model_from_cpu` takes. verl's own function pins the copies for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def copy_model(models: Sequence[Any]) -> dict[str, Any]:
    """Copies of the parameters of each model chunk, wrapped in Megatron's DDP or not."""
    from megatron.core.distributed import DistributedDataParallel

    state: dict[str, Any] = {}
    for place, chunk in enumerate(models):
        if isinstance(chunk, DistributedDataParallel):
            buffers = (chunk.buffers, chunk.expert_parallel_buffers)
            copies = [[{"param_data": buffer.param_data.detach().clone()} for buffer in each] for each in buffers]
            state[f"model_chunk_{place}"] = {"buffer_states": copies, "is_ddp": True}
        else:
            named = {name: {"data": parameter.detach().clone()} for name, parameter in chunk.named_parameters()}
            state[f"model_chunk_{place}"] = {"model_state": named, "is_ddp": False}
    return state

"""verl keeps a copy of a Megatron policy in pinned host memory, which needs a device: keep it in ordinary memory.

`separate_async` makes such a copy in every step whose old log-probs it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tlt_verl.patches.seam import Seam, Target, in_place_of

MODULE = "verl.utils.megatron_utils"


def _install(copy_model: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
    from verl.utils import megatron_utils

    megatron_utils.copy_megatron_model_to_cpu = in_place_of(megatron_utils.copy_megatron_model_to_cpu, copy_model)


SEAM = Seam(
    name="verl.policy_copy",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path=f"{MODULE}:copy_megatron_model_to_cpu",
            parameters=("models",),
            source_contains=(
                "[model_chunk.buffers, model_chunk.expert_parallel_buffers]",
                "buffer.param_data.data.cpu().clone().pin_memory()",
                "param.data.cpu().clone().pin_memory()",
            ),
        ),
        Target(
            path=f"{MODULE}:restore_megatron_model_from_cpu",
            parameters=("models", "cpu_state"),
            source_contains=('chunk_state["buffer_states"]', 'chunk_state["model_state"]', 'param_state["data"]'),
        ),
        Target(
            path="verl.experimental.separation.engine_workers:DetachActorWorker._get_strategy_handlers",
            source_contains=("from verl.utils.megatron_utils import (",),
        ),
    ),
    why="torch cannot pin host memory on a machine without a device.",
    install=_install,
    cpu_only=True,
)

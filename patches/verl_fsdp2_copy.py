"""verl keeps a copy of an FSDP2 policy on the host by moving it there: on a host that is the policy itself. Copy it.

Without this, `separate_async` with several updates a sync would take the updated policy for the one before it.
"""

from __future__ import annotations

import functools
from typing import Any

from tlt_verl.patches.seam import Seam, Target

MODULE = "verl.utils.fsdp_utils"


def _install() -> None:
    from verl.utils import fsdp_utils

    original = fsdp_utils.fsdp2_sharded_save_to_cpu

    @functools.wraps(original)
    def save_copies(model: Any) -> tuple[dict[str, Any], Any]:
        shards, spec = original(model)
        return {name: (tensor.clone(), of_one) for name, (tensor, of_one) in shards.items()}, spec

    fsdp_utils.fsdp2_sharded_save_to_cpu = save_copies


SEAM = Seam(
    name="verl.fsdp2_copy",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path=f"{MODULE}:fsdp2_sharded_save_to_cpu",
            parameters=("model",),
            source_contains=("local_gpu_tensor.detach().cpu()", "return cpu_sharded_state, global_spec"),
        ),
        Target(path=f"{MODULE}:fsdp2_sharded_load_from_cpu", parameters=("model", "cpu_sharded_state", "target_spec")),
    ),
    why="On a host, what verl moves to the host for later is the policy that goes on changing.",
    install=_install,
    cpu_only=True,
)

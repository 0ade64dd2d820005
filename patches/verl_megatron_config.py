"""verl's Megatron engine takes bfloat16 and float16, and builds with Megatron-Bridge by default.

On the CPU device `actor_rollout_ref.actor.megatron.dtype=float32` is a choice too, and the bridge is mbridge whatever
`vanilla_mbridge` says: Megatron-Bridge needs TransformerEngine.
"""

from __future__ import annotations

import functools
from typing import Any

from tlt_verl.patches.seam import Seam, Target


def _install() -> None:
    from verl.workers.config.engine import McoreEngineConfig

    validate = McoreEngineConfig.__post_init__

    @functools.wraps(validate)
    def validate_for_host(self: Any) -> None:
        dtype = self.dtype
        # The class is frozen once a field is set, and the assertion knows no other way past it.
        object.__setattr__(self, "dtype", "bfloat16" if dtype == "float32" else dtype)
        validate(self)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "vanilla_mbridge", True)  # after the validation, which warns that it is deprecated

    McoreEngineConfig.__post_init__ = validate_for_host


SEAM = Seam(
    name="verl.megatron_config",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path="verl.workers.config.engine:McoreEngineConfig.__post_init__",
            source_contains=('assert self.dtype in ["bfloat16", "float16"]', "self.vanilla_mbridge"),
        ),
    ),
    why="verl refuses float32 for Megatron, and its default bridge needs TransformerEngine.",
    install=_install,
    cpu_only=True,
)

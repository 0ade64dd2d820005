"""Save and load the distributed optimizer when Adam is torch's: neither Apex nor TransformerEngine is there.

- `sharded_state_dict` reads the step count of an optimizer that has not stepped, which for torch's Adam does not exist.
- `load_state_dict` copies into fp32 parameters that record gradients.
- `load_state_dict` gives all parameters the same tensor to count steps in, and then overwrites it with the count from
  before the load. Training would go on, with a bias correction that grows by the number of parameters a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tlt_verl.patches.seam import Seam, Target

_CLASS = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def _install(start_state: Callable[[Any], None], set_step: Callable[[Any, float], None]) -> None:
    """Put our parts in place.

    Args:
        start_state: `(adam)` gives the parameters of a torch Adam that have no state the one it starts from.
        set_step: `(adam, step)` makes `step` the number of steps that each of its parameters has taken.
    """
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded_state_dict = DistributedOptimizer.sharded_state_dict
    load_state_dict = DistributedOptimizer.load_state_dict

    @functools.wraps(sharded_state_dict)
    def started_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        start_state(self.optimizer)
        return sharded_state_dict(self, *args, **kwargs)

    @functools.wraps(load_state_dict)
    def load_with_steps(self: Any, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            load_state_dict(self, state_dict)
        set_step(self.optimizer, state_dict["optimizer"]["param_groups"][0]["step"])

    DistributedOptimizer.sharded_state_dict = started_state_dict
    DistributedOptimizer.load_state_dict = load_with_steps


SEAM = Seam(
    name="megatron.adam_resume",
    package="megatron-core",
    versions=">=0.16.1,<0.16.2",
    targets=(
        Target(path=f"{_CLASS}.sharded_state_dict", parameters=("is_loading", "metadata")),
        Target(path=f"{_CLASS}.state_dict", source_contains=('param_group["step"] = step',)),
        Target(path=f"{_CLASS}.load_state_dict", parameters=("state_dict",), source_contains=('s["step"] = step',)),
        Target(path=f"{_CLASS}._set_main_param_and_optimizer_states", source_contains=("dst_tensors[key].copy_(",)),
    ),
    why="A checkpoint of the distributed optimizer cannot be resumed with torch's own Adam, or is resumed wrongly.",
    install=_install,
    cpu_only=True,
)

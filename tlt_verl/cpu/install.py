"""Install the CPU device: verl's platform, and every seam that lets verl's Megatron engine run on a host.

Called by the plugin while `verl` is being imported and VERL_PLATFORM=cpu, in every process of a run. What only some
processes need is installed when the module that it changes is imported, so that importing verl stays cheap.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from tlt_verl.cpu import bridge
from tlt_verl.cpu.adam_state import set_adam_step, start_adam_state
from tlt_verl.cpu.policy_copy import copy_model
from tlt_verl.cpu.read_as_host import read_as_host
from tlt_verl.patches import (
    mbridge_local_layers,
    mbridge_rope,
    megatron_adam_resume,
    megatron_host_device,
    verl_eager_entropy,
    verl_fsdp2_copy,
    verl_gloo_backend,
    verl_gloo_weights,
    verl_megatron_config,
    verl_policy_copy,
)
from tlt_verl.patches.after_import import after_import
from tlt_verl.patches.seam import Seam, install


def _gloo_engine() -> type:
    from tlt_verl.cpu.gloo_weights import GlooCheckpointEngine  # a subclass of what verl has by then

    return GlooCheckpointEngine


# Which module has to be there before a seam can be installed, and the parts that the seam puts in place.
_AFTER: tuple[tuple[str, Seam, tuple[Any, ...]], ...] = (
    ("verl.utils.distributed", verl_gloo_backend.SEAM, ()),
    ("verl.workers.config.engine", verl_megatron_config.SEAM, ()),
    (verl_gloo_weights.MODULE, verl_gloo_weights.SEAM, ("gloo", _gloo_engine)),
    (verl_policy_copy.MODULE, verl_policy_copy.SEAM, (copy_model,)),
    (verl_fsdp2_copy.MODULE, verl_fsdp2_copy.SEAM, ()),
    ("verl.utils.megatron.tensor_parallel", verl_eager_entropy.SEAM, ()),
    ("megatron.core.optimizer.distrib_optimizer", megatron_adam_resume.SEAM, (start_adam_state, set_adam_step)),
    ("mbridge", mbridge_local_layers.SEAM, (bridge.HOST_OPTIONS, bridge.fused_name, bridge.local_layer_spec)),
    ("mbridge", mbridge_rope.SEAM, (bridge.gpt_model_args,)),
)

# verl registers its engines for cuda and npu. The one for cuda is the one that asks the platform for everything.
_ENGINE_DEVICE = "cuda"


def install_cpu_device() -> None:
    """Make `cpu` a platform of verl and Megatron an engine that runs on it. Once a process; again is harmless.

    Raises:
        RuntimeError: torch has a CUDA device; VERL_PLATFORM=cpu would replace it by the host.
        SeamError: an installed package is not what a seam was written for.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "VERL_PLATFORM=cpu, but torch finds a CUDA device here. Unset VERL_PLATFORM to use it, or hide it "
            "(CUDA_VISIBLE_DEVICES='') to run on the host."
        )
    import tlt_verl.cpu.platform  # noqa: F401  (importing it registers it)

    os.environ.setdefault("VERL_ENGINE_DEVICE", _ENGINE_DEVICE)
    install(megatron_host_device.SEAM, read_as_host)  # before its modules are imported
    for module, seam, parts in _AFTER:
        after_import(module, partial(install, seam, *parts))

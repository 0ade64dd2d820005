"""A plugin of SGLang for the negative control: stock EAGLE on a CPU takes the sampling branch of its verification.

On a CPU stock verification takes the argmax; on CUDA it samples, cutting by top-k and top-p one after the other. This
opens that branch on a CPU machine while a file is there, for the control only: nothing of tlt_verl knows of it.
"""

from __future__ import annotations

import os

SWITCH = "TLT_TEST_SWITCH"  # names the file; as in engine_runner, which makes and removes it


def install() -> None:
    """The plugin's entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.speculative import eagle_utils

    def eagle_sample(original, *args, **kwargs):
        eagle_utils._is_cpu = not os.path.exists(os.environ[SWITCH])
        try:
            return original(*args, **kwargs)
        finally:
            eagle_utils._is_cpu = True

    HookRegistry.register("sglang.srt.speculative.eagle_utils.eagle_sample", eagle_sample, HookType.AROUND)

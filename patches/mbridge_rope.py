"""mbridge reads `rope_theta` and `rope_scaling`, which transformers 5 keeps in `rope_parameters`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_verl.patches.seam import Seam, Target, in_place_of


def _install(gpt_model_args: Callable[[Any], dict[str, Any]]) -> None:
    """`gpt_model_args(bridge)` gives the arguments of `GPTModel` besides its configuration and layers."""
    from mbridge.core.llm_bridge import LLMBridge
    from mbridge.models.llama import LLaMABridge

    for bridge in (LLMBridge, LLaMABridge):
        bridge._get_gptmodel_args = in_place_of(bridge._get_gptmodel_args, gpt_model_args)


SEAM = Seam(
    name="mbridge.rope",
    package="mbridge",
    versions=">=0.15.1,<0.15.2",
    targets=(
        Target(path="mbridge.core.llm_bridge:LLMBridge._get_gptmodel_args", source_contains=("rope_theta",)),
        Target(path="mbridge.models.llama:LLaMABridge._get_gptmodel_args", source_contains=("rope_scaling",)),
    ),
    why="mbridge does not find the rotary base where transformers 5 keeps it, and takes Llama 3's scaling for linear.",
    install=_install,
    cpu_only=True,
)

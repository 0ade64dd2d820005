"""mbridge builds TransformerEngine layers with fused kernels: build Megatron's own, with attention from torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from tlt_verl.patches.seam import Seam, Target, in_place_of


def _install(options: Mapping[str, Any], fused_name: Callable[[str], str], layer_spec: Callable[..., Any]) -> None:
    """Put our parts in place.

    Args:
        options: of the `TransformerConfig`; they win over the model's and the user's.
        fused_name: the TransformerEngine name of a parameter, by which mbridge knows it.
        layer_spec: `(bridge, vp_stage=None)`, the layers to build.
    """
    from mbridge.core.bridge import Bridge
    from mbridge.core.llm_bridge import LLMBridge

    build_base_config = LLMBridge._build_base_config
    to_hf_names = Bridge._weight_name_mapping_mcore_to_hf

    @functools.wraps(build_base_config)
    def host_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.extra_args.update(options)  # these are applied last
        return build_base_config(self, *args, **kwargs)

    @functools.wraps(to_hf_names)
    def local_to_hf_names(self: Any, mcore_weights_name: str) -> list[str]:
        return to_hf_names(self, fused_name(mcore_weights_name))

    LLMBridge._build_base_config = host_config
    LLMBridge._get_transformer_layer_spec = in_place_of(LLMBridge._get_transformer_layer_spec, layer_spec)
    Bridge._weight_name_mapping_mcore_to_hf = local_to_hf_names


SEAM = Seam(
    name="mbridge.local_layers",
    package="mbridge",
    versions=">=0.15.1,<0.15.2",
    targets=(
        Target(path="mbridge.core.llm_bridge:LLMBridge._build_base_config", source_contains=("self.extra_args",)),
        Target(path="mbridge.core.llm_bridge:LLMBridge._get_transformer_layer_spec", parameters=("vp_stage",)),
        Target(path="mbridge.core.llm_bridge:LLMBridge._model_provider", source_contains=("self.has_vp_stage",)),
        Target(path="mbridge.core.bridge:Bridge._weight_name_mapping_mcore_to_hf", parameters=("mcore_weights_name",)),
    ),
    why="There is no TransformerEngine on a machine without a GPU.",
    install=_install,
    cpu_only=True,
)

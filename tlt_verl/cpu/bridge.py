"""mbridge without TransformerEngine: a Hugging Face model built from Megatron's own layers.

Covers the dense decoders in `MODEL_TYPES`; another model is refused by name. The functions take the place of methods of
mbridge's `Bridge` and `LLMBridge` (`patches/mbridge_local_layers.py`, `patches/mbridge_rope.py`), so their first
argument is the bridge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("llama", "qwen2", "qwen3")

# Every one of these is a GPU kernel, or, sequence parallelism, something that torch's RMSNorm does not do. None changes
# what is computed.
HOST_OPTIONS: Mapping[str, Any] = {
    "apply_rope_fusion": False,
    "attention_backend": "local",
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "sequence_parallel": False,
}

# The local layers keep their norms beside the linear layers; mbridge knows them inside TransformerEngine's fused ones.
_FUSED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

# The one parametrisation of Llama 3's frequency scaling that megatron-core implements
# (`RotaryEmbedding._apply_scaling`); the factor is free.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def fused_name(name: str) -> str:
    """The TransformerEngine name of a parameter of a local layer; any other name is returned as it is."""
    for local, fused in _FUSED_NAMES.items():
        if name.endswith("." + local):
            return name.removesuffix(local) + fused
    return name


def local_layer_spec(bridge: Any, vp_stage: int | None = None) -> Any:
    """Megatron's own layers with `SdpaCoreAttention`, for the layers of this pipeline stage.

    Raises:
        NotImplementedError: the model is not one of `MODEL_TYPES`.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from tlt_verl.cpu.attention_core import SdpaCoreAttention

    if bridge.hf_config.model_type not in MODEL_TYPES:
        raise NotImplementedError(
            f"model_type {bridge.hf_config.model_type!r} on the CPU device; it has {', '.join(MODEL_TYPES)}"
        )
    bridge.has_vp_stage = True  # mbridge's model provider asks whether the function below takes `vp_stage`
    spec = get_gpt_decoder_block_spec(
        bridge.config, use_transformer_engine=False, normalization=bridge.config.normalization, vp_stage=vp_stage
    )
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return spec


def gpt_model_args(bridge: Any) -> dict[str, Any]:
    """Arguments of `GPTModel` besides its configuration and layers, read from a transformers 5 configuration."""
    config = bridge.hf_config
    return {
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        **rope_args(config.rope_parameters),
    }


def rope_args(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary arguments of `GPTModel` for transformers' `rope_parameters`.

    Raises:
        NotImplementedError: a scaling that megatron-core does not compute as transformers does.
    """
    kind, args = rope.get("rope_type", "default"), {"rotary_base": rope["rope_theta"]}
    if rope.get("partial_rotary_factor", 1.0) == 1.0:
        if kind == "default":
            return args
        if kind == "linear":
            return {**args, "seq_len_interpolation_factor": rope["factor"]}
        if kind == "llama3" and all(rope[key] == value for key, value in _LLAMA3_ROPE.items()):
            return {**args, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    raise NotImplementedError(f"rope_parameters {dict(rope)}: megatron-core computes nothing equal")

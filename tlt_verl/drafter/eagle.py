"""The EAGLE drafter as SGLang 0.5.17 loads it: which class carries which target, its config, its tensors.

Knows the layout on paper; reads no weights and runs no model, and knows neither verl nor sglang.

The drafter predicts the target's next feature (its hidden state after the final norm) from the feature of a position
and the embedding of the token that follows it; the target's own head turns the prediction into a distribution (EAGLE,
arXiv 2401.15077). With H hidden size, Q = heads * head_dim, K = KV heads * head_dim, I = MLP width, V = vocabulary:

    x = fc(cat(embedding, feature))                          (T, 2H) -> (T, H)
    y = x + attention(x)                                     no norm before the attention of layer 0
    feature' = y + mlp(rms_norm(y))                          no norm behind it either: the head reads it as it is

    | tensor in model.safetensors                        | shape   | bias                                          |
    |----------------------------------------------------|---------|-----------------------------------------------|
    | fc                                                 | (H, 2H) | always; columns are embedding, then feature   |
    | layers.0.self_attn.q_proj                          | (Q, H)  | Qwen2 always, Llama with `attention_bias`     |
    | layers.0.self_attn.k_proj, layers.0.self_attn.v_proj | (K, H) | as q_proj                                    |
    | layers.0.self_attn.o_proj                          | (H, Q)  | Llama with `attention_bias`                   |
    | layers.0.mlp.gate_proj, layers.0.mlp.up_proj       | (I, H)  | never                                         |
    | layers.0.mlp.down_proj                             | (H, I)  | never                                         |
    | layers.0.post_attention_layernorm                  | (H,)    | never                                         |
    | embed_tokens, lm_head                              | (V, H)  | not in the file: SGLang shares the target's   |

Qwen3 has no EAGLE class in SGLang 0.5.17. `LlamaForCausalLMEagle` carries it: it honours `head_dim` and
`attention_bias` as Qwen3 does. It has no norm on queries and keys, so the drafter of a Qwen3 target does without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DrafterError(ValueError):
    """A drafter, or a target, that cannot be used. The message names the option, its value and the cure."""


@dataclass(frozen=True)
class Family:
    """What SGLang runs for the drafter of one architecture of target."""

    architecture: str
    model_type: str
    qk_norm: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("LlamaForCausalLMEagle", "llama"),
    "Qwen2ForCausalLM": Family("Qwen2ForCausalLMEagle", "qwen2"),
    "Qwen3ForCausalLM": Family("LlamaForCausalLMEagle", "llama", qk_norm=True),
}
"""The drafter's family by the target's architecture."""

HOT_TOKENS = "hot_tokens.pt"
"""File of the token ids that the draft head knows, ascending, as SGLang reads a token map; absent for all of them."""

SHARED_TENSORS = frozenset({"embed_tokens.weight", "lm_head.weight"})
"""Tensors that a drafter's file may hold and that SGLang replaces by the target's."""

_KEPT = (
    "attention_bias",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "pad_token_id",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "vocab_size",
)
# What is left out on purpose: everything about sliding windows (SGLang would give the drafter's one layer a window from
# `sliding_window` alone, even where the target has `use_sliding_window: false`), per-layer lists, and quantisation.


def check_target(config: Mapping[str, Any], option: str = "actor_rollout_ref.model.path") -> Family:
    """The drafter's family for a target.

    Args:
        config: the target's `config.json`, or `PretrainedConfig.to_dict()`.
        option: the key that chose the target, for the message.

    Raises:
        DrafterError: the architecture has no EAGLE drafter here, or the weights are quantised.
    """
    architecture = _architecture(config)
    if architecture not in FAMILIES:
        raise DrafterError(
            f"{option}: got a {architecture}, for which there is no EAGLE drafter; takes one of {', '.join(FAMILIES)}. "
            "Choose such a model, or set strategy.arms to [off]."
        )
    if config.get("quantization_config"):
        raise DrafterError(
            f"{option}: got quantised weights (quantization_config in config.json), from which no drafter can be made. "
            "Choose the model in bfloat16, float16 or float32."
        )
    return FAMILIES[architecture]


def drafter_config(target: Mapping[str, Any]) -> dict[str, Any]:
    """The drafter's `config.json` for a target's.

    One layer, untied (SGLang gives it the target's embedding and head; tied, it would delete them), and the target's
    own sizes, RoPE, norm epsilon, context length and dtype.

    Raises:
        DrafterError: see `check_target`.
    """
    family = check_target(target)
    config = {key: target[key] for key in _KEPT if target.get(key) is not None}
    config.update(
        architectures=[family.architecture],
        model_type=family.model_type,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        head_dim=head_dim(target),  # said, not left to defaults: Qwen3's is 128, Llama's is H / heads
        num_key_value_heads=target.get("num_key_value_heads") or target["num_attention_heads"],
    )
    return dict(sorted(config.items()))


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of one attention head. A config that does not say follows its class's default."""
    if config.get("head_dim"):
        return config["head_dim"]
    return 128 if config.get("model_type") == "qwen3" else config["hidden_size"] // config["num_attention_heads"]


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that SGLang expects in the file of a drafter with this `config.json`.

    Layers behind the first, which SGLang supports and this project never makes, have a norm before their attention.
    """
    H, I, D = config["hidden_size"], config["intermediate_size"], head_dim(config)  # noqa: E741
    heads = config["num_attention_heads"]
    Q, K = heads * D, (config.get("num_key_value_heads") or heads) * D
    is_qwen2 = _architecture(config) == "Qwen2ForCausalLMEagle"
    llama_bias = not is_qwen2 and bool(config.get("attention_bias") or config.get("bias"))

    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (H, 2 * H), "fc.bias": (H,)}
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"layers.{layer}.self_attn.", f"layers.{layer}.mlp."
        for name, rows in (("q_proj", Q), ("k_proj", K), ("v_proj", K)):
            shapes[f"{attention}{name}.weight"] = (rows, H)
            if is_qwen2 or llama_bias:
                shapes[f"{attention}{name}.bias"] = (rows,)
        shapes[attention + "o_proj.weight"] = (H, Q)
        if llama_bias:
            shapes[attention + "o_proj.bias"] = (H,)
        shapes |= {mlp + "gate_proj.weight": (I, H), mlp + "up_proj.weight": (I, H), mlp + "down_proj.weight": (H, I)}
        shapes[f"layers.{layer}.post_attention_layernorm.weight"] = (H,)
        if layer > 0:
            shapes[f"layers.{layer}.input_layernorm.weight"] = (H,)
    return shapes


def read_config(folder: Path, option: str) -> dict[str, Any]:
    """The `config.json` of a model's folder.

    Raises:
        DrafterError: there is no such folder or file, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise DrafterError(f"{option}: got {str(folder)!r}, which is not a folder. Give the folder with config.json.")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DrafterError(f"{option}: got {str(folder)!r}, which has no config.json.") from None
    except ValueError as error:
        raise DrafterError(f"{option}: got {str(folder)!r}, whose config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DrafterError(f"{option}: got {str(folder)!r}, whose config.json is not an object.")
    return config


def _architecture(config: Mapping[str, Any]) -> str:
    """The first of `architectures`; a config that names none says so by its model type."""
    architectures = config.get("architectures") or [f"model of type {config.get('model_type')!r}"]
    return architectures[0]

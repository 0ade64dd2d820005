"""Tiny random targets of every family, and the drafter written out in plain torch from its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
FAMILIES = tuple(CONFIGS)
DRAFTER_OF = {"llama": "LlamaForCausalLMEagle", "qwen2": "Qwen2ForCausalLMEagle", "qwen3": "LlamaForCausalLMEagle"}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def make_target(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A random model whose norms and biases are not the trivial ones, so that a fold that forgets one shows."""
    sizes = SIZES | ({"head_dim": 16} if family == "qwen3" else {}) | overrides
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "layers." in name:
                parameter.normal_(0, 0.2)
    return model


def save_target(model: PreTrainedModel, folder: Path, sharded: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="16KB" if sharded else "1GB")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


class ReferenceDrafter:
    """The drafter of a folder, in float32, as the table in `tlt_verl.drafter.eagle` describes it."""

    def __init__(self, folder: Path) -> None:
        self.config = config_of(folder)
        self.tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}

    def __call__(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The next features from the features and the embeddings of the tokens behind them, (B, T, H) each."""
        x = self._linear("fc", torch.cat([embeddings, features], dim=-1))
        y = x + self._attention(x)
        normed = F.rms_norm(
            y, y.shape[-1:], self._layer("post_attention_layernorm.weight"), self.config["rms_norm_eps"]
        )
        gated = F.silu(self._linear("layers.0.mlp.gate_proj", normed)) * self._linear("layers.0.mlp.up_proj", normed)
        return y + self._linear("layers.0.mlp.down_proj", gated)

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        D = self.config["head_dim"]
        q, k, v = (
            self._linear(f"layers.0.self_attn.{name}_proj", x).unflatten(-1, (-1, D)).transpose(1, 2) for name in "qkv"
        )  # (B, heads, T, D)
        mixed = F.scaled_dot_product_attention(self._rotated(q), self._rotated(k), v, is_causal=True, enable_gqa=True)
        return self._linear("layers.0.self_attn.o_proj", mixed.transpose(1, 2).flatten(2))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        D = x.shape[-1]
        theta = self.config["rope_parameters"]["rope_theta"]
        frequencies = theta ** (-torch.arange(0, D, 2) / D)  # (D / 2,)
        angles = (torch.arange(x.shape[-2])[:, None] * frequencies).repeat(1, 2)  # (T, D)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def _layer(self, name: str) -> torch.Tensor:
        return self.tensors[f"layers.0.{name}"]

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

"""The EAGLE drafter of `eagle` in plain torch, to train it and to replay its drafts.

Knows the layout and packed sequences; knows neither the target's embedding and head, nor losses, nor verl or sglang.
What SGLang serves is this model by another hand: the equations and the tensors' names are those of `eagle`.

Legend: T rows, H hidden size, D head width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tlt_verl.drafter.attention import block_diagonal_attention
from tlt_verl.drafter.eagle import FAMILIES, DrafterError, head_dim, read_config, tensor_shapes
from tlt_verl.drafter.shapes import repeated_rows
from tlt_verl.drafter.tensors import TensorFolder

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE that does not depend on the length of a sequence, and that SGLang and transformers compute alike."""


class EagleDrafter(nn.Module):
    """A one-layer drafter. Its `state_dict` has exactly the names and shapes of `eagle.tensor_shapes`.

    Parameters begin random and float32. Under autocast the products run in autocast's dtype, and so does the output.

    Args:
        config: a drafter's `config.json`.

    Raises:
        DrafterError: the config is no drafter of one layer that is known here, or asks for a RoPE or an activation
            that SGLang or this model does not have.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        _check(config)
        self.config = dict(config)
        self.head_dim = head_dim(config)
        shapes = tensor_shapes(config)
        self.fc = _linear(shapes, "fc")
        self.layers = nn.ModuleList([_Layer(shapes, config["rms_norm_eps"])])
        self.rope_frequencies: torch.Tensor  # float32 [D / 2], radians for each position
        frequencies, self.rope_scale = _rope(config)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], option: str = "drafter.path") -> EagleDrafter:
        """The drafter of a folder in SGLang's format, in float32. Tensors that SGLang shares are not read.

        Args:
            path: holds `config.json` and safetensors.
            option: the key that chose the folder, for the messages.

        Raises:
            DrafterError: see the class; or a file or tensor is missing, unreadable or of another shape.
        """
        folder = Path(path)
        config = read_config(folder, option)
        own = cls(config).state_dict()
        try:
            tensors = TensorFolder(folder)
            if missing := [name for name in own if name not in tensors]:
                raise ValueError(f"they lack {', '.join(missing)}")
            loaded = {name: tensors.load(name) for name in own}
        except (OSError, ValueError, KeyError) as error:
            raise DrafterError(f"{option}: got {str(folder)!r}, whose weights cannot be used: {error}.") from error
        for name, tensor in loaded.items():
            if tensor.shape != own[name].shape:
                asked = f"its config.json asks for {tuple(own[name].shape)}"
                raise DrafterError(f"{option}: got {str(folder)!r}, whose {name} is {tuple(tensor.shape)}; {asked}.")
        return cls.from_weights(config, loaded)

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> EagleDrafter:
        """The drafter with copies of these tensors, in float32, on their device.

        Args:
            weights: every tensor of `eagle.tensor_shapes(config)`, in any float dtype.

        Raises:
            DrafterError: see the class.
            RuntimeError: a tensor is missing, unknown or of another shape.
        """
        drafter = cls(config)
        drafter.load_state_dict(weights)
        return drafter.to(next(iter(weights.values())).device)

    def forward(self, embeddings: torch.Tensor, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """The predicted next features of packed sequences, none of which sees another.

        Args:
            embeddings: [T, H], of the token behind each feature.
            features: [T, H], the target's.
            lengths: rows of each sequence, in order; positions begin at 0 in each. They add up to T.

        Returns:
            [T, H].

        Raises:
            ValueError: the lengths do not add up to T.
        """
        T = len(features)
        if sum(lengths) != T:
            raise ValueError(f"lengths: got {list(lengths)}, takes lengths that add up to the {T} rows")
        padding = (0, 0, 0, repeated_rows(T, features.device) - T)
        x = self.merge(*(F.pad(self._cast(side), padding) for side in (embeddings, features)))
        q, k, v = self.qkv(x, _positions(lengths, len(x), x.device))
        return self.finish(x, block_diagonal_attention(q, k, v, lengths).flatten(1))[:T]

    def merge(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The input of the layer, [T, H], from embeddings and features [T, H] (any float dtype)."""
        return self.fc(torch.cat([self._cast(embeddings), self._cast(features)], dim=-1))

    def qkv(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, heads, D], keys and values [T, KV heads, D] of x [T, H]; queries and keys with RoPE applied.

        Args:
            x: what `merge` returned.
            positions: int64 [T], of each row in its sequence.
        """
        attention = self._layer.self_attn
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        angles = positions[:, None, None].float() * self.rope_frequencies  # (T, 1, D / 2)
        cos, sin = ((wave * self.rope_scale).to(q.dtype) for wave in (angles.cos(), angles.sin()))
        return _rotated(q, cos, sin), _rotated(k, cos, sin), v

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The predicted features [T, H] from x [T, H] and what attention made of it, [T, heads * D]."""
        layer = self._layer
        y = x + layer.self_attn.o_proj(attended)
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        normed = F.rms_norm(y, y.shape[-1:], norm.weight.to(y.dtype), norm.eps)
        return y + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))

    def _cast(self, side: torch.Tensor) -> torch.Tensor:
        """In autocast's dtype, or the parameters': before the rows are moved about, when that is the smaller one."""
        device = side.device.type
        autocast = torch.is_autocast_enabled(device)
        return side.to(torch.get_autocast_dtype(device) if autocast else self.fc.weight.dtype)

    @property
    def _layer(self) -> _Layer:
        layer = self.layers[0]
        assert isinstance(layer, _Layer)
        return layer


class _Layer(nn.Module):
    """The modules of layer 0, under the names that their tensors have in the file."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], eps: float) -> None:
        super().__init__()
        self.self_attn = _Attention(shapes)
        self.mlp = _MLP(shapes)
        self.post_attention_layernorm = nn.RMSNorm(shapes["layers.0.post_attention_layernorm.weight"], eps=eps)


class _Attention(nn.Module):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.q_proj = _linear(shapes, "layers.0.self_attn.q_proj")
        self.k_proj = _linear(shapes, "layers.0.self_attn.k_proj")
        self.v_proj = _linear(shapes, "layers.0.self_attn.v_proj")
        self.o_proj = _linear(shapes, "layers.0.self_attn.o_proj")


class _MLP(nn.Module):
    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.gate_proj = _linear(shapes, "layers.0.mlp.gate_proj")
        self.up_proj = _linear(shapes, "layers.0.mlp.up_proj")
        self.down_proj = _linear(shapes, "layers.0.mlp.down_proj")


def _linear(shapes: Mapping[str, tuple[int, ...]], name: str) -> nn.Linear:
    rows, columns = shapes[f"{name}.weight"]
    return nn.Linear(columns, rows, bias=f"{name}.bias" in shapes)


def _check(config: Mapping[str, Any]) -> None:
    """Raise DrafterError unless this model is what the config describes."""
    known = sorted({family.architecture for family in FAMILIES.values()})
    if (found := (config.get("architectures") or [None])[0]) not in known:
        raise DrafterError(f"architectures: got {found}, takes one of {', '.join(known)}.")
    if config["num_hidden_layers"] != 1:
        raise DrafterError(f"num_hidden_layers: got {config['num_hidden_layers']}, takes 1.")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise DrafterError(f"hidden_act: got {activation}, takes silu, as SGLang's Llama and Qwen2 do.")
    if (partial := config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise DrafterError(f"partial_rotary_factor: got {partial}, takes 1.0: SGLang and transformers differ on it.")


def _rope(config: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """RoPE's frequencies float32 [D / 2] and the factor on its cosines and sines, as transformers reads the config."""
    read = AutoConfig.for_model(**config)
    if (kind := read.rope_parameters["rope_type"]) not in ROPE_TYPES:
        raise DrafterError(f"rope_type: got {kind}, takes one of {', '.join(ROPE_TYPES)}.")
    make: Callable[..., Any] = LlamaRotaryEmbedding.compute_default_rope_parameters
    if kind != "default":
        make = ROPE_INIT_FUNCTIONS[kind]
    frequencies, scale = make(read)
    return frequencies.float(), float(scale)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (T, heads, D) with RoPE applied, half of a head against the other half. cos, sin: (T, 1, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _positions(lengths: Sequence[int], T: int, device: torch.device) -> torch.Tensor:
    """int64 [T]: 0, 1, ... in each sequence; 0 behind the last."""
    spans = [torch.arange(length, device=device) for length in lengths]
    return F.pad(torch.cat(spans), (0, T - sum(lengths))) if spans else torch.zeros(T, dtype=torch.int64, device=device)

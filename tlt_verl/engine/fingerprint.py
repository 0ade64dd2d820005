"""An SGLang model's tensors under their checkpoint names, and their fingerprints.

SGLang fuses projections; a checkpoint does not. `unfused` gives the checkpoint's tensors back as views. Covers what
tlt_verl serves: dense Llama, Qwen2 and Qwen3 targets at tensor-parallel size 1, and EAGLE drafters made from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tlt_verl.fingerprint import fingerprints


def fingerprints_of(model: Any) -> dict[str, str]:
    """Checkpoint name -> fingerprint, of an SGLang model."""
    return fingerprints(unfused(model))


def unfused(model: Any, tp_size: int = 1) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an SGLang model under their checkpoint names; of one rank's share where there are several.

    Splits `qkv_proj` and `gate_up_proj`; drops the padding rows of the vocabulary; leaves out a head that is the
    embedding.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        tensor = parameter.data
        if ".qkv_proj." in name:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            query = config.num_attention_heads // tp_size * head_dim
            key = max(1, config.num_key_value_heads // tp_size) * head_dim
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.split([query, key, key]), strict=True):
                yield name.replace("qkv_proj", part), rows
        elif ".gate_up_proj." in name:
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield name.replace("gate_up_proj", part), rows
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            yield name, tensor[: config.vocab_size]
        else:
            yield name, tensor

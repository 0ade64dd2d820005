"""Fingerprints of a model's tensors under their checkpoint names, to compare an engine with a policy's export.

SGLang fuses projections; a checkpoint does not. `unfused` gives the checkpoint's tensors back as views. Covers what
tlt_verl serves: dense Llama, Qwen2 and Qwen3 targets at tensor-parallel size 1, and EAGLE drafters made from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


def fingerprint(tensor: torch.Tensor) -> str:
    """BLAKE2b of a tensor's dtype, shape and bytes."""
    host = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{host.dtype}{tuple(host.shape)}".encode(), digest_size=16)
    digest.update(host.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprints(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Name -> fingerprint."""
    return {name: fingerprint(tensor) for name, tensor in named_tensors}


def fingerprints_of(model: Any) -> dict[str, str]:
    """Checkpoint name -> fingerprint, of an SGLang model."""
    return fingerprints(unfused(model))


def unfused(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an SGLang model under their checkpoint names.

    Splits `qkv_proj` and `gate_up_proj`; drops the padding rows of the vocabulary; leaves out a head that is the embedding.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        tensor = parameter.data
        if ".qkv_proj." in name:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.split([query, key, key]), strict=True):
                yield name.replace("qkv_proj", part), rows
        elif ".gate_up_proj." in name:
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield name.replace("gate_up_proj", part), rows
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            yield name, tensor[: config.vocab_size]
        else:
            yield name, tensor


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names whose fingerprints differ or that only one side has, sorted."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))

"""Fingerprints of tensors, to compare an engine's weights with a policy's without moving either.

Knows nothing of ours, nor of what the tensors belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def fingerprint(tensor: torch.Tensor) -> str:
    """BLAKE2b of a tensor's dtype, shape and bytes."""
    host = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{host.dtype}{tuple(host.shape)}".encode(), digest_size=16)
    digest.update(host.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprints(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Name -> fingerprint."""
    return {name: fingerprint(tensor) for name, tensor in named_tensors}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names whose fingerprints differ or that only one side has, sorted."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))

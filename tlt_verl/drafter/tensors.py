"""Where the tensors of a safetensors folder are, whether it is one file or sharded. Loads nothing until it is asked.

Knows the file format only: neither models nor drafters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


class TensorFolder:
    """The tensors of a model's folder, by name, read one at a time.

    Args:
        folder: holds `model.safetensors.index.json` with its shards, or any `*.safetensors`.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        ValueError: a file is truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for path in _files(folder):
            try:
                with safe_open(path, "pt") as file:
                    self._file_of |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ValueError(f"{path} cannot be read: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        with safe_open(self._file_of[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def load(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in its own dtype."""
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_tensor(name)


def embed_and_head(folder: Path, config: Mapping[str, Any], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """A target's embedding and head, [V, H] each, in its own dtype, on the device; one tensor where they are tied.

    Raises:
        FileNotFoundError, ValueError, KeyError: the folder has no such tensors.
    """
    tensors = TensorFolder(folder)
    embed = tensors.load("model.embed_tokens.weight").to(device)
    tied = config.get("tie_word_embeddings") or "lm_head.weight" not in tensors
    return embed, embed if tied else tensors.load("lm_head.weight").to(device)


def _files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those of the index where there is one, as SGLang reads them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"{folder} has no *.safetensors")
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}, which {index.name} names, is missing")
    return [folder / name for name in names]

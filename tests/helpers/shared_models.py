"""Targets and drafters for tests, made once in a run of the suite, whichever worker needs one first.

Folders that several tests read: nobody may write to them. Knows how each is made; knows nothing of who uses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from fitted_drafter import fit_drafter
from random_weights import spread_weights
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

GREEDY_VOCAB = 512


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Path:
    """The folder `name` of this run of the suite; `make` fills it, unless another worker has.

    Args:
        make: is called with a folder that exists; when it fails, the next one tries.
    """
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    folder = shared / name
    with FileLock(shared / f".{name}.lock"):
        if not folder.exists():
            unnamed = factory.mktemp(f"making-{name}")
            make(unnamed)
            unnamed.rename(folder)
    return folder


def greedy_target(factory: pytest.TempPathFactory) -> Path:
    """`target`, of 512 tokens, and `drafter`, which is fitted to it. Greedy decoding has no near-ties with it."""

    def make(folder: Path) -> None:
        fit_drafter(make_greedy_target(folder / "target"), folder / "drafter")

    return once(factory, "greedy", make)


def make_greedy_target(folder: Path) -> LlamaForCausalLM:
    """Nine query heads and three key/value heads, as SmolLM2 has them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=GREEDY_VOCAB,
        hidden_size=144,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).float().eval()
    spread_weights(model, 0.05)
    model.save_pretrained(folder)
    return model


def greedy_prompts() -> list[list[int]]:
    """32 prompts of 20 to 35 tokens: four families of eight that share their first 16."""
    generator = torch.Generator().manual_seed(5)
    families = torch.randint(0, GREEDY_VOCAB, (4, 16), generator=generator).tolist()
    own = [torch.randint(0, GREEDY_VOCAB, (4 + i % 16,), generator=generator).tolist() for i in range(32)]
    return [families[i % 4] + own[i] for i in range(32)]


def task_model(factory: pytest.TempPathFactory) -> Path:
    """`model`, for real runs of verl, and `drafter`, which is fitted to it."""

    def make(folder: Path) -> None:
        from tiny_task import make_model

        make_model(folder / "model")
        fit_drafter(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), folder / "drafter")

    return once(factory, "task", make)

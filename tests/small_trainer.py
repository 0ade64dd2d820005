"""A drafter that is trained in no time, for tests of what is done with a trainer's state."""

from __future__ import annotations

import torch

from tlt_verl.drafter.eagle import drafter_config
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample
from tlt_verl.drafter.trainer import DrafterTrainer, SharedTensors, TrainerSettings

V, H = 96, 32
SIZES = {"hidden_size": H, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TARGET = {"architectures": ["LlamaForCausalLM"], "vocab_size": V, "rms_norm_eps": 1e-5, **SIZES}
CONFIG = drafter_config(TARGET)


def sample(seed: int, T: int = 24) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (T,), generator=generator)
    return Sample(tokens, torch.randn(T, H, generator=generator), 4)


def trainer(seed: int = 0) -> DrafterTrainer:
    generator = torch.Generator().manual_seed(7)
    embed, head = (torch.randn(V, H, generator=generator) for _ in range(2))
    torch.manual_seed(0)
    drafter, settings = EagleDrafter(CONFIG), TrainerSettings(dtype="float32")
    return DrafterTrainer(drafter, SharedTensors(embed, head), settings, seed=seed)

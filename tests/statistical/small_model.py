"""A random target with a vocabulary small enough to enumerate.

The target's next token depends on the last one and, through attention, on those before it (by 0.1 in total variation
between two histories), so a wrong tree mask, position or cache row shows in its distribution.
"""

from __future__ import annotations

from pathlib import Path

import torch
from random_weights import spread_weights
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 12
EOS = 6  # a likely token; only `min_new_tokens` reads it, every request ignores it


def make_target(folder: Path, seed: int = 1) -> LlamaForCausalLM:
    """A Llama of two layers with grouped-query attention, and a tokenizer, which `min_new_tokens` asks for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).float().eval()
    spread_weights(model, 0.13)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}").save_pretrained(folder)
    return model

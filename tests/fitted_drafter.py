"""A drafter that needs no training and is accepted a fair share of the time, for random targets."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tlt_verl.drafter.eagle import drafter_config, tensor_shapes


@torch.no_grad()
def fit_drafter(target: PreTrainedModel, folder: Path) -> Path:
    """An EAGLE drafter whose fc does the drafting: the least-squares map from (a token's embedding, the feature before
    it) to its feature, on random sequences. Its layer runs and adds next to nothing.
    """
    H = target.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(0, target.config.vocab_size, (2000, 14), generator=generator)
    features = target.model(sequences).last_hidden_state.double()
    embeddings = target.model.embed_tokens(sequences).double()
    given = torch.cat([embeddings[:, 1:], features[:, :-1]], dim=-1).flatten(0, 1)
    wanted = features[:, 1:].flatten(0, 1)
    fc = torch.linalg.solve(given.T @ given + torch.eye(2 * H), given.T @ wanted).T  # (H, 2H)

    config = drafter_config(json.loads(target.config.to_json_string(use_diff=False)))
    tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(H)
    tensors |= {"fc.weight": fc.float().contiguous(), "fc.bias": torch.zeros(H)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder

"""A made drafter in SGLang's own model classes, without an engine: which parameters it fills, and what it computes.

One process a family, because SGLang's parallel state is global. The attention layer, which needs an engine's cache, is
replaced by torch's; everything else (fc, norms, RoPE, projections, MLP) is SGLang's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1] / "unit"  # where the tiny targets and the drafter in plain torch are
FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sglang_fills_every_parameter_and_computes_what_the_layout_says(tmp_path, family):
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": os.pathsep.join([str(UNIT), *sys.path])}
    command = [sys.executable, __file__, family, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def start_sglang(model_path: Path, scratch: Path) -> None:
    """What a model class needs of SGLang before it can be made: server arguments and a parallel state of one rank."""
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    arguments = ServerArgs(model_path=str(model_path), device="cpu", attention_backend="torch_native")
    set_global_server_args_for_scheduler(arguments)
    rendezvous = f"file://{scratch / 'rendezvous'}"
    init_distributed_environment(1, 0, distributed_init_method=rendezvous, local_rank=0, backend="gloo")
    initialize_model_parallel()


def load_in_sglang(drafter: Path):
    """The stock class with the folder's tensors; whatever the folder does not fill stays NaN."""
    import torch
    from safetensors.torch import load_file
    from sglang.srt.models.registry import ModelRegistry
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(drafter)
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures)
    model = model_class(config).float()
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.load_weights(load_file(drafter / "model.safetensors").items())
    return model


def forward_in_sglang(model, embeddings, features):
    """The draft model's `forward` on one sequence (T, H), with torch's attention in place of the engine's."""
    from types import SimpleNamespace

    import torch
    import torch.nn.functional as F

    attention = model.model.layers[0].self_attn
    D = attention.head_dim

    def attend(q, k, v, *_):
        q, k, v = (x.unflatten(-1, (-1, D)).transpose(0, 1) for x in (q, k, v))  # (heads, T, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)

    attention.attn.forward = attend
    batch = SimpleNamespace(spec_info=SimpleNamespace(hidden_states=features))
    ids, positions = torch.zeros(len(features), dtype=torch.long), torch.arange(len(features))
    return model.model(ids, positions, batch, input_embeds=embeddings)


def main(family: str, folder: Path) -> None:
    import torch
    from tiny_targets import ReferenceDrafter, make_target, save_target

    from tlt_verl.drafter import make_drafter

    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    target = make_target(family, tie_word_embeddings=True, head_dim=64, vocab_size=320, **sizes)
    target_folder = save_target(target, folder / "target")
    drafter = make_drafter(target_folder, folder / "drafter")

    start_sglang(target_folder, folder)
    with torch.no_grad():
        model = load_in_sglang(drafter)
        left = {name for name, parameter in model.named_parameters() if parameter.isnan().any()}
        assert left == {"model.embed_tokens.weight", "lm_head.weight"}, left

        shared = torch.nn.Parameter(target.model.embed_tokens.weight.detach())
        model.set_embed_and_head(shared, shared)  # what the engine does with a tied target
        assert model.lm_head.weight is shared and model.model.embed_tokens.weight is shared

        embeddings, features = torch.randn(20, 128), torch.randn(20, 128)
        found = forward_in_sglang(model, embeddings, features)
        wanted = ReferenceDrafter(drafter)(embeddings[None], features[None])[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""A Llama of any size that writes worked additions, trained from nothing on a GPU in a minute or two.

    scripts/train_small.py --out runs/small --tokenizer models/smollm2-135m-reasoner --steps 300
    scripts/train_small.py --out runs/sizes --tokenizer ... --hidden 4096 --layers 32 --sizes-alone

For measurements on a machine that has a GPU and no model: what it writes has the low entropy of a reasoning model, and
one step of it costs what its size costs. Whether its sums are right is not asked.

`--sizes-alone` trains nothing and writes the last layer and the final norm alone, which is what a drafter is made from:
an engine with `load_format=dummy` makes up the rest.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from finetune import Recipe, Row, finetune, pack
from prepare_model import draw_samples
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

CONTEXT = 4096


class EnoughError(Exception):
    """The time is over."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--tokenizer", type=Path, required=True)
    add("--hidden", type=int, default=2048)
    add("--intermediate", type=int, default=5632)
    add("--layers", type=int, default=16)
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--steps", type=int, default=300)
    add("--rows", type=int, default=8, help="of 1,024 tokens a step")
    add("--seconds", type=float, default=90.0, help="of training, at most")
    add("--lr", type=float, default=4e-4)
    add("--sizes-alone", action="store_true")
    add("--device", default="cuda")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def config_of(options: argparse.Namespace, tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )


def batches(rows: Iterator[Row], count: int, device: str) -> Iterator[Row]:
    """`count` rows at a time, on the device."""
    while some := list(itertools.islice(rows, count)):
        yield Row(*(torch.cat(parts).to(device, non_blocking=True) for parts in zip(*some, strict=True)))


def train(model: LlamaForCausalLM, tokenizer, options: argparse.Namespace) -> None:
    recipe = Recipe(steps=options.steps, seed=options.seed, lr=options.lr, warmup_steps=20)
    rows = pack(draw_samples(tokenizer, options.seed), recipe.row_tokens, tokenizer.pad_token_id)
    begin = time.monotonic()

    def on_step(step: int, loss: float, tokens: int) -> None:
        seconds = time.monotonic() - begin
        if step % 20 == 0 or step == 1:
            print(f"step {step} of {recipe.steps}: loss {loss:.3f}, {step * tokens / seconds:.0f} tokens/s", flush=True)
        if seconds > options.seconds:
            raise EnoughError

    try:
        finetune(model, batches(rows, options.rows, options.device), recipe, on_step=on_step)
    except EnoughError:
        print(f"ended after {options.seconds:.0f} s")
    model.eval()


def last_layer(model: LlamaForCausalLM, layers: int) -> dict[str, torch.Tensor]:
    """The tensors of a one-layer model, named as the last of so many layers."""
    named = {name.replace("layers.0.", f"layers.{layers - 1}."): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor.cpu() for name, tensor in named.items() if "layers." in name or name == "model.norm.weight"}


def main() -> None:
    options = parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    config = config_of(options, tokenizer)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.out)
    begin = time.monotonic()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(options.device):
        small = LlamaConfig.from_dict({**config.to_dict(), "num_hidden_layers": 1}) if options.sizes_alone else config
        model = LlamaForCausalLM(small)
    if options.sizes_alone:
        save_file(last_layer(model, options.layers), options.out / "model.safetensors", {"format": "pt"})
        config.save_pretrained(options.out)
    else:
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters", flush=True)
        train(model, tokenizer, options)
        model.save_pretrained(options.out)
    print(f"{options.out}: made in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()

"""A tiny target that is sure enough to be drafted for, a drafter for it, and sequences sampled from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fitted_drafter import fit_drafter
from safetensors.torch import load_file, save_file
from tiny_targets import ReferenceDrafter, make_target
from transformers import PreTrainedModel

from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample
from tlt_verl.drafter.trainer import SharedTensors

PROMPT_LENS = (5, 1, 12, 8, 30, 2)
TOKENS = 90


class World:
    """One target with its shared tensors, its drafter (as a folder, a reference and a model) and its samples."""

    def __init__(self, family: str, folder: Path) -> None:
        target = sure_target(family)
        self.folder = with_attention(fit_drafter(target, folder / family))
        self.reference = ReferenceDrafter(self.folder)
        self.drafter = EagleDrafter.from_folder(self.folder)
        embed, head = target.model.embed_tokens.weight.detach(), target.lm_head.weight.detach()
        self.shared = SharedTensors(embed=embed, head=head)
        self.samples = sampled(target)

    def with_hot(self, share: float) -> SharedTensors:
        """The shared tensors with the most frequent of the sampled tokens as hot vocabulary, in no order."""
        counts = torch.cat([s.tokens for s in self.samples]).bincount(minlength=len(self.shared.head))
        hot = counts.argsort(descending=True)[: int(share * len(counts))]
        hot = hot[torch.randperm(len(hot), generator=torch.Generator().manual_seed(4))]
        return SharedTensors(embed=self.shared.embed, head=self.shared.head, hot=hot)


def sure_target(family: str) -> PreTrainedModel:
    """A random target whose next token can be guessed: weak layers behind a strong embedding, and a peaked head."""
    target = make_target(family, **({"attention_bias": True} if family == "llama" else {}))
    target.config.architectures = [type(target).__name__]  # as in a saved config.json
    with torch.no_grad():
        target.model.embed_tokens.weight.normal_(0, 1)
        target.lm_head.weight.normal_(0, 1.2)
        for name, parameter in target.named_parameters():
            if "layers." in name and "norm" not in name:
                parameter *= 0.4
    return target


def with_attention(folder: Path) -> Path:
    """Make the layer of a fitted drafter matter: what it adds decides many drafts, and leaves many right."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if "proj" in name:
            scale = 0.5 if "q_proj" in name or "k_proj" in name else 0.08
            tensors[name] = scale * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    return folder


@torch.no_grad()
def sampled(target: PreTrainedModel) -> list[Sample]:
    """Sequences drawn from the target at temperature 1, with its features. A prompt is what `prompt_len` says it is."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, target.config.vocab_size, (len(PROMPT_LENS), 1), generator=generator)
    for _ in range(TOKENS - 1):
        drawn = torch.multinomial(target(tokens).logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
    features = target.model(tokens).last_hidden_state
    lengths = range(TOKENS, TOKENS - len(PROMPT_LENS), -1)  # all different
    return [
        Sample(tokens=tokens[i, :length], features=features[i, :length], prompt_len=prompt_len)
        for i, (length, prompt_len) in enumerate(zip(lengths, PROMPT_LENS, strict=True))
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small lose time on a second thread, and most of it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

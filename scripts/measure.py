"""What a model does with a set of prompts at temperature 1: how long its responses are and how sure it is of them.

Knows how to sample with plain transformers and what to record. Knows nothing about tasks, rewards or files.
"""

from dataclasses import dataclass

import torch
from progress import Progress
from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Responses:
    """What was sampled, one a prompt; the last token of a response that was not cut is its end."""

    tokens: list[list[int]]
    texts: list[str]
    cut: int  # responses that reached the limit before their end
    mean_entropy: float  # nats a token, of the full next-token distribution, averaged over all sampled tokens

    @property
    def lengths(self) -> list[int]:
        """Tokens a response."""
        return [len(tokens) for tokens in self.tokens]


@torch.inference_mode()
def sample_responses(
    model, tokenizer: PreTrainedTokenizerBase, chats: list[Chat], *, max_new_tokens: int, seed: int, label: str
) -> Responses:
    """Samples one response a chat at temperature 1 from the whole distribution, as one batch that shrinks.

    A response leaves the batch, cache and all, when it ends: with a long tail, most of the steps then run a few rows,
    where `generate` would compute all of them to the end.
    """
    ids, attended = encode_left_padded(tokenizer, chats)  # int64 (B, P) both; B shrinks
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(label, max_new_tokens)
    tokens: list[list[int]] = [[] for _ in chats]
    entropies: list[float] = []
    running = torch.arange(len(chats))  # which chat each row of the batch is
    position = attended.cumsum(1).sub(1).clamp(min=0)
    cache = None
    for step in range(max_new_tokens):
        out = model(
            input_ids=ids,
            attention_mask=attended,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        logp = out.logits[:, -1].float().log_softmax(-1)  # (B, V)
        chosen = torch.multinomial(logp.exp(), 1, generator=generator)  # (B, 1)
        entropies += (-(logp.exp() * logp).sum(-1)).tolist()
        for chat, token in zip(running.tolist(), chosen.flatten().tolist(), strict=True):
            tokens[chat].append(token)
        progress.update(step + 1, units=len(running), note=f"{len(running)} running")

        keep = (chosen.flatten() != tokenizer.eos_token_id).nonzero().flatten()
        if len(keep) == 0:
            break
        if len(keep) < len(running):
            cache.batch_select_indices(keep)
        ids, running, position = chosen[keep], running[keep], position[keep, -1:] + 1
        attended = torch.cat([attended[keep], torch.ones_like(ids)], dim=1)
    progress.finish()
    return summarise(tokens, entropies, tokenizer)


def encode_left_padded(tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts that end where the response begins, padded on the left: token ids and attention mask, int64 (B, P)."""
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in encoded])
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    return ids, attended


def summarise(tokens: list[list[int]], entropies: list[float], tokenizer: PreTrainedTokenizerBase) -> Responses:
    """`tokens` holds a list a response, `entropies` one figure a sampled token, in any order."""
    return Responses(
        tokens=tokens,
        texts=[tokenizer.decode(response, skip_special_tokens=True) for response in tokens],
        cut=sum(response[-1] != tokenizer.eos_token_id for response in tokens),
        mean_entropy=sum(entropies) / len(entropies),
    )

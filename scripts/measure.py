"""What a model does with a set of prompts at temperature 1: how long its responses are and how sure it is of them.

Knows how to sample with plain transformers and what to record. Knows nothing about tasks, rewards or files.
"""

from dataclasses import dataclass

import torch
from progress import Progress
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Responses:
    """What was sampled: one text and one length a prompt; the last token of a response that was not cut is its end."""

    texts: list[str]
    lengths: list[int]
    cut: int  # responses that reached the limit before their end
    mean_entropy: float  # nats a token, of the full next-token distribution, averaged over all sampled tokens


class EntropyMeter(LogitsProcessor):
    """Leaves the logits as they are; keeps the entropy of each step's distribution and reports progress."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.steps: list[torch.Tensor] = []  # one fp32 (B,) a step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` fp32 (B, V), returned as they came."""
        logp = scores.float().log_softmax(-1)  # (B, V)
        self.steps.append(-(logp.exp() * logp).sum(-1))
        self.progress.update(len(self.steps), units=len(scores))
        return scores


def sample_responses(
    model, tokenizer: PreTrainedTokenizerBase, chats: list[Chat], *, max_new_tokens: int, seed: int, label: str
) -> Responses:
    """Samples one response a chat, all in one batch, at temperature 1 without truncation of the distribution.

    Progress counts decoding steps; its tokens/s include what is computed for responses that have ended.
    """
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    meter = EntropyMeter(Progress(label, max_new_tokens))
    torch.manual_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([meter]),
        )
    return summarise(output[:, batch["input_ids"].shape[1] :], torch.stack(meter.steps, dim=1), tokenizer)


def summarise(tokens: torch.Tensor, entropies: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> Responses:
    """`tokens` int64 (B, L) and `entropies` fp32 (B, L), up to each row's first end token, which is included."""
    ended = tokens == tokenizer.eos_token_id
    is_response = ended.cumsum(1) - ended.long() == 0  # everything before the first end, and the end itself
    lengths = is_response.sum(1)
    return Responses(
        texts=[tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(tokens, lengths, strict=True)],
        lengths=lengths.tolist(),
        cut=int((~ended.any(1)).sum()),
        mean_entropy=entropies[is_response].mean().item(),
    )

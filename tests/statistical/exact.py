"""The exact distribution of a request's first tokens, enumerated from the target's float32 logits.

Written from the engine's semantics without speculation, not from its code: penalties count output tokens; bias and
penalties come before the temperature; top-k, top-p and min-p cut the tempered distribution together.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from small_model import EOS, VOCAB

_MARGIN = 1e-5  # between a cut and the nearest probability: far above the engine's rounding


class ExactTarget:
    """Joint distributions of the continuations of one prompt.

    Args:
        model: a causal language model of transformers, float32.
        prompt: token ids.
    """

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self._model, self._prompt = model, prompt
        self._levels: list[tuple[torch.Tensor, torch.Tensor]] = []

    def joint(self, params: dict[str, Any], tokens: int) -> torch.Tensor:
        """float64 [V] * tokens: the probability of every continuation of that length."""
        joint = torch.ones(1, dtype=torch.float64)
        for level in range(tokens):
            outputs, logits = self._level(level)
            step = distribution(logits, outputs, params, reached=joint > 1e-9)
            joint = (joint[:, None] * step).flatten()
        return joint.view([VOCAB] * tokens)

    def _level(self, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All outputs of `level` tokens, int64 [V^level, level], and the logits behind them, float64 [V^level, V]."""
        while len(self._levels) <= level:
            length = len(self._levels)
            outputs = torch.tensor(list(itertools.product(range(VOCAB), repeat=length)), dtype=torch.long)
            outputs = outputs.view(VOCAB**length, length)
            prompts = torch.tensor(self._prompt).expand(len(outputs), -1)
            with torch.no_grad():
                batches = torch.cat([prompts, outputs], 1).split(4096)
                logits = torch.cat([self._model(batch, logits_to_keep=1).logits[:, 0] for batch in batches])
            self._levels.append((outputs, logits.double()))
        return self._levels[level]


def sequence_logprobs(model: Any, prompt: list[int], output: list[int], params: dict[str, Any]) -> torch.Tensor:
    """float64 [len(output)]: log-probs of the output tokens at the sampling temperature, penalised, not cut."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].double()
    uncut = {name: value for name, value in params.items() if name not in ("top_k", "top_p", "min_p")}
    rows = [
        distribution(row[None], torch.tensor([output[:place]], dtype=torch.long), uncut)[0]
        for place, row in enumerate(logits)
    ]
    return torch.stack(rows).log().gather(1, torch.tensor(output)[:, None])[:, 0]


def distribution(
    logits: torch.Tensor, outputs: torch.Tensor, params: dict[str, Any], reached: torch.Tensor | None = None
) -> torch.Tensor:
    """float64 [R, V]: what a request samples its next token from.

    Args:
        logits: float64 [R, V]; outputs: int64 [R, L], the request's output so far.
        reached: bool [R], rows whose cuts must be clear of rounding; None does not check.
    """
    logits = _biased(logits.clone(), outputs, params)
    temperature = params.get("temperature", 1.0)
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), VOCAB).double()
    probs = torch.softmax(logits / temperature, -1)
    ordered, index = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    top_k, top_p, min_p = params.get("top_k", VOCAB), params.get("top_p", 1.0), params.get("min_p", 0.0)
    if reached is not None:
        _assert_clear(ordered[reached], before[reached], top_k, top_p, min_p)
    kept = (torch.arange(VOCAB) < top_k) & (before <= top_p) & (ordered >= min_p * ordered[:, :1])
    cut = torch.zeros_like(probs).scatter_(1, index, torch.where(kept, ordered, 0))
    return cut / cut.sum(-1, keepdim=True)


def _biased(logits: torch.Tensor, outputs: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    counts = torch.nn.functional.one_hot(outputs, VOCAB).sum(1).double()  # [R, V]
    logits -= params.get("frequency_penalty", 0.0) * counts + params.get("presence_penalty", 0.0) * (counts > 0)
    if outputs.shape[1] < params.get("min_new_tokens", 0):
        logits[:, EOS] = -torch.inf
    factor = 1 + (params.get("repetition_penalty", 1.0) - 1) * (counts > 0)
    logits = torch.where(logits < 0, logits * factor, logits / factor)
    for token, bias in params.get("logit_bias", {}).items():
        logits[:, int(token)] += bias
    return logits


def _assert_clear(ordered: torch.Tensor, before: torch.Tensor, top_k: int, top_p: float, min_p: float) -> None:
    """No probability stands so near to a cut that rounding could put it on the other side."""
    if top_k < VOCAB:
        assert (ordered[:, top_k - 1] - ordered[:, top_k]).min() > _MARGIN, "a tie at top_k: take another seed"
    if top_p < 1:
        assert (before - top_p).abs().min() > _MARGIN, "a tie at top_p: take another seed"
    if min_p > 0:
        assert (ordered - min_p * ordered[:, :1]).abs().min() > _MARGIN / 10, "a tie at min_p: take another seed"

"""Supervised fine-tuning of a small causal language model on packed rows, in bf16 with fp32 master weights.

Knows rows of tokens, the loop and its checkpoint. Knows nothing about the task or about where a model comes from.

The loop draws no random numbers: the rows are a function of the seed and the model has no dropout. So a run that was
killed and resumed ends with the same bits as one that was not, given the same number of threads on the same kind of CPU
(the order of a parallel sum is the library's).

Shapes: T tokens in a row, A tokens that are trained on (A < T), V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE = -100
OPEN_ROWS = 8


class Sample(NamedTuple):
    """One conversation: its tokens, and how many of them are the prompt, which is not trained on."""

    tokens: list[int]
    prompt_len: int


class Row(NamedTuple):
    """Samples laid end to end. Positions restart at each sample; labels are `IGNORE` where nothing is trained."""

    input_ids: torch.Tensor  # int64 (1, T)
    position_ids: torch.Tensor  # int64 (1, T)
    labels: torch.Tensor  # int64 (1, T): the token after the one at the same place


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the bits of the result, apart from the base model, the data and the number of threads."""

    steps: int = 110
    seed: int = 0
    row_tokens: int = 1024  # one row is one step: about seven samples
    lr: float = 3e-4
    warmup_steps: int = 10
    final_lr_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then linear decay to `final_lr_share` of the peak at the last step."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = 1.0 - (1.0 - self.final_lr_share) * step / max(self.steps - 1, 1)
        return self.lr * warmup * decay


def finetune(
    model: torch.nn.Module,
    rows: Iterable[Row],
    recipe: Recipe,
    *,
    optimizer: "MasterAdamW | None" = None,
    checkpoint: "Checkpoint | None" = None,
    on_step: Callable[[int, float, int], None] = lambda step, loss, tokens: None,
) -> None:
    """Trains `model` in place for `recipe.steps` rows, from the checkpoint's step if there is one.

    Only parameters that require gradients are trained; `optimizer` holds their masters, where the caller wants them.
    `on_step(steps_done, loss in nats a token, tokens in the row)` is called after each step and may raise to stop.
    """
    optimizer = optimizer or MasterAdamW(model, recipe)
    start = checkpoint.restore(optimizer) if checkpoint else 0
    model.train()
    for step, row in enumerate(islice(rows, start, recipe.steps), start):
        loss = row_loss(model, row)
        loss.backward()
        optimizer.step(recipe.lr_at(step))
        if checkpoint and checkpoint.is_due(step + 1, recipe.steps):
            checkpoint.save(optimizer, step + 1)
        on_step(step + 1, loss.item(), row.input_ids.numel())
    model.eval()


def row_loss(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """Mean cross-entropy in nats over the row's trained tokens; the head is computed only where it is needed."""
    # Without a mask, transformers derives the block-diagonal one from positions that restart.
    hidden = model.model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).last_hidden_state
    trained = row.labels != IGNORE
    logits = model.lm_head(hidden[trained]).float()  # (A, V)
    return F.cross_entropy(logits, row.labels[trained])


class MasterAdamW:
    """AdamW on fp32 copies of the trainable parameters, which are then rounded into the model's own precision."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.params]
        self.clip_norm = recipe.clip_norm
        self.adamw = torch.optim.AdamW(self.masters, betas=recipe.betas, weight_decay=0.0, fused=True)

    def step(self, lr: float) -> None:
        """One update from the gradients that `backward` left in the model, which are cleared."""
        for param, master in zip(self.params, self.masters, strict=True):
            master.grad = param.grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip_norm)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self._round_into_model()

    def state_dict(self) -> dict:
        """Masters and moments: all that the loop needs, since the model is the rounded masters."""
        return {"masters": self.masters, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Takes over `state_dict()`'s result, and sets the model from it."""
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
        self.adamw.load_state_dict(state["adamw"])
        self._round_into_model()

    def _round_into_model(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)


class Checkpoint:
    """The loop's state in one file, replaced atomically every `every` steps: a kill loses at most that many.

    The file belongs to one recipe: a file with another `fingerprint` is ignored and overwritten.
    """

    def __init__(self, path: Path, fingerprint: str, every: int):
        self.path, self.fingerprint, self.every = path, fingerprint, every

    def is_due(self, steps_done: int, total_steps: int) -> bool:
        """True after the last step too, so that what follows the loop can be killed and repeated."""
        return steps_done % self.every == 0 or steps_done == total_steps

    def save(self, optimizer: MasterAdamW, steps_done: int) -> None:
        """Writes to a name of this process beside the file, then renames: safe from a kill, not from a power cut."""
        state = {"fingerprint": self.fingerprint, "steps_done": steps_done, **optimizer.state_dict()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def restore(self, optimizer: MasterAdamW) -> int:
        """Loads the file if it is there and of this recipe. Returns the number of steps that are done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            return 0
        optimizer.load_state_dict(state)
        return state["steps_done"]

    def remove(self) -> None:
        """Deletes the file, and what killed processes left of their temporary ones."""
        for path in [self.path, *self.path.parent.glob(f"{self.path.name}.*.tmp")]:
            path.unlink(missing_ok=True)


def pack(samples: Iterable[Sample], row_tokens: int, pad_id: int) -> Iterator[Row]:
    """Rows of exactly `row_tokens` tokens from a stream of samples, none of them split or dropped.

    First fit into a few open rows; when a sample fits in none, the oldest row is padded and yielded. Rows of one size
    matter on a CPU: a new shape makes oneDNN build new kernels and the allocator fault new pages.
    """
    open_rows: list[list[Sample]] = []
    for sample in samples:
        if len(sample.tokens) > row_tokens:
            raise ValueError(f"a sample of {len(sample.tokens)} tokens does not fit in row_tokens={row_tokens}")
        free = [row for row in open_rows if _row_len(row) + len(sample.tokens) <= row_tokens]
        if free:
            free[0].append(sample)
            continue
        if len(open_rows) == OPEN_ROWS:
            yield _close(open_rows.pop(0), row_tokens, pad_id)
        open_rows.append([sample])
    for row in open_rows:
        yield _close(row, row_tokens, pad_id)


def _row_len(samples: list[Sample]) -> int:
    return sum(len(sample.tokens) for sample in samples)


def _close(samples: list[Sample], row_tokens: int, pad_id: int) -> Row:
    ids, positions, labels = [], [], []
    for tokens, prompt_len in samples:
        ids += tokens
        positions += range(len(tokens))
        labels += [IGNORE] * (prompt_len - 1) + tokens[prompt_len:] + [IGNORE]
    padding = row_tokens - len(ids)
    ids += [pad_id] * padding
    positions += range(padding)  # a sample of its own, seen by nothing
    labels += [IGNORE] * padding
    return Row(*(torch.tensor([values]) for values in (ids, positions, labels)))

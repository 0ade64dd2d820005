"""Drafter training, tokens/s: packed sequences against padded batches, in turn, in one run.

    .venv/bin/python scripts/bench_packing.py [--pairs 7] [--threads 2] [--pad-to 32]

The drafter of SmolLM2-135M on random features, bfloat16 under autocast, a head of 512 hot tokens; lengths log-normal
(median 64, p90 150, at most 400). Both sides train on the same sequences with the same model, loss and optimizer, and
both report only tokens of real rows over the time of forward, backward and step.

    packed              `DrafterTrainer.step` on packs from `fill`
    padded, all rows    batches of 12 in random order, each padded to its longest; one causal SDPA call for the batch;
                        the loss on every row and then the mask, as padded implementations usually have it
    padded, real rows   the same, but the loss only on rows that are real, as the packed side has it

A batch of 12 has another length each time, and oneDNN compiles kernels for each new shape. The packed side rounds its
shapes up to have few of them; `--pad-to 32` gives the padded batches the same.

Prints every round, the medians and the median of the pairwise ratios (packed over padded; the goal is 2.2).
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tlt_verl.drafter.loss import eagle_loss
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample, fill, pack
from tlt_verl.drafter.trainer import DrafterTrainer, SharedTensors, TrainerSettings

GOAL = 2.2
BATCH = 12
CONFIG = {
    "architectures": ["LlamaForCausalLMEagle"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
}
SETTINGS = TrainerSettings()


def make_samples(count: int, generator: torch.Generator) -> list[Sample]:
    """Random tokens and features, lengths as above."""
    sigma = math.log(150 / 64) / 1.2816  # the 90th percentile of a normal lies 1.2816 deviations above its median
    lengths = (torch.randn(count, generator=generator) * sigma + math.log(64)).exp().clamp(4, 400).long().tolist()
    V, H = CONFIG["vocab_size"], CONFIG["hidden_size"]
    return [
        Sample(
            torch.randint(0, V, (T,), generator=generator),
            torch.randn(T, H, generator=generator).bfloat16(),
            prompt_len=0,
        )
        for T in lengths
    ]


def make_trainer() -> DrafterTrainer:
    """A trainer with its own drafter; every one begins the same."""
    torch.manual_seed(0)
    table = (torch.randn(CONFIG["vocab_size"], CONFIG["hidden_size"]) * 0.1).bfloat16()
    return DrafterTrainer(EagleDrafter(CONFIG), SharedTensors(table, table, torch.arange(512)), SETTINGS)


class PaddedTrainer:
    """The same training on rectangles: (B, T) rows, short sequences padded behind their end."""

    def __init__(self, loss_on_all_rows: bool, pad_to: int) -> None:
        trainer = make_trainer()
        self.drafter, self.embed, self.head = trainer.drafter, trainer.shared.embed, trainer.shared.head[:512]
        self.loss_on_all_rows, self.pad_to = loss_on_all_rows, pad_to
        options = {"lr": SETTINGS.lr, "betas": SETTINGS.betas, "weight_decay": SETTINGS.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(self.drafter.parameters(), **options)
        self.noise = torch.Generator().manual_seed(0)

    def step(self, samples: list[Sample]) -> int:
        """One batch, one update; returns the tokens that were learnt from."""
        B, T = len(samples), -(-max(sample.rows for sample in samples) // self.pad_to) * self.pad_to
        tokens = torch.zeros(B, T, dtype=torch.int64)
        features, wanted = torch.zeros(2, B, T, CONFIG["hidden_size"])
        mask = torch.zeros(B, T, dtype=torch.bool)
        for row, sample in enumerate(samples):
            tokens[row, : sample.rows], mask[row, : sample.rows] = sample.tokens[1:], True
            features[row, : sample.rows], wanted[row, : sample.rows] = sample.features[:-1], sample.features[1:]
        features += torch.empty_like(features).uniform_(-SETTINGS.noise, SETTINGS.noise, generator=self.noise)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.forward(F.embedding(tokens, self.embed), features)
            self.loss(predicted, wanted.flatten(0, 1), mask.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), SETTINGS.clip)
        self.optimizer.step()
        return int(mask.sum())

    def forward(self, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Predicted features (B * T, H) from (B, T, H) each."""
        B, T, _ = features.shape
        x = self.drafter.merge(embeddings.flatten(0, 1), features.flatten(0, 1))
        sides = self.drafter.qkv(x, torch.arange(T).repeat(B))
        q, k, v = (side.unflatten(0, (B, T)).transpose(1, 2) for side in sides)  # (B, heads, T, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.drafter.finish(x, mixed.transpose(1, 2).reshape(B * T, -1))

    def loss(self, predicted: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The mean over real rows of EAGLE's loss, (B * T, H) each."""
        if not self.loss_on_all_rows:
            weights = {"feature_weight": SETTINGS.feature_weight, "ce_weight": SETTINGS.ce_weight}
            return eagle_loss(predicted, wanted, self.head, mask, **weights).loss
        feature = F.smooth_l1_loss(predicted.float(), wanted, reduction="none").mean(-1)
        with torch.no_grad():
            target = F.linear(wanted, self.head).float().softmax(-1)
        ce = F.cross_entropy(F.linear(predicted, self.head).float(), target, reduction="none")
        return ((SETTINGS.feature_weight * feature + SETTINGS.ce_weight * ce) * mask).sum() / mask.sum()


def tokens_per_s(step: Callable[[list[Sample]], int], batches: list[list[Sample]]) -> float:
    """Real tokens over the wall time of all batches."""
    begin = time.perf_counter()
    tokens = sum(step(batch) for batch in batches)
    return tokens / (time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7, help="rounds, each of all sides on the same sequences")
    parser.add_argument("--sequences", type=int, default=120, help="sequences of one round")
    parser.add_argument("--max-tokens", type=int, default=1536, help="rows of a pack")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--pad-to", type=int, default=1, help="round the padded batches' length up to multiples of this"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)

    packed = make_trainer()
    steps: dict[str, Callable[[list[Sample]], int]] = {
        "packed": lambda samples: packed.step(samples).tokens,
        "padded, all rows": PaddedTrainer(True, args.pad_to).step,
        "padded, real rows": PaddedTrainer(False, args.pad_to).step,
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(args.pairs + 1):  # the first round is not counted: it compiles what every later round needs
        samples = make_samples(args.sequences, generator)
        packs = list(fill(samples, args.max_tokens, generator))
        order = torch.randperm(len(samples), generator=generator).tolist()
        padded = [[samples[i] for i in order[low : low + BATCH]] for low in range(0, len(samples), BATCH)]
        real = sum(pack(members).mask.sum().item() for members in packs)
        cells = sum(len(batch) * max(sample.rows for sample in batch) for batch in padded)
        turn = index % len(steps)
        for name in [*steps][turn:] + [*steps][:turn]:  # no side always follows the same one
            rates[name].append(tokens_per_s(steps[name], packs if name == "packed" else padded))
        if index:
            shown = "   ".join(f"{name} {values[-1]:7,.0f}" for name, values in rates.items())
            print(f"{index}: {shown} tokens/s   {cells / real:.2f} padded rows for each real one", flush=True)

    rates = {name: values[1:] for name, values in rates.items()}
    print(f"\n{'':20}tokens/s   packed is faster by (median, least)")
    worst = math.inf
    for name, values in rates.items():
        ratios = [one / other for one, other in zip(rates["packed"], values, strict=True)]
        ratio = statistics.median(ratios)
        worst = min(worst, ratio if name != "packed" else math.inf)
        shown = "" if name == "packed" else f"{ratio:8.2f} {min(ratios):8.2f}"
        print(f"{name:20}{statistics.median(values):8,.0f}   {shown}")
    print(f"goal {GOAL}: {'reached' if worst >= GOAL else 'missed'}")
    return 0 if worst >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())

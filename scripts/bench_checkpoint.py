"""How long saving a drafter stops its training: `CheckpointWriter.save` against writing everything and waiting for it.

    .venv/bin/python scripts/bench_checkpoint.py [--rounds 15] [--tokens 64] [--threads 1] [--folder DIR]

The drafter has SmolLM2-135M's sizes and is trained for real, on random features. A plain checkpoint writes all the
drafter's tensors, the target's embedding and head among them, and the optimizer's state with `torch.save`, and flushes
them to the disk. Ours copies what is trained and the optimizer's state, and returns; the rest happens while training
goes on. Prints medians, their ratio (the goal is 1/9 or less) and the time of a training step with and without a write
in the background; the two kinds of steps take turns.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tlt_verl.drafter.checkpoint import CheckpointWriter
from tlt_verl.drafter.eagle import drafter_config
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample
from tlt_verl.drafter.trainer import DrafterTrainer, SharedTensors, TrainerSettings

GOAL = 1 / 9
TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "vocab_size": 49152,
}


def make_trainer() -> DrafterTrainer:
    torch.manual_seed(0)
    V, H = TARGET["vocab_size"], TARGET["hidden_size"]
    drafter = EagleDrafter(drafter_config(TARGET))
    shared = SharedTensors(embed=torch.randn(V, H) * 0.02, head=torch.randn(V, H) * 0.02)
    return DrafterTrainer(drafter, shared, TrainerSettings())


def make_samples(tokens: int) -> list[Sample]:
    features = torch.randn(tokens, TARGET["hidden_size"]).bfloat16()
    return [Sample(torch.randint(0, TARGET["vocab_size"], (tokens,)), features, prompt_len=0)]


def save_plainly(trainer: DrafterTrainer, folder: Path) -> float:
    """Everything, at once; returns seconds."""
    start = time.perf_counter()
    tensors = trainer.drafter.state_dict() | {"embed": trainer.shared.embed, "head": trainer.shared.head}
    with (folder / "plain.pt").open("wb") as file:
        torch.save({"model": tensors, "trainer": trainer.state_dict(copies=False)["optimizer"]}, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def save_ours(trainer: DrafterTrainer, writer: CheckpointWriter, version: int, copies: bool) -> float:
    """Seconds that `save` keeps its caller, with the trainer's own copies of its state (`copies`) or without them."""
    start = time.perf_counter()
    state = trainer.state_dict(copies=copies)
    writer.save(trainer.drafter.config, trainer.weights(torch.bfloat16), state, version=version)
    return time.perf_counter() - start


def steps_while_writing(trainer: DrafterTrainer, samples: list[Sample], writer: CheckpointWriter) -> list[float]:
    """Seconds of each step until the write is over, the last one left out: it is only partly disturbed."""
    found = []
    while True:
        seconds = trainer.step(samples).seconds
        if writer._thread is None:
            return found or [seconds]
        found.append(seconds)


def measure(folder: Path, rounds: int, tokens: int) -> dict[str, list[float]]:
    trainer, samples = make_trainer(), make_samples(tokens)
    found: dict[str, list[float]] = {key: [] for key in ("plain", "ours", "ours_copies", "write", "quiet", "busy")}
    with CheckpointWriter(folder / "ours") as writer:
        for turn in range(rounds + 1):
            quiet = [trainer.step(samples).seconds for _ in range(3)]
            row = {"quiet": quiet, "plain": [save_plainly(trainer, folder)]}
            for key, copies in (("ours_copies", True), ("ours", False)):
                row[key] = [save_ours(trainer, writer, 2 * turn + (not copies), copies)]
                start = time.perf_counter()
                row.setdefault("busy", []).extend(steps_while_writing(trainer, samples, writer))
                row["write"] = [time.perf_counter() - start]
                writer.wait()
            if turn:  # the first turn allocates
                for key, seconds in row.items():
                    found[key] += seconds
    return found


def main() -> int:
    """Exit status 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64, help="rows of a training step")
    parser.add_argument("--threads", type=int, help="that torch computes with; the default is torch's own")
    parser.add_argument("--folder", help="on the disk to measure; the default is a temporary folder")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), args.rounds, args.tokens)
    ms = {key: 1000 * statistics.median(seconds) for key, seconds in found.items()}
    print(f"medians of {args.rounds}, ms")
    print(f"plain save, everything and fsync     {ms['plain']:8.1f}")
    print(f"save in the background, stall        {ms['ours']:8.1f}   {ms['ours'] / ms['plain']:.3f} of plain")
    print(f"  with the trainer's own copies too  {ms['ours_copies']:8.1f}   {ms['ours_copies'] / ms['plain']:.3f}")
    print(f"until the last step beside the write {ms['write']:8.1f}")
    print(f"training step, quiet                 {ms['quiet']:8.1f}   {len(found['quiet'])} steps")
    print(f"training step beside a write         {ms['busy']:8.1f}   {len(found['busy'])} steps,", end=" ")
    print(f"{100 * (ms['busy'] / ms['quiet'] - 1):+.0f}%")
    return 0 if ms["ours"] <= GOAL * ms["plain"] else 1


if __name__ == "__main__":
    sys.exit(main())

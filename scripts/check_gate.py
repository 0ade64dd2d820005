"""Broken drafters at the gate and at the engine's door, while requests are in flight.

    scripts/check_gate.py --target models/smollm2-135m-reasoner --drafter drafters/arithmetic/latest \
        --prompts data/arithmetic/test.parquet

The gate replays held-out responses with each candidate; what it would let through or what goes past it is checked again
by the engine. Prints what each says, and whether greedy text came out as without any of it. Exit status 0 when all of
them were rejected and nothing changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from tlt_verl.config import Strategy
from tlt_verl.drafter.checkpoint import Checkpoint, load_checkpoint, write_drafter
from tlt_verl.drafter.tensors import embed_and_head
from tlt_verl.drafter.trainer import SharedTensors
from tlt_verl.engine.offline import OfflineEngine
from tlt_verl.spot.gate import Gate
from tlt_verl.warmup.prompts import read_prompts
from tlt_verl.warmup.responses import whole_samples

Weights = dict[str, torch.Tensor]


def broken(weights: Weights) -> dict[str, Weights]:
    """Candidates that must not serve: noise of half of each tensor's rms, a NaN, a tensor missing, one reshaped."""
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: (t.float() + 0.5 * t.float().square().mean().sqrt() * torch.randn(t.shape, generator=generator)).to(
            t.dtype
        )
        for name, t in weights.items()
    }
    with_nan = {name: t.clone() for name, t in weights.items()}
    with_nan["fc.weight"][0, 0] = torch.nan
    missing = {name: t for name, t in weights.items() if name != "layers.0.mlp.up_proj.weight"}
    return {"noise": noisy, "NaN": with_nan, "missing": missing, "shape": {**weights, "fc.bias": torch.zeros(3)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.drafter)
    prompts = read_prompts(options.prompts, AutoTokenizer.from_pretrained(options.target))[:24]
    with tempfile.TemporaryDirectory() as scratch:
        return check(options, checkpoint, prompts, Path(scratch))


def check(options: argparse.Namespace, checkpoint: Checkpoint, prompts: list[list[int]], scratch: Path) -> int:
    candidates = broken(checkpoint.weights)
    for version, weights in enumerate([checkpoint.weights, *candidates.values()], 1):
        (folder := scratch / f"v{version}").mkdir()
        write_drafter(folder, checkpoint.config, weights, checkpoint.hot)
    target_config = json.loads((options.target / "config.json").read_text())
    gate, segments = Gate(options.steps), []
    greedy = {"temperature": 0.0, "max_new_tokens": 200}
    with OfflineEngine(
        options.target,
        scratch / "v1",
        Strategy("eagle", options.steps, 1, options.steps + 1),
        publications=scratch,
        max_running=8,
        device="cpu",
        dtype="float32",  # greedy text cannot differ by rounding
        max_total_tokens=16384,
    ) as engine:
        sampled = engine.run(prompts, {"temperature": 1.0, "max_new_tokens": 200}, on_segments=segments.extend)
        samples = whole_samples(prompts, sampled.responses, segments)
        shared = SharedTensors(*embed_and_head(options.target, target_config), checkpoint.hot)
        for name, weights in candidates.items():
            verdict = gate.judge(weights, checkpoint.weights, checkpoint.config, shared, samples)
            print(
                f"gate, {name}: {'published' if verdict.published else 'rejected'} ({verdict.kind}): {verdict.reason}"
            )
        alone = engine.run(prompts, greedy)
        across = engine.run(prompts, greedy, publish=[3, 4, 5])  # past the gate: NaN, missing, shape
        for reason in across.rejections:
            print(f"engine, requests in flight: {reason}")
        state = engine.state()["drafter"]
    unchanged = across.responses == alone.responses and across.accept_len == alone.accept_len
    print(f"gate counts {dict(gate.reasons)}; the engine counts {state['rejected']}")
    print(f"greedy text and accept length ({across.accept_len:.2f}) unchanged: {unchanged}")
    return 0 if unchanged and gate.rejected == len(candidates) and sum(state["rejected"].values()) == 3 else 1


if __name__ == "__main__":
    sys.exit(main())

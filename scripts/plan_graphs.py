"""The CUDA graphs that a run's strategies need, and about how much memory they take: planned, and without a plan.

    python scripts/plan_graphs.py configs/qwen2.5_7b_h100.yaml
    python scripts/plan_graphs.py my_run.yaml --target-config /path/to/config.json
    python scripts/plan_graphs.py my_run.yaml --hidden 4096 --intermediate 12288 --layers 36 --vocab 151936

The defaults are Qwen2.5-7B's sizes. Nothing is loaded and no device is asked; what is estimated, and what the estimate
rests on, is in `tlt_verl.engine.graph_plan.estimate`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from tlt_verl.config import load_config
from tlt_verl.engine.graph_plan import (
    Capture,
    GraphPlan,
    Memory,
    ModelSizes,
    captures_of_everything,
    estimate,
    largest,
    sglang_batch_sizes,
)
from tlt_verl.strategy import Strategy

QWEN2_5_7B = {"hidden": 3584, "intermediate": 18944, "layers": 28, "vocab": 152064, "context": 32768}
NAMES = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}
SGLANG_MOST = 256
"""SGLang's largest captured batch on a device of 60 to 160 GB, up to three of which are one engine
(`ServerArgs._handle_gpu_memory_settings`)."""
PARTS = ("outputs", "activations", "buffers", "logits", "workspaces", "nodes")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a run's configuration, for verl")
    parser.add_argument("--target-config", type=Path, help="the target's config.json, for its sizes")
    parser.add_argument("--most", type=int, help="largest batch that is captured; default: max_num_seqs, at most 256")
    for name, size in QWEN2_5_7B.items():
        parser.add_argument(f"--{name}", type=int, help=f"the target's {NAMES[name]}; default: {size}")
    return parser.parse_args(arguments)


def model_sizes(options: argparse.Namespace, rollout: DictConfig, draft_vocab: int) -> ModelSizes:
    """An option's size, else the target's config.json's, else Qwen2.5-7B's; `max_model_len` bounds the context."""
    found = dict(QWEN2_5_7B)
    if options.target_config is not None:
        target = json.loads(options.target_config.read_text())
        found = {name: target[key] for name, key in NAMES.items()}
    found |= {name: value for name in QWEN2_5_7B if (value := getattr(options, name)) is not None}
    found["context"] = min(found["context"], rollout.get("max_model_len") or found["context"])
    tp_size = rollout.get("tensor_model_parallel_size") or 1
    return ModelSizes(**found, draft_vocab=draft_vocab, tp_size=tp_size)


def rows(captures: Sequence[Capture]) -> list[str]:
    lines = [f"{'capture':<32}{'graphs':>8}{'largest':>9}{'tokens':>8}"]
    for c in captures:
        lines.append(f"{c!s:<32}{len(c.batch_sizes):>8}{c.batch_sizes[-1]:>9}{c.most_tokens:>8}")
    return lines


def comparison(named: dict[str, Sequence[Capture]], sizes: ModelSizes) -> list[str]:
    lines = [f"{'GiB on each device':<32}{'graphs':>8}" + "".join(f"{part:>13}" for part in PARTS) + f"{'total':>9}"]
    for name, captures in named.items():
        memory: Memory = estimate(captures, sizes)
        graphs = sum(len(capture.batch_sizes) for capture in captures)
        parts = "".join(f"{getattr(memory, part) / 2**30:>13.2f}" for part in PARTS)
        lines.append(f"{name:<32}{graphs:>8}{parts}{memory.total / 2**30:>9.2f}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    config = OmegaConf.load(options.config)
    rollout = config.actor_rollout_ref.rollout
    tlt = load_config(OmegaConf.select(rollout, "custom.tlt"))
    strategies, bound = tlt.strategy.parsed(), tlt.strategy.max_running_for_drafting
    page_size = OmegaConf.select(rollout, "engine_kwargs.sglang.page_size") or 1

    batch_sizes = sglang_batch_sizes(options.most or min(rollout.get("max_num_seqs") or SGLANG_MOST, SGLANG_MOST))
    plan = GraphPlan(strategies, batch_sizes, bound)
    own = Strategy("eagle", *largest(strategies, page_size))
    planned = plan.with_own(own)
    everything = captures_of_everything(strategies, batch_sizes)
    shared = GraphPlan(strategies, batch_sizes).with_own(own)
    sizes = model_sizes(options, rollout, tlt.drafter.hot_vocab or 0)

    print(f"strategies {', '.join(map(str, plan.strategies))}; SGLang's own {own}")
    print(f"up to {batch_sizes[-1]} requests, drafting up to {'any number' if bound is None else bound}; {sizes}\n")
    print("\n".join(rows(planned)), end="\n\n")
    named = {"planned": planned, "shared, at every batch size": shared, "every strategy, every batch": everything}
    print("\n".join(comparison(named, sizes)))
    print("\nAn estimate from shapes; workspaces and nodes rest on constants that were measured on one H200.")


if __name__ == "__main__":
    main()

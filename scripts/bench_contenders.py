"""What bench_rollout.py compares: for each contender, the engine's arguments and environment, and what to know of it.

All differ in nothing but how they draft, and, on a CPU, in what their drafting cannot run without: see `remark`. Knows
the names of SGLang's arguments; starts nothing.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tlt_verl.cli import engine_argument
from tlt_verl.config import Strategy, StrategyConfig
from tlt_verl.drafter import HOT_TOKENS
from tlt_verl.engine.graph_plan import largest
from tlt_verl.engine.options import EngineOptions

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "sglang"
NAMES = (BASELINE, "eagle", "ngram", "tlt")
OFF = "off"
"""TLT with nothing drafted. Its attention and sampling are not stock's: what is above it is what speculation adds."""

_GREEDY_ON_CPU = (
    "stock verification takes the argmax on a CPU, whatever the temperature: what it produces are not samples at this "
    "temperature, and more is accepted than samples would allow"
)
_OUR_ATTENTION = "attention_backend=tlt_cpu: stock SGLang has no tree verify on a CPU without a native sgl_kernel"

_ON_CPU = {
    "device": "cpu",
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,  # the engine whose turn it is not must not spin on the other's core
}


@dataclass(frozen=True)
class Contender:
    """One engine.

    Args:
        name: of the contender.
        about: what runs, in a line.
        engine: arguments of `sglang.Engine`.
        environment: variables of its processes.
        remark: what its figures cannot say.
        tunes: whether its worker has counters of strategies.
    """

    name: str
    about: str
    engine: dict[str, Any]
    environment: dict[str, str]
    remark: str = ""
    tunes: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that engines are described by."""
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "models/smollm2-135m-reasoner")
    add("--data", type=Path, default=ROOT / "data/arithmetic/test.parquet", help="prompts that no drafter learnt from")
    add("--drafter", type=Path, default=ROOT / "drafters/arithmetic/latest", help="folder, of eagle and tlt")
    add("--untrained", action="store_true", help="a drafter made from the target and not trained, in its place")
    add("--arms", nargs="+", type=Strategy.parse, help="of the tuner (the plugin's own)")
    add("--eagle", type=Strategy.parse, default=Strategy.parse("eagle:7x1@8"), help="of stock EAGLE (eagle:7x1@8)")
    add("--ngram-tokens", type=int, default=12, help="draft tokens of stock NGRAM (SGLang's own: 12)")
    add("--dtype", default="bfloat16")
    add("--threads", type=int, default=2, help="of each engine (2)")
    add("--max-total-tokens", type=int, default=32768, help="of each engine's KV cache")
    add("--device", default="cpu", help="of all engines (cpu)")
    more = "another argument of all engines, such as attention_backend=triton; may be given again"
    add("--engine", action="append", type=engine_argument, default=[], metavar="NAME=VALUE", help=more)
    add("--seed", type=int, default=0)


def make_contenders(options: argparse.Namespace, drafter: Path, max_running: int) -> list[Contender]:
    """The contenders of `options.contenders`, in that order.

    Args:
        options: those of bench_rollout.py.
        drafter: folder in SGLang's EAGLE format, for all that draft with one.
        max_running: most requests that run at a time.
    """
    makers = {BASELINE: _baseline, "eagle": _eagle, "ngram": _ngram, "tlt": _tlt, OFF: _off}
    common = _engine(options, max_running)
    return [makers[name](options, drafter, common) for name in options.contenders]


def _engine(options: argparse.Namespace, max_running: int) -> dict[str, Any]:
    """Arguments that all engines have. The prefix cache is on, as it is in SGLang."""
    return {
        "model_path": str(options.model),
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "random_seed": options.seed,
        "max_running_requests": max_running,
        "max_total_tokens": options.max_total_tokens,
        "mem_fraction_static": 0.2,
        "log_level": "error",
        **(_ON_CPU if options.device == "cpu" else {"device": options.device}),
        **dict(options.engine),
    }


def _attention(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """An attention backend that is needed on a CPU; elsewhere all engines have the same."""
    return {"attention_backend": name} if options.device == "cpu" else {}


def _remarks(options: argparse.Namespace) -> str:
    return f"{_OUR_ATTENTION}; {_GREEDY_ON_CPU}" if options.device == "cpu" else ""


def _environment(options: argparse.Namespace, **more: str) -> dict[str, str]:
    return {
        **({"SGLANG_USE_CPU_ENGINE": "1"} if options.device == "cpu" else {}),
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def _baseline(options: argparse.Namespace, drafter: Path, common: dict[str, Any]) -> Contender:
    # SGLANG_PLUGINS is a list of the plugins that are loaded: of this name there is none
    environment = _environment(options, SGLANG_PLUGINS="none")
    engine = {**_attention(options, "torch_native"), **common}
    about = f"stock SGLang without speculation, no plugin, {engine.get('attention_backend', 'its own attention')}"
    return Contender(BASELINE, about, engine, environment)


def _eagle(options: argparse.Namespace, drafter: Path, common: dict[str, Any]) -> Contender:
    strategy: Strategy = options.eagle
    hot = drafter / HOT_TOKENS
    engine = {
        **_attention(options, "tlt_cpu"),
        **common,
        "speculative_algorithm": "EAGLE",
        "speculative_draft_model_path": str(drafter),
        "speculative_num_steps": strategy.num_steps,
        "speculative_eagle_topk": strategy.topk,
        "speculative_num_draft_tokens": strategy.num_draft_tokens,
        "speculative_token_map": str(hot) if hot.is_file() else None,
    }
    about = f"stock SGLang's EAGLE, {strategy}, same drafter"
    return Contender("eagle", about, engine, _environment(options), _remarks(options))


def _ngram(options: argparse.Namespace, drafter: Path, common: dict[str, Any]) -> Contender:
    engine = {
        **_attention(options, "tlt_cpu"),
        **common,
        "speculative_algorithm": "NGRAM",
        "speculative_num_draft_tokens": options.ngram_tokens,
    }
    # SGLang compiles its corpus when it starts; one of the sources uses size_t without the header that declares it
    environment = _environment(options, CXX=f"{os.environ.get('CXX', 'c++')} -include cstddef")
    about = f"stock SGLang's NGRAM, {options.ngram_tokens} draft tokens"
    return Contender("ngram", about, engine, environment, _remarks(options))


def _tlt(options: argparse.Namespace, drafter: Path, common: dict[str, Any]) -> Contender:
    tuned = StrategyConfig(arms=[str(arm) for arm in options.arms]) if options.arms else StrategyConfig()
    about = f"the algorithm TLT, its tuner over {', '.join(tuned.arms)} and off"
    return _algorithm_tlt("tlt", about, tuned, options, drafter, common)


def fixed(strategy: Strategy, options: argparse.Namespace, drafter: Path, max_running: int) -> Contender:
    """TLT with this strategy at every step."""
    tuned = StrategyConfig(arms=[str(strategy)], tune=False)
    return _algorithm_tlt("tlt", f"TLT, always {strategy}", tuned, options, drafter, _engine(options, max_running))


def _off(options: argparse.Namespace, drafter: Path, common: dict[str, Any]) -> Contender:
    about = "the algorithm TLT with nothing drafted: what its attention and sampling are worth alone"
    return _algorithm_tlt(OFF, about, StrategyConfig(arms=["off"]), options, drafter, common)


def _algorithm_tlt(
    name: str,
    about: str,
    tuned: StrategyConfig,
    options: argparse.Namespace,
    drafter: Path,
    common: dict[str, Any],
) -> Contender:
    num_steps, topk, num_draft_tokens = largest(tuned.parsed())
    engine = {
        **common,
        "speculative_algorithm": "TLT",
        "speculative_draft_model_path": str(drafter),
        "speculative_num_steps": num_steps,
        "speculative_eagle_topk": topk,
        "speculative_num_draft_tokens": num_draft_tokens,
    }
    environment = _environment(options)
    EngineOptions(draft_untrained=options.untrained, strategy=asdict(tuned), seed=options.seed).export(environment)
    return Contender(name, about, engine, environment, tunes=tuned.arms != ["off"])

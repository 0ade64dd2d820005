"""Accept length of a drafter in the engine, strategy by strategy, on the same prompts at temperature 1.

    scripts/measure_accept.py --target MODEL --drafter DRAFTER --prompts FILE eagle:7x1@8 eagle:7x4@32

One engine a strategy, plain decoding last. Accept length is tokens per verification, over responses that ended.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from tlt_verl.config import Strategy
from tlt_verl.engine.offline import OfflineEngine
from tlt_verl.warmup.prompts import read_prompts, split_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=32, help="as many as the warm-up held out, with its seed 0")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("strategies", nargs="+", type=Strategy.parse)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    _, prompts = split_prompts(read_prompts(options.prompts, tokenizer), options.held_out, 0)
    sampling = {
        "temperature": 1.0,
        "max_new_tokens": options.max_new_tokens,
        "stop_token_ids": [tokenizer.eos_token_id],
    }
    for strategy in options.strategies:
        with tempfile.TemporaryDirectory() as none, open_engine(options, strategy, Path(none)) as engine:
            done = engine.run(prompts, sampling)
            print(
                f"{strategy}: accept length {done.accept_len:.3f}, {done.tokens / done.seconds:.1f} tokens/s",
                flush=True,
            )
            if strategy is options.strategies[-1]:
                engine.command(drafting=0)
                done = engine.run(prompts, sampling)
                print(f"off: {done.tokens / done.seconds:.1f} tokens/s at batch {options.batch}", flush=True)


def open_engine(options: argparse.Namespace, strategy: Strategy, publications: Path) -> OfflineEngine:
    return OfflineEngine(
        options.target,
        options.drafter,
        strategy,
        publications=publications,
        max_running=options.batch,
        device="cpu",
        dtype="bfloat16",
        max_total_tokens=32768,
    )


if __name__ == "__main__":
    main()

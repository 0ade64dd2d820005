"""Makes the two prompt sets in verl's parquet format, and prints what they are like.

`data/arithmetic/{train,test}.parquet`: additions with a rule reward and a long tail of lengths (`arithmetic.py`).
`data/chat/test.parquet`: open-ended requests without a truth, to which a model's answers have high entropy: the other
end of what speculation meets. Both are functions of `--seed`.

With `--measure MODEL` it samples from that model and prints, for both sets, the lengths of the responses, the mean
token entropy, and the share of right answers (two to three minutes on two cores).
"""

import argparse
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP, for the reason in prepare_model.py

import numpy as np
import pandas as pd
import torch
from arithmetic import DATA_SOURCE, compute_score, draw_problem, question, worked_solution
from chat import test_requests
from measure import sample_responses
from prepare_model import load_base_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
CHAT_SOURCE = "chat/open"
CHAT_MAX_TOKENS = 192  # the chat responses have no end worth waiting for; their entropy is what is asked


def make_row(source: str, ability: str, content: str, truth: str, **extra: str | int) -> dict:
    """One row as verl's RLHFDataset reads it."""
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": extra,
    }


def make_arithmetic(split: str, count: int, seed: int) -> list[dict]:
    """`count` additions. No problem of one split can be in the other: see `arithmetic.is_held_out`."""
    rng = random.Random(f"data/{split}/{seed}")
    problems = [draw_problem(rng, held_out=split == "test") for _ in range(count)]
    return [
        make_row(
            DATA_SOURCE,
            "math",
            question(a, b),
            str(a + b),
            index=i,
            split=split,
            a=str(a),
            b=str(b),
            digits=len(str(a)),
        )
        for i, (a, b) in enumerate(problems)
    ]


def make_chat(seed: int) -> list[dict]:
    """The open-ended requests, with an empty truth: nothing scores."""
    requests = test_requests(seed)
    return [make_row(CHAT_SOURCE, "chat", text, "", index=i, split="test") for i, text in enumerate(requests)]


def write_parquet(path: Path, rows: list[dict]) -> None:
    """Writes to a temporary name and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pd.DataFrame(rows).to_parquet(temporary, index=False)
    temporary.replace(path)
    print(f"{path}: {len(rows)} rows")


def describe_lengths(lengths: list[int]) -> str:
    """Count, median, p90, p99, max and the ratio that says how long the tail is."""
    median, p90, p99 = np.percentile(lengths, [50, 90, 99])
    figures = f"count {len(lengths)}  median {median:.0f}  p90 {p90:.0f}  p99 {p99:.0f}  max {max(lengths)}"
    return f"{figures}  p99/median {p99 / median:.1f}"


def describe_solutions(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """The token lengths of the rows' worked solutions, their end token included, and of the longest prompt."""
    lengths, prompt_lengths = [], []
    for row in rows:
        a, b = int(row["extra_info"]["a"]), int(row["extra_info"]["b"])
        lengths.append(len(tokenizer.encode(worked_solution(a, b), add_special_tokens=False)) + 1)
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        prompt_lengths.append(len(tokenizer.encode(prompt, add_special_tokens=False)))
    return f"{describe_lengths(lengths)}  longest prompt {max(prompt_lengths)}"


def measure(model_path: Path, sets: dict[str, list[dict]], count: int, max_tokens: int, seed: int) -> None:
    """Samples `count` responses to each set from the model and prints what they are like."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    for name, rows in sets.items():
        rows = rows[:count]
        limit = min(max_tokens, CHAT_MAX_TOKENS) if name == "chat" else max_tokens
        chats = [row["prompt"] for row in rows]
        responses = sample_responses(model, tokenizer, chats, max_new_tokens=limit, seed=seed, label=name)
        print(f"{name}: response tokens: {describe_lengths(responses.lengths)}  cut at {limit}: {responses.cut}")
        print(f"{name}: mean token entropy {responses.mean_entropy:.3f} nats", end="")
        if name == "arithmetic":
            print(f"  right answers {share_right(rows, responses.texts):.0%}", end="")
        print(f"\n{name}: the first response begins: {responses.texts[0][:160]!r}", flush=True)


def share_right(rows: list[dict], texts: list[str]) -> float:
    """The mean reward of one response a row."""
    scores = [
        compute_score(row["data_source"], text, row["reward_model"]["ground_truth"], row["extra_info"])
        for row, text in zip(rows, texts, strict=True)
    ]
    return sum(scores) / len(scores)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="the folder that gets arithmetic/ and chat/")
    parser.add_argument("--train", type=int, default=4096, help="rows in arithmetic/train.parquet")
    parser.add_argument("--test", type=int, default=256, help="rows in arithmetic/test.parquet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=Path, metavar="MODEL", help="sample from this model and print the figures")
    parser.add_argument("--measure-prompts", type=int, default=64, help="prompts of each set to measure with")
    parser.add_argument("--measure-tokens", type=int, default=768, help="longest response to measure with")
    parser.add_argument("--threads", type=int, default=None, help="threads to compute with (default: torch's choice)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    train, test = make_arithmetic("train", args.train, args.seed), make_arithmetic("test", args.test, args.seed)
    chat = make_chat(args.seed)
    write_parquet(args.out / "arithmetic" / "train.parquet", train)
    write_parquet(args.out / "arithmetic" / "test.parquet", test)
    write_parquet(args.out / "chat" / "test.parquet", chat)
    print(f"arithmetic: worked solutions, tokens: {describe_solutions(train, load_base_tokenizer())}", flush=True)
    if args.measure:
        sets = {"arithmetic": test, "chat": chat}
        measure(args.measure, sets, args.measure_prompts, args.measure_tokens, args.seed)


if __name__ == "__main__":
    main()

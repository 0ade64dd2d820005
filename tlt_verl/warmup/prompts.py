"""Prompts from a file: what verl's datasets hold, or one JSON object a line, as token ids behind the chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tlt_verl.config import ConfigError

KEYS = ("prompt", "messages")


def read_prompts(path: Path, tokenizer: Any) -> list[list[int]]:
    """The prompts of a file, in its order, each once.

    Args:
        path: parquet with a column, or JSON lines with a key, `prompt` or `messages`: a list of chat messages, or a
            text, which stands as it is.
        tokenizer: with `apply_chat_template`.

    Raises:
        ConfigError: the file has no such column, or no prompt.
    """
    entries = _entries(path)
    ids: dict[tuple[int, ...], None] = {}
    for entry in entries:
        if isinstance(entry, str):
            tokens = tokenizer(entry)["input_ids"]
        else:
            messages = [dict(message) for message in entry]
            tokens = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        ids[tuple(tokens)] = None
    if not ids:
        raise ConfigError(f"--prompts: got {str(path)!r}, which has no prompt")
    return [list(tokens) for tokens in ids]


def split_prompts(prompts: list[list[int]], held_out: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """(for training, held out), shuffled.

    Raises:
        ConfigError: too few prompts for that.
    """
    if len(prompts) < 2 * held_out:
        raise ConfigError(
            f"--held-out: got {held_out}, takes at most half of the {len(prompts)} different prompts in --prompts"
        )
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def _entries(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        import pandas

        table = pandas.read_parquet(path)
        key = next((key for key in KEYS if key in table.columns), None)
        found = [] if key is None else table[key].tolist()
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        key = next((key for key in KEYS if all(key in row for row in rows)), None)
        found = [] if key is None else [row[key] for row in rows]
    if key is None:
        raise ConfigError(f"--prompts: got {str(path)!r}, which has no column {' or '.join(KEYS)}")
    return found

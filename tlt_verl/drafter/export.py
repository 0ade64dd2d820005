"""A trained drafter as a folder for a stock serving engine: complete, with the command line that serves it.

Knows the folder's files; neither the trainer nor sglang. What is only of use for training stays behind.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tlt_verl.drafter.check import check_drafter
from tlt_verl.drafter.checkpoint import WEIGHTS, Checkpoint, load_checkpoint, write_drafter
from tlt_verl.drafter.eagle import HOT_TOKENS, DrafterError, read_config
from tlt_verl.drafter.from_target import TARGET_OPTION
from tlt_verl.drafter.tensors import TensorFolder
from tlt_verl.drafter.versions import replaced, sync

_EXPORTED = "tlt_verl.exported_version"  # key in the safetensors header; a folder without it is not overwritten
_EMBEDDING = "embed_tokens.weight"
_STEPS, _TOPK, _DRAFT_TOKENS = 3, 1, 4  # a chain of three, which every engine and device can verify

_README = """# A drafter for {target}

An EAGLE draft model, {architecture}, version {version}, trained by tlt_verl. Serve both with stock SGLang:

    {command}

A deeper or wider tree can be faster at small batch sizes: raise `--speculative-num-steps` and
`--speculative-eagle-topk`, and `--speculative-num-draft-tokens` with them. SGLang takes embedding and head from the
target; the embedding is in `model.safetensors` for engines that do not.
{hot}"""

_HOT = """
The draft head knows {size} tokens, those in `{file}`. It does not work without `--speculative-token-map`.
"""


def export_drafter(
    checkpoint: str | os.PathLike[str], target: str | os.PathLike[str], out: str | os.PathLike[str]
) -> Path:
    """Write a drafter's folder for serving. It appears complete or not at all.

    In it: `config.json`, `model.safetensors` with the target's embedding, `hot_tokens.pt` where the head is reduced,
    and `README.md` with SGLang's command line.

    Args:
        checkpoint: a drafter's folder, for instance `<checkpoints>/latest`.
        target: the Hugging Face folder of the model that it was trained for, one file or sharded.
        out: the folder to write; its parents are made. An earlier export there is replaced.

    Returns:
        `out`. All tensors keep the dtype that they have.

    Raises:
        DrafterError: the checkpoint cannot be read or does not fit the target; the target has no embedding of the
            right shape; or `out` is something else than an export.
    """
    target, out = Path(target), Path(out)
    target_config = read_config(target, TARGET_OPTION)
    check_drafter(checkpoint, target_config, "checkpoint")
    drafter = load_checkpoint(checkpoint)
    _check_replaceable(out)
    embedding = _embedding(target, target_config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced(out) as new:
        weights = drafter.weights | {_EMBEDDING: embedding}
        write_drafter(new, drafter.config, weights, drafter.hot, {_EXPORTED: str(drafter.version)})
        (new / "README.md").write_text(readme(drafter, target, out), encoding="utf-8")
        for path in [*new.iterdir(), new]:
            sync(path)
        check_drafter(new, target_config, "export")
    sync(out.parent)
    return out


def readme(drafter: Checkpoint, target: Path, out: Path) -> str:
    """What stands in an export's `README.md`."""
    hot = "" if drafter.hot is None else _HOT.format(size=len(drafter.hot), file=HOT_TOKENS)
    return _README.format(
        target=target,
        architecture=drafter.config["architectures"][0],
        version=drafter.version,
        command=" \\\n        ".join(shlex.join(part) for part in command_line(drafter, target, out)),
        hot=hot,
    )


def command_line(drafter: Checkpoint, target: Path, out: Path) -> list[list[str]]:
    """The command that serves a target with an exported drafter: one list of words for each line."""
    command = [
        ["python", "-m", "sglang.launch_server", "--model-path", str(target)],
        ["--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", str(out)],
    ]
    if drafter.hot is not None:
        command.append(["--speculative-token-map", str(out / HOT_TOKENS)])
    sizes = {"num-steps": _STEPS, "eagle-topk": _TOPK, "num-draft-tokens": _DRAFT_TOKENS}
    command.append([word for name, size in sizes.items() for word in (f"--speculative-{name}", str(size))])
    return command


def _embedding(folder: Path, config: Mapping[str, Any]) -> torch.Tensor:
    """The target's embedding (V, H)."""
    name, shape = f"model.{_EMBEDDING}", (config["vocab_size"], config["hidden_size"])
    try:
        tensors = TensorFolder(folder)
        if name not in tensors:
            problem = f"whose weights lack {name}"
        elif tensors.shape(name) != shape:
            problem = f"whose {name} has the shape {tensors.shape(name)}; its config.json asks for {shape}"
        else:
            return tensors.load(name)
    except (OSError, ValueError, KeyError) as error:
        problem = f"whose weights cannot be read: {error}"
    raise DrafterError(f"{TARGET_OPTION}: got {str(folder)!r}, {problem}. Give the complete model.")


def _check_replaceable(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        with safe_open(out / WEIGHTS, "pt") as file:
            if _EXPORTED in (file.metadata() or {}):
                return
    except (OSError, SafetensorError):
        pass
    raise DrafterError(
        f"{out} exists and is not an export, so it is not overwritten. Choose another folder, or remove it."
    )

"""Whether a given drafter fits the target, from its config and the headers of its files, before a model is loaded.

Knows the layout (`eagle`), not SGLang. SGLang itself drops a tensor that it does not know with a line in the log, and
leaves one that it misses uninitialised: both end as a drafter whose drafts are never accepted. Here both are errors.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tlt_verl.drafter.eagle import SHARED_TENSORS, DrafterError, check_target, read_config, tensor_shapes
from tlt_verl.drafter.tensors import TensorFolder

_CURE = "Give a drafter that was made for this target, or null to have one made."
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


class Problem(NamedTuple):
    """Why tensors do not fit: one word for counters, and the rest of a sentence."""

    kind: str
    text: str


def check_drafter(
    drafter_dir: str | os.PathLike[str], target_config: Mapping[str, Any], option: str = "drafter.path"
) -> None:
    """Raise unless SGLang can load the drafter beside this target.

    Args:
        drafter_dir: a folder in SGLang's EAGLE format.
        target_config: the target's `config.json`, or `PretrainedConfig.to_dict()`.
        option: the key that chose the drafter, for the messages.

    Raises:
        DrafterError: the folder, its config or its weights are missing; the architecture is no EAGLE drafter of the
            target's family; the hidden size or the vocabulary is another; a tensor is missing, unknown or of the wrong
            shape; or the target has no drafter at all (`check_target`).
    """
    folder = Path(drafter_dir)
    family = check_target(target_config)
    config = read_config(folder, option)

    def refuse(problem: str, cure: str = _CURE) -> DrafterError:
        return DrafterError(f"{option}: got {str(folder)!r}, {problem}. {cure}")

    if unfit := _architecture_problem(config, family.architecture, target_config["architectures"][0]):
        raise refuse(unfit)
    if lacking := [key for key in _SIZES if not isinstance(config.get(key), int)]:
        raise refuse(f"whose config.json has no {', '.join(lacking)}")
    for key in ("hidden_size", "vocab_size"):
        if config[key] != target_config[key]:
            raise refuse(f"whose {key} is {config[key]}; the target's is {target_config[key]}")
    if config.get("tie_word_embeddings"):
        cure = 'Set "tie_word_embeddings": false in its config.json: SGLang gives it the target\'s embedding and head.'
        raise refuse("whose tie_word_embeddings is true", cure)
    try:
        tensors = TensorFolder(folder)
        problem = layout_problem({name: tensors.shape(name) for name in tensors}, config)
    except (OSError, ValueError, KeyError) as error:
        raise refuse(f"whose weights cannot be read: {error}") from error
    if problem:
        raise refuse(f"whose {problem.text}")


def _architecture_problem(config: Mapping[str, Any], wanted: str, target: str) -> str | None:
    found = (config.get("architectures") or ["no architecture"])[0]
    if found == wanted:
        return None
    if "Eagle3" in found:
        return f"a {found}: EAGLE-3 is not available in this version; the drafter of a {target} is a {wanted}"
    return f"a {found}; the EAGLE drafter of a {target} is a {wanted}"


def layout_problem(
    found: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], shared: Collection[str] = SHARED_TENSORS
) -> Problem | None:
    """The first few tensors that are missing, unknown or of the wrong shape (the kinds); or None.

    Args:
        found: name and shape of every tensor that is there.
        config: the drafter's `config.json`.
        shared: tensors that may be there beside the drafter's own.
    """
    shapes = tensor_shapes(config)
    if missing := [name for name in shapes if name not in found]:
        return Problem("missing", f"weights lack {_listed(missing)}")
    if unknown := [name for name in found if name not in shapes and name not in shared]:
        return Problem("unknown", f"weights hold {_listed(unknown)}, which SGLang would drop")
    for name, shape in shapes.items():
        if found[name] != shape:
            return Problem("shape", f"{name} has the shape {found[name]}; its config.json asks for {shape}")
    return None


def _listed(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest

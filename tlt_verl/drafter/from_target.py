"""A drafter made from the target's last layer: a starting point for training, in the folder that SGLang loads.

Knows the layout (`eagle`) and the weights of one layer; runs no model, and knows neither verl nor sglang.

What is folded, and why
-----------------------
The target's last layer reads and writes the residual stream h. The drafter's reads and writes features, w * h/rms(h)
with w the target's final norm, and has no norm before its attention. Copied as it is, the layer's branches are as large
as the stream (30 times the feature in SmolLM2-135M) and drown the feature. So the layer is carried into the basis of
the features (`*` is elementwise, W a matrix that acts on columns):

    q, k, v     W diag(w_in / w)         exact: w_in / w * feature is what the target's input norm makes of h
    o, down     diag(w / r) W            exact for a stream of rms r
    post norm   w_post / w * rms(w)      exact up to one scalar where w is not constant

The one number that the weights do not hold is r. It is set so that both branches together add half of the feature's rms
on random features. Qwen3's norms on queries and keys, for which the drafter has no place, become constants too: their
weight times the reciprocal rms of each head on the same random features.

fc is [0 | I]: it passes the feature on. The embedding's half is zero and not small noise: its gradient does not depend
on its value, so there is no symmetry to break, and noise gained nothing.

Measured on SmolLM2-135M-Instruct, 24 sequences of about 100 tokens, 80 steps of AdamW at 1e-3: held-out cross-entropy
before and after (the target's own entropy is 1.27).

    | start                                        | before | after |
    |----------------------------------------------|--------|-------|
    | last layer copied as it is                   | 384    | 79.6  |
    | folded, branches together 0.18 of the feature | 9.3   | 4.6   |
    | folded, 0.5 (this)                           | 8.9    | 4.7   |
    | folded, 1.0                                  | 10.7   | 4.4   |
    | folded, 3.0                                  | 28.4   | 4.9   |
    | folded, r measured on the data               | 9.1    | 4.6   |
    | folded, 1.0, noise of 0.02 on the embedding  | 10.7   | 4.6   |
    | noise of 0.02 in place of the layer          | 10.2   | 4.5   |

So a copy must be folded, the share matters little between 0.2 and 1, and no start drafts well before it is trained.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tlt_verl.drafter.eagle import (
    DrafterError,
    Family,
    check_target,
    drafter_config,
    head_dim,
    read_config,
    tensor_shapes,
)
from tlt_verl.drafter.tensors import TensorFolder
from tlt_verl.drafter.versions import replaced

TARGET_OPTION = "actor_rollout_ref.model.path"
BRANCH_SHARE = 0.5
"""What attention and MLP together add at the start, as a share of the feature's rms."""

_RECIPE = "eagle-from-last-layer-1"  # part of the fingerprint: another number whenever the fold changes
_FINGERPRINT = "tlt_verl.made_from"  # key in the safetensors header
_PROBES = 256
_WEIGHTS = "model.safetensors"


def make_drafter(
    target_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, seed: int = 0, option: str = TARGET_OPTION
) -> Path:
    """Make an EAGLE drafter for a target: `config.json` and `model.safetensors`, as `eagle` lays them out.

    Only the target's last layer and final norm are read. A folder that was made from the same weights is left as it is;
    one that was made from others is replaced. The folder appears complete or not at all, also when several processes
    make it at once.

    Args:
        target_dir: a Hugging Face folder of a Llama, Qwen2 or Qwen3 causal language model, one file or sharded.
        out_dir: the drafter's folder; its parents are made.
        seed: of the random features that set the scales.
        option: the key that chose the target, for the messages.

    Returns:
        `out_dir`. The tensors have the dtype of the target's last layer.

    Raises:
        DrafterError: the target has no drafter (`check_target`), or lacks a file or tensor; or `out_dir` holds
            something that was not made here.
    """
    target_dir, out_dir = Path(target_dir), Path(out_dir)
    target = read_config(target_dir, option)
    family = check_target(target, option)
    config = drafter_config(target)
    layer = _last_layer(target_dir, target, family, option)
    fingerprint = _fingerprint(config, layer, seed)
    with _locked(out_dir):
        if not _is_made_from(out_dir, fingerprint):
            tensors = _folded(layer, family, head_dim(target), torch.Generator().manual_seed(seed))
            _write(out_dir, config, tensors, fingerprint)
    return out_dir


def _last_layer(folder: Path, target: Mapping[str, Any], family: Family, option: str) -> dict[str, torch.Tensor]:
    """The last layer's tensors by their names in the layer, and the final norm as `norm.weight`."""
    prefix = f"model.layers.{target['num_hidden_layers'] - 1}."
    shapes = _source_shapes(target, family)
    names = {name: "model.norm.weight" if name == "norm.weight" else prefix + name for name in shapes}
    try:
        tensors = TensorFolder(folder)
    except (OSError, ValueError, KeyError) as error:
        cure = "Save the model with save_pretrained, which writes safetensors."
        raise DrafterError(f"{option}: got {str(folder)!r}, whose weights cannot be read: {error}. {cure}") from error
    if missing := [full for full in names.values() if full not in tensors]:
        raise DrafterError(
            f"{option}: got {str(folder)!r}, whose weights lack {', '.join(missing)}. Give the complete model."
        )
    for name, full in names.items():
        if tensors.shape(full) != shapes[name]:
            raise DrafterError(
                f"{option}: got {str(folder)!r}, whose {full} has the shape {tensors.shape(full)}; its config.json "
                f"asks for {shapes[name]}. Give the config.json that belongs to the weights."
            )
    return {name: tensors.load(full) for name, full in names.items()}


def _source_shapes(target: Mapping[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    """Name in the layer and shape of every tensor that the drafter is made of."""
    made = tensor_shapes(drafter_config(target))
    shapes = {name.removeprefix("layers.0."): shape for name, shape in made.items() if name.startswith("layers.0.")}
    norms = ["input_layernorm.weight", "norm.weight"]
    shapes |= dict.fromkeys(norms, (target["hidden_size"],))
    if family.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (head_dim(target),) for name in "qk"}
    return shapes


def _folded(
    layer: Mapping[str, torch.Tensor], family: Family, D: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The drafter's tensors, for heads of width D; computed in float32, returned in the layer's dtype."""
    source = {name: tensor.float() for name, tensor in layer.items()}
    w = source["norm.weight"]  # (H,)
    H = w.numel()
    features = torch.randn(_PROBES, H, generator=generator) * w  # (P, H)

    out = {name: t for name, t in source.items() if name.startswith(("self_attn.", "mlp.")) and "_norm" not in name}
    into_stream = source["input_layernorm.weight"] * _reciprocal(w)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        out[f"{name}.weight"] = out[f"{name}.weight"] * into_stream
    out["post_attention_layernorm.weight"] = source["post_attention_layernorm.weight"] * _reciprocal(w) * _rms(w)
    if family.qk_norm:
        for name in ("q", "k"):
            _fold_head_norm(out, f"self_attn.{name}_proj", source[f"self_attn.{name}_norm.weight"], features)
    writers = [name for name in out if name.startswith(("self_attn.o_proj.", "mlp.down_proj."))]
    for name in writers:
        out[name] = _rows_scaled(out[name], w)
    r = _branch_rms(out, features, D) / (BRANCH_SHARE * _rms(features))
    for name in writers:
        out[name] = out[name] / r if r > 0 else out[name]

    dtype = layer["self_attn.q_proj.weight"].dtype
    made = {f"layers.0.{name}": tensor for name, tensor in out.items()}
    made |= {"fc.weight": torch.cat([torch.zeros(H, H), torch.eye(H)], dim=1), "fc.bias": torch.zeros(H)}
    return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}


def _fold_head_norm(out: dict[str, torch.Tensor], name: str, weight: torch.Tensor, features: torch.Tensor) -> None:
    """Scale a projection's rows by `weight` (D,) over each head's rms on `features` (P, H), in place of the norm."""
    D = weight.numel()
    heads = torch.nn.functional.linear(features, out[f"{name}.weight"], out.get(f"{name}.bias")).unflatten(1, (-1, D))
    scale = (weight * _reciprocal(heads.square().mean(dim=(0, 2)).sqrt())[:, None]).flatten()  # (heads * D,)
    for part in ("weight", "bias"):
        if f"{name}.{part}" in out:
            out[f"{name}.{part}"] = _rows_scaled(out[f"{name}.{part}"], scale)


def _branch_rms(out: Mapping[str, torch.Tensor], features: torch.Tensor, D: int) -> torch.Tensor:
    """The rms of what attention (each position reading itself) and MLP add to `features` (P, H), together; a scalar."""

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, out[f"{name}.weight"], out.get(f"{name}.bias"))

    values = project("self_attn.v_proj", features).unflatten(1, (-1, D))  # (P, KV heads, D)
    group = out["self_attn.q_proj.weight"].shape[0] // out["self_attn.k_proj.weight"].shape[0]
    attention = project("self_attn.o_proj", values.repeat_interleave(group, dim=1).flatten(1))
    normed = features / _rms(features, dim=1) * out["post_attention_layernorm.weight"]
    gated = torch.nn.functional.silu(project("mlp.gate_proj", normed)) * project("mlp.up_proj", normed)
    return (_rms(attention).square() + _rms(project("mlp.down_proj", gated)).square()).sqrt()


def _rows_scaled(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A weight (rows, columns) or a bias (rows,) times scale (rows,)."""
    return tensor * (scale[:, None] if tensor.ndim == 2 else scale)


def _rms(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return x.square().mean(dim=dim, keepdim=dim is not None).sqrt()


def _reciprocal(w: torch.Tensor) -> torch.Tensor:
    """1 / w, and 0 where w is next to nothing: a feature without that channel cannot give it back."""
    return torch.where(w.abs() > 1e-3 * _rms(w), 1 / w, 0.0)


def _fingerprint(config: Mapping[str, Any], layer: Mapping[str, torch.Tensor], seed: int) -> str:
    """A hash of everything that the drafter is made of."""
    digest = hashlib.sha256(json.dumps([_RECIPE, seed, config], sort_keys=True).encode())
    for name in sorted(layer):
        tensor = layer[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(out_dir: Path) -> Iterator[None]:
    """One maker of `out_dir` at a time on this machine: the replicas of a node ask for it together."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with (out_dir.parent / f".{out_dir.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _is_made_from(folder: Path, fingerprint: str) -> bool:
    """Whether the folder is this drafter. Raises DrafterError when it is something that may not be replaced."""
    found = _made_from(folder)
    if found is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DrafterError(
            f"{folder} exists and is not a drafter that was made from a target, so it is not overwritten. "
            "Choose another folder, or remove it."
        )
    return found == fingerprint


def is_untrained(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is a drafter as it was made from a target, which nobody has trained since."""
    return _made_from(Path(folder)) is not None


def _made_from(folder: Path) -> str | None:
    """The fingerprint in a drafter's header; None when the folder is not a drafter that was made here."""
    if not (folder / "config.json").is_file():
        return None
    try:
        with safe_open(folder / _WEIGHTS, "pt") as file:
            return (file.metadata() or {}).get(_FINGERPRINT)
    except (OSError, SafetensorError):
        return None


def _write(out_dir: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], fingerprint: str) -> None:
    """Write the folder; an older drafter stays until the new one is whole."""
    with replaced(out_dir) as new:
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, new / _WEIGHTS, metadata={"format": "pt", _FINGERPRINT: fingerprint})
        (new / _WEIGHTS).chmod((new / "config.json").stat().st_mode)  # safetensors hides it from other users

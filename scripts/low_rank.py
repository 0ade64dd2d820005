"""Low-rank updates of a model's linear layers: trained as such, stored in 8 bits, added to the weights.

Knows linear layers and one file format. Knows nothing about the task, the loop or where a model comes from.

The update of a weight W (out, in) is up @ down with up (out, R) and down (R, in) (Hu et al., arXiv 2106.09685, eq. 3,
without its factor alpha / R, which a learning rate takes the place of). A file holds both factors in int8, a scale a
rank each, and two figures of every merged weight, so that an update which is added to another base is refused.

Shapes: R rank, out and in the sizes of a linear layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

LEVELS = 127  # of int8, on either side of 0
TOLERANCE = 2e-3  # of a merged weight's figures; 8 bits of mantissa round a weight by 2e-3, and its norm by far less


class UpdateError(ValueError):
    """An update does not fit the model that it is added to."""


class Factors(NamedTuple):
    """An update: up @ down, float32 (out, R) and (R, in)."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def product(self) -> torch.Tensor:
        """float32 (out, in)."""
        return self.up @ self.down


class LowRankLinear(torch.nn.Module):
    """A frozen linear layer with a trainable update, which is zero at first.

    Args:
        linear: without a bias; its weight is shared, not copied.
        rank: R.
        generator: draws `down`.
    """

    def __init__(self, linear: torch.nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        if linear.bias is not None:
            raise UpdateError("a linear layer with a bias has no low-rank update here")
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        down = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
        self.down = torch.nn.Parameter(down.to(self.weight.dtype))
        self.up = torch.nn.Parameter(torch.zeros(linear.out_features, rank, dtype=self.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.down), self.up)


def attach(model: torch.nn.Module, rank: int, seed: int = 0) -> None:
    """Freezes `model` and gives every linear layer of its decoder layers an update of this rank, in place."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in list(linears(model)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LowRankLinear(linear, rank, generator))


def linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers that an update is for: all but the head, which small models share with the embedding."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            yield name, module


def factors_of(model: torch.nn.Module, masters: dict[str, torch.Tensor]) -> dict[str, Factors]:
    """The factors of a model that `attach` changed, by the layer's name, from float32 masters by parameter name."""
    names = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    return {name: Factors(masters[f"{name}.up"], masters[f"{name}.down"]) for name in names}


def balanced(factors: Factors) -> Factors:
    """The same product from its singular vectors, each scaled by the root of its value: what 8 bits lose least of."""
    q_up, r_up = torch.linalg.qr(factors.up.double())
    q_down, r_down = torch.linalg.qr(factors.down.double().T)
    u, values, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = values.sqrt()
    return Factors((q_up @ u * root).float(), (root[:, None] * vt @ q_down.T).float())


def quantise(factors: Factors) -> dict[str, torch.Tensor]:
    """int8 `up` (out, R) and `down` (R, in), and float32 `up_scale` and `down_scale` (R,)."""
    up_scale = factors.up.abs().amax(0).clamp(min=1e-12) / LEVELS
    down_scale = factors.down.abs().amax(1).clamp(min=1e-12) / LEVELS
    return {
        "up": (factors.up / up_scale).round().to(torch.int8),
        "down": (factors.down / down_scale[:, None]).round().to(torch.int8),
        "up_scale": up_scale,
        "down_scale": down_scale,
    }


def dequantise(tensors: dict[str, torch.Tensor]) -> Factors:
    """What `quantise` gave, as float32 factors."""
    return Factors(
        tensors["up"].float() * tensors["up_scale"], tensors["down"].float() * tensors["down_scale"][:, None]
    )


@torch.no_grad()
def merge(model: torch.nn.Module, update: dict[str, Factors]) -> dict[str, list[float]]:
    """Adds the update to the weights in place, in float32, and rounds once. Returns each merged weight's figures.

    Raises:
        UpdateError: a layer is missing on either side, or has other sizes.
    """
    layers = dict(linears(model))
    if layers.keys() != update.keys():
        raise UpdateError(f"the update and the model differ in layers: {sorted(layers.keys() ^ update.keys())[:3]} ...")
    for name, linear in layers.items():
        product = update[name].product
        if product.shape != linear.weight.shape:
            raise UpdateError(f"{name} is {tuple(linear.weight.shape)}, its update {tuple(product.shape)}")
        linear.weight.copy_(linear.weight.float() + product)
    return {name: figures(linear.weight) for name, linear in layers.items()}


def figures(weight: torch.Tensor) -> list[float]:
    """Two numbers that a weight (out, in) in another order, or another weight, does not have.

    Its norm, and the norm of its product with a fixed vector.
    """
    weight = weight.double()
    fixed = torch.cos(torch.arange(weight.shape[1], dtype=torch.float64))
    return [weight.norm().item(), (weight @ fixed).norm().item()]


def save(path: Path, update: dict[str, Factors], merged: dict[str, list[float]], about: dict) -> None:
    """Writes a safetensors file to a temporary name and renames it; `about` is JSON, kept in the file's metadata."""
    tensors = {f"{name}.{part}": tensor for name, each in update.items() for part, tensor in quantise(each).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"about": json.dumps(about), "merged": json.dumps(merged)})
    temporary.replace(path)


def load(path: Path) -> tuple[dict[str, Factors], dict[str, list[float]], dict]:
    """The update, the figures of the weights that it was merged into when it was made, and `about`.

    Raises:
        UpdateError: the file is none of ours.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "merged" not in metadata or "about" not in metadata:
            raise UpdateError(f"{path} is not a low-rank update made by prepare_model.py --train")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        parts.setdefault(layer, {})[part] = tensor
    update = {layer: dequantise(each) for layer, each in parts.items()}
    return update, json.loads(metadata["merged"]), json.loads(metadata["about"])


def check_merged(found: dict[str, list[float]], wanted: dict[str, list[float]], tolerance: float = TOLERANCE) -> None:
    """Compares the figures of merged weights with those of when the update was made.

    Raises:
        UpdateError: a weight's figures are off by more than `tolerance`, relatively: the base is another one.
    """
    worst, name = max(
        (max(abs(a - b) / abs(b) for a, b in zip(found[layer], wanted[layer], strict=True)), layer) for layer in wanted
    )
    if not worst <= tolerance:
        raise UpdateError(
            f"{name} is off by {worst:.1e} after the update (tolerance {tolerance:g}): another base model"
        )

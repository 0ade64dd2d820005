"""verl compiles one line of its entropy with torch.compile: run it as it is written.

On a host that costs ten seconds in every actor worker, and needs a C++ compiler, for a product and a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tlt_verl.patches.seam import Seam, Target


class _EagerTorch(ModuleType):
    """torch, whose `compile` returns what it is given."""

    def __init__(self, torch: ModuleType) -> None:
        super().__init__(torch.__name__)
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    @staticmethod
    def compile(**_: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate without compiling."""
        return lambda function: function


def _install() -> None:
    import torch
    from verl.utils.megatron import tensor_parallel

    tensor_parallel.torch = _EagerTorch(torch)


SEAM = Seam(
    name="verl.eager_entropy",
    package="verl",
    versions=">=0.9.1,<0.9.2",
    targets=(
        Target(
            path="verl.utils.megatron.tensor_parallel:_VocabParallelEntropy.forward",
            source_contains=("@torch.compile(dynamic=True)",),
        ),
    ),
    why="Compiling one line of the entropy takes longer than a step on a host, and needs a C++ compiler.",
    install=_install,
    cpu_only=True,
)

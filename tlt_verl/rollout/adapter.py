"""The weight adapter: in each actor worker, sends the policy's tensors to the replica's engine.

verl's own adapter does the sending; the engine's worker sees to it that only the target takes them. Added here: what a
CPU device cannot do, and the debug option that proves, tensor by tensor, that engine and policy agree.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import torch
from verl.plugin.platform import get_platform
from verl.workers.rollout.sglang_rollout.sglang_rollout import ServerAdapter
from verl.workers.rollout.utils import ensure_async_iterator

from tlt_verl.fingerprint import differences, fingerprint
from tlt_verl.rollout.server import tlt_config

logger = logging.getLogger(__name__)

NamedTensors = Any
"""Pairs of a name and a tensor, from a generator: an asynchronous one where the policy is on another device."""


class WeightSyncError(RuntimeError):
    """The engine's weights differ from the policy's after a sync."""


def without_tied_head(sent: dict[str, str]) -> dict[str, str]:
    """A policy's fingerprints without an output head that is the embedding, which an FSDP policy sends too.

    The engine has such a head under the embedding's name only.
    """
    embedding = sent.get("model.embed_tokens.weight")
    return {name: value for name, value in sent.items() if name != "lm_head.weight" or value != embedding}


class TLTAdapter(ServerAdapter):
    """verl's SGLang adapter, with fingerprints when `debug.fingerprint` is set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fingerprint = tlt_config(self.config).debug.fingerprint
        self._drafter: tuple[int, dict[str, str]] | None = None  # version, fingerprints

    async def resume(self, tags: list[str]) -> None:
        """Give device memory back to the engine; on a CPU there is none."""
        if not self._on_cpu():
            await super().resume(tags)

    async def release(self) -> None:
        """Take device memory from the engine; on a CPU there is none."""
        if not self._on_cpu():
            await super().release()

    @staticmethod
    def _on_cpu() -> bool:
        return get_platform().device_name == "cpu"

    async def update_weights(  # type: ignore[override]  # verl overrides it with another signature itself
        self, weights: NamedTensors, global_steps: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Send the policy's tensors; then, if asked to, compare.

        Raises:
            WeightSyncError: the engine's target differs from what was sent, or the drafter changed.
        """
        if not self._fingerprint:
            await super().update_weights(weights, global_steps, *args, **kwargs)
            return
        sent: dict[str, str] = {}
        recorded: NamedTensors = self._recorded(weights, sent)
        await super().update_weights(recorded, global_steps, *args, **kwargs)
        if self._engine is not None and self._is_server_tp_leader():
            await self._compare(sent, global_steps)

    async def _recorded(self, weights: NamedTensors, sent: dict[str, str]) -> AsyncIterator[Any]:
        """The same tensors; notes the fingerprint of each as the engine will hold it, in the rollout's dtype."""
        dtype = getattr(torch, self.config.dtype)
        async for name, tensor in ensure_async_iterator(weights):
            sent[name] = fingerprint(tensor.to(dtype))
            yield name, tensor

    async def _compare(self, sent: dict[str, str], global_steps: Any) -> None:
        server: Any = self.server_actor  # type: ignore[has-type]
        target, drafter, version = await server.weight_fingerprints.remote()
        if "lm_head.weight" not in target:
            sent = without_tied_head(sent)
        if different := differences(sent, target):
            raise WeightSyncError(
                f"step {global_steps}: {len(different)} of {len(sent)} target tensors differ from the policy: "
                f"{different[:5]}"
            )
        before = self._drafter
        if before is not None and before[0] == version and (changed := differences(before[1], drafter)):
            raise WeightSyncError(f"step {global_steps}: the policy's sync changed the drafter's tensors {changed}")
        self._drafter = version, drafter
        print(  # verl's worker log; a debug option speaks on stdout
            f"tlt fingerprint: step {global_steps}: {len(sent)} target tensors equal the policy's, "
            f"{len(drafter)} drafter tensors unchanged",
            flush=True,
        )

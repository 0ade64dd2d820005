"""The policy's weights on their way to rollout replicas on other devices, where all devices are hosts.

verl's checkpoint engines for separate devices move device memory with NCCL, NIXL and the like. This one is chosen by
`actor_rollout_ref.rollout.checkpoint_engine.backend=gloo`, and broadcasts bucket by bucket from the policy's first rank
to every rank of every replica. A group lives for one transfer, so replicas may come and go in between.
"""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from verl.checkpoint_engine.base import CheckpointEngine
from verl.workers.rollout.utils import ensure_async_iterator

_TIMEOUT = timedelta(minutes=10)
_ALIGNED = 16  # bytes: a tensor's place in a bucket, so that it can be read in any dtype

Named = tuple[str, torch.Tensor]


class GlooCheckpointEngine(CheckpointEngine):
    """One rank's end of the transfer; see verl's `CheckpointEngine` for the order of the calls.

    Args:
        bucket_size: bytes that are sent at a time; a tensor that is larger goes alone.
        is_master: this is the policy's rank 0, which sends.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.bucket_size, self.is_master = bucket_size, is_master
        self._store: TCPStore | None = None
        self._group: ProcessGroupGloo | None = None

    def prepare(self) -> tuple[str, int] | None:  # type: ignore[override]  # verl's engines return what they need
        """Where the ranks meet; None from all but the sender."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        return host, self._store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """The policy's rank 0 sends; its other ranks have no part in it (rank -1)."""
        world_size = 1 + rollout_world_size
        ranks = [0] + [-1] * (actor_wg_world_size - 1), list(range(1, world_size))
        actor, rollout = (
            {"rank": side, "world_size": [world_size] * len(side), "address": [metadata[0]] * len(side)}
            for side in ranks
        )
        return actor, rollout

    def init_process_group(self, rank: int, world_size: int, address: tuple[str, int]) -> None:  # type: ignore[override]
        """Meet the other ranks."""
        if rank < 0:
            return
        store = self._store or TCPStore(*address, is_master=False, timeout=_TIMEOUT)
        self._store = store
        self._group = ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, _TIMEOUT)

    def finalize(self) -> None:
        """Part."""
        self._group = self._store = None

    @torch.no_grad()
    async def send_weights(self, weights: Any, global_steps: int | None = None) -> None:
        """Send all tensors. Every rank of the policy exhausts `weights`: their export is collective."""
        bucket: list[Named] = []
        held = 0
        async for name, tensor in ensure_async_iterator(weights):
            if self._group is None:
                continue
            if bucket and held + tensor.nbytes > self.bucket_size:
                self._send(bucket)
                bucket, held = [], 0
            bucket.append((name, tensor.detach().cpu().clone()))  # an export may reuse its memory
            held += tensor.nbytes
        if self._group is not None:
            for last in (bucket, []):  # an empty one is the end
                self._send(last)

    @torch.no_grad()
    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[Named]:  # type: ignore[override]
        """All tensors in the sender's order, each a view of memory that nothing overwrites."""
        while bucket := list(self._receive()):
            for named in bucket:
                yield named

    def _send(self, bucket: list[Named]) -> None:
        head, end = [], 0
        for name, tensor in bucket:
            head.append((name, tensor.dtype, tensor.shape, end))
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        payload = torch.empty(end, dtype=torch.uint8)
        for (_, tensor), (_, _, _, start) in zip(bucket, head, strict=True):
            payload[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        said = torch.frombuffer(bytearray(pickle.dumps(head)), dtype=torch.uint8)
        self._broadcast(torch.tensor([said.numel(), end]))
        self._broadcast(said)
        self._broadcast(payload)

    def _receive(self) -> Iterator[Named]:
        sizes = self._broadcast(torch.empty(2, dtype=torch.int64)).tolist()
        said, payload = (self._broadcast(torch.empty(size, dtype=torch.uint8)) for size in sizes)
        for name, dtype, shape, start in pickle.loads(said.numpy().tobytes()):
            end = start + shape.numel() * dtype.itemsize
            yield name, payload[start:end].view(dtype).view(shape)

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the sender to all; an empty tensor is not worth a message."""
        if self._group is None:
            raise RuntimeError("weights are sent or awaited outside of a transfer: init_process_group was not called")
        if tensor.numel():
            options = BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            self._group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]  # not in torch's stubs
        return tensor

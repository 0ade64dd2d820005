"""An engine of our own, without verl: rollouts of a list of prompts, with the tap and publications of drafters.

One SGLang engine with the algorithm TLT in processes of its own. Prompts are token ids. Knows SGLang's Python
interface; knows neither texts nor training.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tlt_verl.config import Strategy
from tlt_verl.engine.options import EngineOptions
from tlt_verl.segments import Segment, SegmentReader, find_rings

_POLL_S = 0.1
_number = itertools.count()  # of the engines of this process
_T = TypeVar("_T")
_CPU = {
    "device": "cpu",
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,
    "mem_fraction_static": 0.3,
}


@dataclass
class Rollouts:
    """What came of a list of prompts.

    Args:
        begun: prompts that were rolled out, also in part.
        tokens: produced, those of responses that were cut by the time included.
        seconds: wall time.
        responses: token ids of the responses that ended, by the prompt's place in the list.
        verifications: of drafts, for these responses; without drafting 0.
        pauses_ms: how long the scheduler paused for each publication meanwhile.
        rejections: why the engine did not take the others.
    """

    begun: int = 0
    tokens: int = 0
    seconds: float = 0.0
    responses: dict[int, list[int]] = field(default_factory=dict)
    verifications: int = 0
    pauses_ms: list[float] = field(default_factory=list)
    rejections: list[str] = field(default_factory=list)

    @property
    def accept_len(self) -> float:
        """Tokens per verification over the responses that ended, the prefills' tokens not counted; 1 without any."""
        tokens = sum(map(len, self.responses.values())) - len(self.responses)
        return tokens / self.verifications if self.verifications else 1.0

    def add(self, place: int, response: dict[str, Any]) -> None:
        """Count one response of the engine."""
        meta = response["meta_info"]
        self.begun += 1
        self.tokens += meta["completion_tokens"]
        if meta["finish_reason"]["type"] != "abort":
            self.verifications += meta.get("spec_verify_ct", 0)
            self.responses[place] = response["output_ids"]


class OfflineEngine:
    """An engine for rollouts outside of a run.

    Args:
        target: folder of the target.
        drafter: folder of a drafter; None makes one from the target, which is not drafted with.
        strategy: what is drafted.
        publications: folder of drafters `v<version>`.
        max_running: requests at a time.
        options: more arguments of `sglang.Engine`.
    """

    def __init__(
        self,
        target: Path,
        drafter: Path | None,
        strategy: Strategy,
        *,
        publications: Path,
        max_running: int,
        **options: Any,
    ) -> None:
        on_cpu = options.get("device") == "cpu"
        if on_cpu:
            os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # before SGLang is imported
        name = f"offline-{os.getpid()}-{next(_number)}"
        EngineOptions(tap=name, tap_tokens_per_step=1 << 40, publications=str(publications)).export()
        import sglang

        from tlt_verl.engine import client

        self._engine = sglang.Engine(
            **{
                **(_CPU if on_cpu else {}),
                "model_path": str(target),
                "skip_tokenizer_init": True,
                "log_level": "error",
                "max_running_requests": max_running,
                "disable_radix_cache": True,  # every token's hidden state is wanted, prompts' too
                "speculative_algorithm": "TLT",
                "speculative_draft_model_path": None if drafter is None else str(drafter),
                "speculative_num_steps": strategy.num_steps,
                "speculative_eagle_topk": strategy.topk,
                "speculative_num_draft_tokens": strategy.num_draft_tokens,
                **options,
            }
        )
        self._client, self._max_running = client, max_running
        self._readers = [SegmentReader(ring) for ring in find_rings(f"{name}-")]
        if not self._readers:
            self.close()
            raise RuntimeError(f"the engine made no ring of segments {name!r}: its log says why")

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: dict[str, Any],
        *,
        seconds: float | None = None,
        at_once: int | None = None,
        publish: Sequence[int] = (),
        on_segments: Callable[[list[Segment]], None] = lambda segments: None,
        on_progress: Callable[[Rollouts], None] = lambda rollouts: None,
    ) -> Rollouts:
        """Roll out the prompts in their order.

        Args:
            sampling: SGLang's sampling parameters.
            seconds: end there; requests in flight are aborted, their tokens count.
            at_once: requests at a time; None is `max_running`.
            publish: versions of the drafter to publish meanwhile, one after the other.
            on_segments: gets what the tap recorded, while it goes on.
        """
        return self._wait(
            self._run(prompts, sampling, seconds, at_once or self._max_running, publish, on_segments, on_progress)
        )

    def publish(self, version: int) -> str | None:
        """Let the drafter `v<version>` serve; None, or why it was rejected."""
        return self._wait(self._client.publish(self._engine.tokenizer_manager, version))

    def state(self) -> dict[str, Any]:
        """The worker's state: versions, counters of the tap and of publications."""
        return self._wait(self._client.state(self._engine.tokenizer_manager))

    def command(self, **commands: float) -> None:
        """Commands of `TLTWorker.control`.

        Raises:
            RuntimeError: one was refused.
        """
        if not self._wait(self._client.command(self._engine.tokenizer_manager, **commands)):
            raise RuntimeError(f"the engine refused {commands}")

    def lost_segments(self) -> int:
        """Segments that were overwritten before they were read."""
        return sum(reader.lost for reader in self._readers)

    def close(self) -> None:
        """End the engine's processes and remove its rings."""
        self._engine.shutdown()
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run the engine's loop until this is done."""
        return self._engine.loop.run_until_complete(work)

    async def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: dict[str, Any],
        seconds: float | None,
        at_once: int,
        publish: Sequence[int],
        on_segments: Callable[[list[Segment]], None],
        on_progress: Callable[[Rollouts], None],
    ) -> Rollouts:
        rollouts, begin = Rollouts(), time.monotonic()
        slots, over = asyncio.Semaphore(at_once), asyncio.Event()

        async def one(place: int) -> None:
            async with slots:
                if not over.is_set():
                    rollouts.add(place, await self._generate(prompts[place], sampling))

        tasks = [asyncio.create_task(one(place)) for place in range(len(prompts))]
        tasks += [asyncio.create_task(self._publish(publish, rollouts, len(prompts)))] if publish else []
        try:
            pending: set[asyncio.Task] = set(tasks)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=_POLL_S)
                self._pump(on_segments)
                on_progress(rollouts)
                if seconds is not None and time.monotonic() - begin > seconds:
                    over.set()  # again and again: a request may have been on its way at the first time
                    self._engine.tokenizer_manager.abort_request(abort_all=True)
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
        rollouts.seconds = time.monotonic() - begin
        # It answers behind the results that it has processed: what they gave the tap is in the ring.
        await self._client.state(self._engine.tokenizer_manager)
        self._pump(on_segments)
        return rollouts

    async def _generate(self, prompt: Sequence[int], sampling: dict[str, Any]) -> dict[str, Any]:
        return await self._engine.async_generate(input_ids=list(prompt), sampling_params=sampling)

    async def _publish(self, versions: Sequence[int], rollouts: Rollouts, in_flight: int) -> None:
        """Publish one after the other for as long as requests are in flight."""
        for version in versions:
            if len(rollouts.responses) == in_flight:
                return
            if (reason := await self._client.publish(self._engine.tokenizer_manager, version)) is not None:
                rollouts.rejections.append(reason)
                continue
            state = await self._client.state(self._engine.tokenizer_manager)
            rollouts.pauses_ms.append(state["drafter"]["pause_ms"])

    def _pump(self, on_segments: Callable[[list[Segment]], None]) -> None:
        for reader in self._readers:
            if segments := reader.poll():
                on_segments(segments)

"""One SGLang engine in a process of its own, that runs windows of requests on demand and is idle in between.

Engines that are compared are alive at the same time, differ in their environment (which plugins SGLang loads is read
there), and must not take each other down: hence a process for each. `EngineProcess` is the parent's side; run as a
script, this file is the child. Knows SGLang's Python interface; not what is compared, nor what a window is worth.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

_ABORT_AGAIN_S = 0.2
_FLUSH_S = 10.0
_SHUTDOWN_S = 30.0


class EngineProcess:
    """An engine that is started by the constructor and ready when `start` returns.

    Args:
        engine: arguments of `sglang.Engine`.
        environment: more variables for the engine's processes.
        log: file that gets everything that they print.
    """

    def __init__(self, engine: dict[str, Any], environment: dict[str, str], log: Path) -> None:
        self._connection, theirs = Pipe()
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        theirs.close()  # or the end of the child would not be noticed
        self._connection.send(engine)

    def start(self) -> None:
        """Wait until the engine takes requests.

        Raises:
            RuntimeError: it does not start; the message is the log's last error.
        """
        self._answer()

    def run(self, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], **how: Any) -> dict[str, Any]:
        """One window: see `_Window`."""
        return self._ask("run", prompts=prompts, sampling=sampling, **how)

    def state(self) -> dict[str, Any]:
        """What the worker of the algorithm TLT says; {} for another algorithm."""
        return self._ask("state")

    def flush(self) -> None:
        """Forget prompts and responses: the prefix cache, and what a model-free drafter has collected."""
        self._ask("flush")

    def close(self) -> None:
        """End the engine; its processes are killed where it takes too long."""
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SHUTDOWN_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, what: str, **arguments: Any) -> Any:
        self._connection.send((what, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError(last_error(self._log)) from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{type(answer).__name__}: {answer}") from answer
        return answer


def last_error(log: Path) -> str:
    """The last line that names an exception, or the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]+(Error|Exception)|AssertionError)(:|$)", line)]
    return (errors or lines or ["it ended without a word"])[-1]


class _Window:
    """Requests that are sent to the engine while at most so many run.

    Args:
        prompts: token ids, in the order in which they are sent; each is sent once.
        sampling: SGLang's sampling parameters.
        at_once: requests that run at a time.
        keep_full: end as soon as fewer run, because there are no prompts left: the others are aborted, and what they
            had produced counts, as does the step in which they were aborted.
        trace_s: ask the worker of the algorithm TLT for its counters that often; None: never.
    """

    def __init__(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        sampling: dict[str, Any],
        *,
        at_once: int,
        keep_full: bool,
        trace_s: float | None = None,
    ) -> None:
        self._engine, self._sampling, self._keep_full, self._trace_s = engine, sampling, keep_full, trace_s
        self._waiting = deque(prompts)
        self._slots = min(at_once, len(prompts))
        self._running, self._begin_s = 0, 0.0
        self._found: dict[str, Any] = {"tokens": 0, "verifications": 0, "lengths": [], "ended_s": [], "trace": []}

    async def run(self) -> dict[str, Any]:
        """Run it.

        Returns:
            `seconds` from the first request that is sent to the last answer; `tokens` of all responses; of those that
            were not aborted `lengths`, `verifications` (their sum) and `ended_s`, when each ended; `trace`, entries
            (time, running requests, steps of each strategy since the engine's start).
        """
        self._begin_s = time.perf_counter()
        over = asyncio.Event()
        tracing = asyncio.create_task(self._trace(over)) if self._trace_s else None
        pending = {asyncio.create_task(self._client()) for _ in range(self._slots)}
        timeout = None
        while pending:
            done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if self._keep_full and pending:
                timeout = _ABORT_AGAIN_S  # a request may be on its way to the scheduler, where an abort misses it
                self._engine.tokenizer_manager.abort_request(abort_all=True)
        self._found["seconds"] = self._elapsed_s()
        over.set()
        if tracing is not None:
            await tracing
        return self._found

    async def _client(self) -> None:
        while self._waiting:
            self._running += 1
            prompt = self._waiting.popleft()
            response = await self._engine.async_generate(input_ids=list(prompt), sampling_params=self._sampling)
            self._running -= 1
            self._add(response["meta_info"])

    def _add(self, meta: dict[str, Any]) -> None:
        self._found["tokens"] += meta["completion_tokens"]
        if meta["finish_reason"]["type"] != "abort":
            self._found["verifications"] += meta.get("spec_verify_ct", 0)
            self._found["lengths"].append(meta["completion_tokens"])
            self._found["ended_s"].append(self._elapsed_s())

    async def _trace(self, over: asyncio.Event) -> None:
        while not over.is_set():
            strategies = (await _state(self._engine))["speculation"]["strategies"]
            steps = {strategy: counts.get("steps", 0) for strategy, counts in strategies.items()}
            self._found["trace"].append((self._elapsed_s(), self._running, steps))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(over.wait(), self._trace_s)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._begin_s


async def _state(engine: Any) -> dict[str, Any]:
    return (await engine.tokenizer_manager.get_internal_state())[0].get("tlt", {})


async def _flush(engine: Any) -> None:
    deadline = time.monotonic() + _FLUSH_S
    while not (await engine.tokenizer_manager.flush_cache()).success:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the engine was not idle for {_FLUSH_S:.0f} s: its cache cannot be flushed")
        await asyncio.sleep(0.1)


async def _run(engine: Any, **window: Any) -> dict[str, Any]:
    return await _Window(engine, **window).run()


_COMMANDS = {"run": _run, "state": _state, "flush": _flush}


def main(connection: Connection) -> None:
    """Start the engine that the parent describes and answer it until it closes the connection."""
    import sglang

    engine = sglang.Engine(**connection.recv())
    try:
        connection.send(None)
        while True:
            what, arguments = connection.recv()
            try:
                answer = engine.loop.run_until_complete(_COMMANDS[what](engine, **arguments))
            except Exception as error:  # the parent raises it
                answer = RuntimeError(f"{what}: {type(error).__name__}: {error}")
            connection.send(answer)
    except (EOFError, ConnectionError):  # the bench is over, or was killed
        pass
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))

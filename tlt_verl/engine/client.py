"""The engine's front: commands to the worker of each scheduler, and its state.

Runs in the process that owns SGLang's `TokenizerManager`. Nothing here waits for requests in flight.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sglang.srt.managers.io_struct import SetInternalStateReq

PREFIX = "tlt_"
"""Of the names of commands among SGLang's internal state."""

KEY = "tlt"
"""Of the worker's state in SGLang's."""

_POLL_S = 0.01


async def state(tokenizer_manager: Any) -> dict[str, Any]:
    """What `TLTWorker.state` says.

    Raises:
        RuntimeError: the engine's algorithm is not TLT.
    """
    internal = (await tokenizer_manager.get_internal_state())[0]
    if KEY not in internal:
        raise RuntimeError("this engine does not run the algorithm TLT: set speculative_algorithm to TLT")
    return internal[KEY]


async def command(tokenizer_manager: Any, **commands: float) -> bool:
    """Carry out commands of `TLTWorker.control` on every scheduler; whether all of them did."""
    request = SetInternalStateReq(server_args={PREFIX + name: value for name, value in commands.items()})
    return all(await tokenizer_manager.set_internal_state(request))


async def publish(tokenizer_manager: Any, version: int, timeout_s: float = 60.0) -> str | None:
    """Stage and publish a version of the drafter, while requests are in flight.

    Args:
        version: the sub-folder `v<version>` of the folder of publications.

    Returns:
        None when it serves, or why it was rejected.
    """
    deadline = time.monotonic() + timeout_s
    rejections = sum((await state(tokenizer_manager))["drafter"]["rejected"].values())
    if not await command(tokenizer_manager, stage=version):
        return f"version {version}: another one is being staged"
    while time.monotonic() < deadline:
        drafter = (await state(tokenizer_manager))["drafter"]
        if sum(drafter["rejected"].values()) > rejections:
            return drafter["reason"]
        if drafter["staged"] == version and await command(tokenizer_manager, publish=version):
            return None
        await asyncio.sleep(_POLL_S)
    return f"version {version}: not on every rank, or the engine asleep, for {timeout_s:.0f} s"

"""SGLang's internal state, for commands to the drafter's owner and for its counters.

`set_internal_state` takes numbers by name, reaches every tensor-parallel rank at the same point of its loop, and does
not wait for the requests in flight, as weight updates do. Names with a prefix go to the scheduler's worker; `get` adds
what the worker says under one key. The rest goes to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_verl.patches import hooks
from tlt_verl.patches.seam import Seam, Target

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"


def _set(prefix: str, original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    named = recv_req.server_args
    ours = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    control = getattr(scheduler.draft_worker, "control", None)
    if not ours or control is None:
        return original(scheduler, recv_req)
    if len(ours) < len(named):
        return SetInternalStateReqOutput(updated=False)
    return SetInternalStateReqOutput(updated=control(ours, asleep=bool(scheduler.weight_updater.offload_tags)))


def _get(key: str, original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    output = original(scheduler, recv_req)
    state = getattr(scheduler.draft_worker, "state", None)
    if state is not None:
        output.internal_state[key] = state()
    return output


def _install(prefix: str, key: str) -> None:
    """Names with `prefix` are the worker's commands; its state stands under `key`."""

    def set_state(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
        return _set(prefix, original, scheduler, recv_req)

    def get_state(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
        return _get(key, original, scheduler, recv_req)

    hooks.around(SEAM.name, f"{_SCHEDULER}.set_internal_state", set_state)
    hooks.around(SEAM.name, f"{_SCHEDULER}.get_internal_state", get_state)


SEAM = Seam(
    name="sglang.internal_state",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(
            path=f"{_SCHEDULER}.set_internal_state",
            parameters=("recv_req",),
            source_contains=("recv_req.server_args", "SetInternalStateReqOutput(updated="),
        ),
        Target(
            path="sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager."
            "release_memory_occupation",
            source_contains=("self.offload_tags.add(tag)",),
        ),
        Target(
            path=f"{_SCHEDULER}.get_internal_state",
            parameters=("recv_req",),
            source_contains=("GetInternalStateReqOutput(internal_state=",),
        ),
        Target(
            path="sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.set_internal_state",
            parameters=("obj",),
            source_contains=("set_internal_state_communicator(obj)",),
        ),
        Target(
            path="sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.get_internal_state",
            source_contains=("res.internal_state for res in responses",),
        ),
    ),
    why="Publication of drafters while requests are in flight, and the plugin's counters.",
    install=_install,
)

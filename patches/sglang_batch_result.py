"""The moment at which a batch's result is processed: which tokens of it a response keeps is known only then.

The hook is given to the scheduler's worker where that has a `process_batch_result` of its own; others are left alone.
So is the moment at which the scheduler finds nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tlt_verl.patches import hooks
from tlt_verl.patches.seam import Seam, Target

_PROCESS = "sglang.srt.managers.scheduler:Scheduler.process_batch_result"
_ON_IDLE = "sglang.srt.managers.scheduler:Scheduler.on_idle"
_PROCESSOR = "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"
_REQ = "sglang.srt.managers.schedule_batch:Req"


def _process(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> Any:
    around = getattr(scheduler.draft_worker, "process_batch_result", None)
    if around is None:
        return original(scheduler, batch, result)
    return around(partial(original, scheduler), batch, result)


def _idle(original: Callable[..., Any], scheduler: Any) -> Any:
    if (on_idle := getattr(scheduler.draft_worker, "on_idle", None)) is not None:
        on_idle()
    return original(scheduler)


def _install() -> None:
    hooks.around(SEAM.name, _PROCESS, _process)
    hooks.around(SEAM.name, _ON_IDLE, _idle)


SEAM = Seam(
    name="sglang.batch_result",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(path=_PROCESS, parameters=("batch", "result")),
        Target(path=_ON_IDLE),
        Target(
            path=f"{_PROCESSOR}._resolve_spec_v2_tokens",
            source_contains=(
                "accept_lens = result.accept_lens.tolist()",
                "if req.is_retracted or req.finished():",
                "req.spec_verify_ct += 1",
            ),
        ),
        Target(
            path=f"{_REQ}.__init__",
            source_contains=("self.finished_len = None", "self.output_ids = ", "self.is_retracted = False"),
        ),
        Target(path=f"{_REQ}.finished"),
        Target(
            path="sglang.srt.speculative.eagle_worker_v2:EAGLEWorkerV2.forward_batch_generation",
            parameters=("batch",),
            source_contains=(
                "capture_hidden_mode=target_capture_mode",
                "_draft_extend_for_decode(batch, batch_output)",
            ),
        ),
        Target(
            path="sglang.srt.speculative.eagle_worker_common:run_eagle_verify",
            source_contains=("_finalize_accept_tree_path(", "speculative_num_draft_tokens=num_draft_tokens"),
        ),
        Target(
            path="sglang.srt.managers.utils:GenerationBatchResult",
            parameters=("logits_output", "accept_lens", "speculative_num_draft_tokens"),
        ),
    ),
    why="The tap records the hidden states of exactly the tokens that responses keep.",
    install=_install,
)

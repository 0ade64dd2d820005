"""Drafting on and off, between two steps of the scheduler's loop, with requests in flight.

Off is plain decoding through a verification of one node: nothing is drafted, and the drafter's own forward pass is
skipped. Both states are built when the engine starts, with SGLang's own means for adaptive steps; turning it on again
costs acceptance only, for the drafter's cache lacks what was decoded meanwhile.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.environ import envs
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.speculative.adaptive_runtime_state import SpecRuntimeState


class Drafting:
    """The two states of a worker.

    Args:
        worker: an `EAGLEWorkerV2` whose backends and graphs are there.
    """

    def __init__(self, worker: Any) -> None:
        envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND.set(True)
        self._worker = worker
        steps, tokens = worker.speculative_num_steps, worker.speculative_num_draft_tokens
        runner = worker.target_worker.model_runner
        self._on = self._state(steps, tokens, runner.attn_backend, runner.decode_cuda_graph_runner)
        self._off = self._state(0, 1, *self._one_node())
        self.is_on = True

    def turn(self, on: bool) -> None:
        """Draft from the next step on, or do not."""
        self._worker.apply_runtime_state(self._on if on else self._off)
        self.is_on = on

    def _state(self, steps: int, tokens: int, backend: Any, graphs: Any) -> SpecRuntimeState:
        draft = self._worker.draft_worker
        return SpecRuntimeState(
            speculative_num_steps=steps,
            speculative_num_draft_tokens=tokens,
            draft_attn_backend=draft.draft_attn_backend,
            cuda_graph_runner=draft.cuda_graph_runner,
            target_attn_backend=backend,
            target_graph_runner=graphs,
            draft_extend_attn_backend=draft.draft_extend_attn_backend,
            cuda_graph_runner_for_draft_extend=draft.cuda_graph_runner_for_draft_extend,
        )

    def _one_node(self) -> tuple[Any, Any]:
        """The target's attention backend and captured graphs for verifications of one node."""
        runner = self._worker.target_worker.model_runner
        with self._worker._override_worker_state(0, 1):
            backup = runner.init_new_workspace
            try:
                backend = runner._get_attention_backend(init_new_workspace=True)
            finally:
                runner.init_new_workspace = backup
            if runner.decode_cuda_graph_runner is None:  # no graphs on this device, or turned off
                return backend, None
            graphs = DecodeCudaGraphRunner(
                runner, attn_backend=backend, speculative_num_steps=0, speculative_num_draft_tokens=1
            )
            return backend, graphs

"""The strategies that a worker can run, each with all that its shapes need, ready before the first request.

Attention backends and captured graphs have the shapes of a strategy: depth, topk and width of the tree. Those of every
strategy are built when the engine starts; to switch between two steps of the scheduler's loop is to set attributes.
What is equal is built once: verifications of one width share graphs, whoever proposed the drafts. `off` is a
verification of one node. Which graphs there are, and for which batch sizes, is `graph_plan`'s to know.

SGLang's own arguments stay those of the largest strategy: from them it reserves slots of the KV cache. It captures that
strategy's graphs itself, before these; `own_captures` holds it to the planned batch sizes too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner, get_batch_sizes_to_capture
from sglang.srt.runtime_context import get_context, get_spec

from tlt_verl.engine.graph_plan import EXTEND, VERIFY, GraphPlan
from tlt_verl.strategy import OFF, Strategy


@dataclass(frozen=True)
class TargetParts:
    """What the target needs for verifications of one width."""

    backend: Any
    graphs: Any


@dataclass(frozen=True)
class DraftParts:
    """What the drafter needs for one depth, topk and width. `parents` and `scores` are a chain's constants."""

    decode_backend: Any
    decode_graphs: Any
    extend_backend: Any
    extend_graphs: Any
    parents: torch.Tensor | None
    scores: torch.Tensor | None


@dataclass(frozen=True)
class Arm:
    """One strategy, ready to run; `draft` is None where the trained drafter does not run."""

    strategy: Strategy
    target: TargetParts
    draft: DraftParts | None


def own_strategy(worker: Any) -> Strategy:
    """What SGLang's own arguments describe, before an arm is set."""
    return Strategy("eagle", worker.speculative_num_steps, worker.topk, worker.speculative_num_draft_tokens)


def plan_graphs(worker: Any, strategies: Sequence[Strategy], max_running_for_drafting: int | None = None) -> GraphPlan:
    """The captures that the strategies need of what SGLang would capture; none on a CPU, or where graphs are off."""
    runner = worker.target_worker.model_runner
    if runner.device == "cpu" or check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        return GraphPlan(strategies, ())
    batch_sizes, _ = get_batch_sizes_to_capture(runner)
    return GraphPlan(strategies, batch_sizes, max_running_for_drafting)


@contextlib.contextmanager
def own_captures(worker: Any, plan: GraphPlan, *kinds: str) -> Iterator[None]:
    """Graphs that SGLang captures meanwhile, for its own arguments, are for the planned batch sizes of these kinds.

    Where no strategy needs them, which `largest` may bring about, it is one batch size: SGLang captures one at least.
    """
    if not plan.batch_sizes:
        yield
        return
    with _arguments(_runners(worker), plan.sizes_of_own(own_strategy(worker), *kinds)):
        yield


class Arms:
    """The arms of a worker, and the one that runs.

    Args:
        worker: an `EAGLEWorkerV2` whose own backends and graphs are there.
        plan: what it may run, `off` among it, and the graphs for that.
    """

    def __init__(self, worker: Any, plan: GraphPlan) -> None:
        envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND.set(True)
        self._worker, self._draft, self._plan = worker, worker._draft_worker, plan
        self._targets: dict[tuple[int, bool], TargetParts] = {}
        self._extends: dict[int, tuple[Any, Any]] = {}
        self.most_topk = max([strategy.topk for strategy in plan.strategies if strategy.drafter == "eagle"], default=1)
        self._take_own()
        self._make_room_for_logits()
        self._arms = {strategy: self._build(strategy) for strategy in plan.strategies}
        self.active = self._arms[OFF]

    def apply(self, strategy: Strategy) -> Arm:
        """Run this one from the next step on.

        Raises:
            KeyError: it is none of the arms.
        """
        arm = self._arms[strategy]
        if arm is not self.active:
            self._set(arm)
        return arm

    def start(self, strategy: Strategy) -> None:
        """Run this one, whatever was set before."""
        self._set(self._arms[strategy])

    def _set(self, arm: Arm) -> None:
        worker, draft, strategy = self._worker, self._draft, arm.strategy
        runner = worker.target_worker.model_runner
        runner.attn_backend, runner.decode_cuda_graph_runner = arm.target.backend, arm.target.graphs
        worker.speculative_num_draft_tokens = max(strategy.num_draft_tokens, 1)
        worker.speculative_num_steps = strategy.num_steps if arm.draft is not None else 0
        worker.topk = max(strategy.topk, 1)
        if arm.draft is not None:
            parts = arm.draft
            draft.speculative_num_steps, draft.topk = strategy.num_steps, strategy.topk
            draft.speculative_num_draft_tokens = strategy.num_draft_tokens
            draft.draft_attn_backend = draft.draft_runner.draft_attn_backend = parts.decode_backend
            draft.cuda_graph_runner = parts.decode_graphs
            draft.draft_extend_attn_backend = parts.extend_backend
            draft.cuda_graph_runner_for_draft_extend = parts.extend_graphs
            if parts.extend_backend is not None:
                draft.draft_runner.attn_backend = parts.extend_backend
            draft._topk1_parents_prealloc, draft._topk1_score_indices_prealloc = parts.parents, parts.scores
        self.active = arm

    # --- at the engine's start

    def _take_own(self) -> None:
        """What SGLang has built for its own arguments is the first that equal strategies share."""
        worker, draft = self._worker, self._draft
        runner = worker.target_worker.model_runner
        width = worker.speculative_num_draft_tokens
        self._own = (worker.speculative_num_steps, worker.topk, width)
        self._targets[width, worker.topk > 1] = TargetParts(runner.attn_backend, runner.decode_cuda_graph_runner)
        self._extends[width] = (draft.draft_extend_attn_backend, draft.cuda_graph_runner_for_draft_extend)
        self._own_draft = self._draft_parts()

    def _make_room_for_logits(self) -> None:
        """Graphs of any verification write their logits to one buffer; SGLang's has rows for its own captures."""
        runners, rows = _runners(self._worker), self._plan.logits_rows
        if any(runner.graph_shared_output.max_rows < rows for runner in runners if rows):
            shared = GraphSharedOutput(device=runners[0].graph_shared_output.device, max_rows=rows)
            for runner in runners:
                runner.graph_shared_output = shared

    def _draft_parts(self) -> DraftParts:
        draft = self._draft
        chain = draft.topk == 1
        return DraftParts(
            draft.draft_attn_backend,
            draft.cuda_graph_runner,
            draft.draft_extend_attn_backend,
            draft.cuda_graph_runner_for_draft_extend,
            draft._topk1_parents_prealloc if chain else None,
            draft._topk1_score_indices_prealloc if chain else None,
        )

    def _build(self, strategy: Strategy) -> Arm:
        draft = None
        if strategy.drafter == "eagle":
            shape = (strategy.num_steps, strategy.topk, strategy.num_draft_tokens)
            draft = self._own_draft if shape == self._own else self._build_draft(*shape)
        return Arm(strategy, self._target(max(strategy.num_draft_tokens, 1), strategy.topk > 1), draft)

    def _target(self, width: int, tree: bool) -> TargetParts:
        if (width, tree) not in self._targets:
            steps, topk = (max(width - 2, 1), 2) if tree else (width - 1, 1)
            batch_sizes = self._plan.sizes(VERIFY, (width, int(tree)))
            with self._as_if(steps, topk, width, batch_sizes):
                self._targets[width, tree] = self._build_target(steps, width, bool(batch_sizes))
        return self._targets[width, tree]

    def _build_target(self, steps: int, width: int, capture: bool) -> TargetParts:
        runner = self._worker.target_worker.model_runner
        backup = runner.init_new_workspace
        try:
            backend = runner._get_attention_backend(init_new_workspace=True)
        finally:
            runner.init_new_workspace = backup
        if not capture:
            return TargetParts(backend, None)
        graphs = DecodeCudaGraphRunner(
            runner, attn_backend=backend, speculative_num_steps=steps, speculative_num_draft_tokens=width
        )
        return TargetParts(backend, graphs)

    def _build_draft(self, steps: int, topk: int, width: int) -> DraftParts:
        """SGLang builds the drafter's parts together; graphs of an extend that is there already are not captured."""
        draft, known = self._draft, self._extends.get(width)
        batch_sizes = self._plan.sizes(EXTEND, (width,))  # the draft's, where it has graphs, are the same
        with self._as_if(steps, topk, width, batch_sizes):
            draft.init_attention_backend()
            draft.cuda_graph_runner = draft.cuda_graph_runner_for_draft_extend = None
            no_extend = envs.SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH
            with no_extend.override(known is not None or no_extend.get()):
                if batch_sizes:
                    draft._capture_cuda_graphs()
            if known is not None:
                draft.draft_extend_attn_backend, draft.cuda_graph_runner_for_draft_extend = known
            self._extends[width] = (draft.draft_extend_attn_backend, draft.cuda_graph_runner_for_draft_extend)
            return self._draft_parts()

    @contextlib.contextmanager
    def _as_if(self, steps: int, topk: int, width: int, batch_sizes: Sequence[int]) -> Iterator[None]:
        """SGLang's arguments, the worker's and the drafter's are those of another strategy; restored at the end."""
        worker, draft = self._worker, self._draft
        before = worker.topk, draft.topk, get_spec().speculative_eagle_topk
        chain = draft._topk1_parents_prealloc, draft._topk1_score_indices_prealloc
        changes = {
            "speculative_num_steps": steps,
            "speculative_eagle_topk": topk,
            "speculative_num_draft_tokens": width,
        }

        def set_topk(of_worker: int, of_draft: int, of_arguments: int) -> None:
            worker.topk, draft.topk = of_worker, of_draft
            get_context().override("tlt.arms", speculative_eagle_topk=of_arguments)

        set_topk(topk, topk, topk)
        try:
            with worker._override_worker_state(steps, width):
                try:
                    with _arguments(_runners(worker), batch_sizes, **changes):
                        yield
                finally:
                    set_topk(*before)
        finally:
            set_topk(*before)
            draft._topk1_parents_prealloc, draft._topk1_score_indices_prealloc = chain


def _runners(worker: Any) -> list[Any]:
    """The model runners of the target and of the drafter."""
    return [worker.target_worker.model_runner, worker._draft_worker.draft_runner]


@contextlib.contextmanager
def _arguments(runners: Sequence[Any], batch_sizes: Sequence[int], **changes: Any) -> Iterator[None]:
    """The runners have SGLang's arguments with these changes, and capture graphs for these batch sizes.

    SGLang keeps its arguments twice. `get_context().override` changes one copy; graph runners and some attention
    backends read the other, `runner.server_args`: topk, the drafter's widths, and the batch sizes, which are
    `cuda_graph_config.decode.bs` whatever `cuda_graph_bs_decode` is. That one is read-only, so runners get another.
    """
    before = [runner.server_args for runner in runners]
    for runner in runners:
        arguments = copy.copy(runner.server_args)
        graphs = arguments.cuda_graph_config
        if batch_sizes:
            decode = dataclasses.replace(graphs.decode, bs=list(batch_sizes))
            changes["cuda_graph_config"] = dataclasses.replace(graphs, decode=decode)
        vars(arguments).update(changes)
        runner.server_args = arguments
    try:
        yield
    finally:
        for runner, arguments in zip(runners, before, strict=True):
            runner.server_args = arguments

"""The model-free drafter inside SGLang: requests in, a verify input out.

What it proposes is verified exactly as the trained drafter's tree is: the input is made by SGLang's own builder and
kernel, from the arrays that EAGLE's draft loop would have left. The kernel knows a tree as candidates in groups of
topk, one group behind the root and one behind each parent; any tree no wider than topk can be written so.

Tokens come from the requests themselves. Where the scheduler runs ahead of its results (overlap), the last step's
tokens are read from the device, which waits for that step. Knows SGLang's batches; what is proposed is the corpus's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.speculative.eagle_utils import default_tree_mask_mode
from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input

from tlt_verl.engine.ngram import Limits, NgramCorpus
from tlt_verl.engine.ngram_tree import Proposal, Shape

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from tlt_verl.strategy import Strategy


class NgramDrafter:
    """The model-free drafter of one scheduler.

    Every tensor-parallel rank has its own and makes the same proposals: they depend on nothing but the tokens.

    Args:
        target_worker: SGLang's `TpModelWorker` of the target; its attention backend may own the mask's memory.
        limits: of the corpus.
    """

    def __init__(self, target_worker: Any, limits: Limits | None = None) -> None:
        self.corpus = NgramCorpus(limits)
        self.epoch = 0
        """Of the requests that begin; the policy's version will do."""
        self._target_worker = target_worker
        self._launched: tuple[list[Req], torch.Tensor, torch.Tensor | None] | None = None

    def launched(self, batch: ScheduleBatch, result: Any) -> None:
        """A step was launched; its tokens are read from the device if the next one needs them earlier."""
        self._launched = (list(batch.reqs), result.next_token_ids, result.accept_lens)

    def read(self, reqs: Sequence[Req]) -> None:
        """Take in what these requests have written, after their results were processed."""
        for req in reqs:
            finished = req.finished()
            if req.rid not in self.corpus:
                if finished or req.is_retracted:
                    continue
                self.corpus.begin(req.rid, req.origin_input_ids, self.epoch)
            end = len(req.output_ids) if req.finished_len is None else min(req.finished_len, len(req.output_ids))
            self.corpus.extend(req.rid, req.output_ids[self.corpus.length(req.rid) : end])
            if finished:
                self.corpus.finish(req.rid)

    def forget(self) -> None:
        """No request is running: those that never finished (aborted ones) are over."""
        self._launched = None
        self.corpus.finish_all()

    def verify_input(self, batch: ScheduleBatch, strategy: Strategy) -> EagleVerifyInput:
        """The trees of a decode batch, ready to be verified; `batch.spec_info` is its `EagleDraftInput`."""
        self._take_in(batch)
        shape = Shape(strategy.num_steps, strategy.topk, strategy.num_draft_tokens)
        proposals = self.corpus.propose([req.rid for req in batch.reqs], shape)
        return build_verify_input(batch, proposals, shape, self._target_worker)

    def metrics(self) -> dict[str, int]:
        """`NgramCorpus.metrics`."""
        return self.corpus.metrics()

    def _take_in(self, batch: ScheduleBatch) -> None:
        """Everything up to each request's root: what its results say, and what the step before this one produced."""
        self.read(batch.reqs)
        late: list[tuple[str, int]] = []
        for req, in_cache in zip(batch.reqs, batch.seq_lens.tolist(), strict=True):
            if req.rid not in self.corpus:  # over, and in this batch all the same
                self.corpus.begin(req.rid, req.origin_input_ids, self.epoch)
                self.corpus.extend(req.rid, req.output_ids)
            written = in_cache + 1 - len(req.origin_input_ids)  # the root is written, and not in the cache
            if (missing := written - self.corpus.length(req.rid)) > 0:
                late.append((req.rid, missing))
        if late and self._launched is not None:
            reqs, tokens, lens_launched = self._launched
            rows = {req.rid: row for row, req in enumerate(reqs)}
            known = tokens.view(len(rows), -1).tolist()
            counts = [1] * len(rows) if lens_launched is None else lens_launched.tolist()
            for rid, missing in late:
                if (row := rows.get(rid)) is not None:
                    self.corpus.extend(rid, known[row][: counts[row]][-missing:])


def build_verify_input(
    batch: ScheduleBatch, proposals: Sequence[Proposal], shape: Shape, target_worker: Any
) -> EagleVerifyInput:
    """The verify input of B proposed trees, by SGLang's own builder.

    The root of each tree is the batch's bonus token, whatever the proposal says.

    Args:
        batch: a decode batch; `batch.spec_info.bonus_tokens` is int32 [B].
        proposals: B trees of N nodes each, breadth first, within `shape`.
        target_worker: SGLang's `TpModelWorker` of the target.

    Raises:
        ValueError: a tree is not one of this shape.
    """
    device = batch.seq_lens.device
    arrays = [tree_arrays(proposal.parents, shape) for proposal in proposals]
    parents = torch.tensor([parents for parents, _ in arrays], dtype=torch.int64)
    selected = torch.tensor([selected for _, selected in arrays], dtype=torch.int64)
    drafts = torch.tensor([proposal.tokens[1:] for proposal in proposals], dtype=torch.int64)
    return build_eagle_verify_input(
        batch,
        batch.spec_info,
        parents.to(device, non_blocking=True),
        selected.to(device, non_blocking=True),
        drafts.to(device, non_blocking=True),
        None,
        target_worker=target_worker,
        topk=shape.topk,
        num_steps=shape.num_steps,
        num_draft_tokens=shape.num_draft_tokens,
        tree_mask_mode=default_tree_mask_mode(),
        device=str(device),
    )


def tree_arrays(parents: Sequence[int], shape: Shape) -> tuple[list[int], list[int]]:
    """A tree as EAGLE's draft loop leaves it for `build_tree_kernel_efficient`.

    Args:
        parents: [N] of nodes that stand breadth first; -1 for the root.

    Returns:
        parent_list: [topk * (num_steps - 1) + 1], the candidate behind which each group of topk candidates stands;
            the first group stands behind the root, entries of groups that are not used are 0.
        selected: [N - 1], ascending: the candidate that each node but the root is.

    Raises:
        ValueError: the nodes are not N, not breadth first, or too deep, too wide or too many parents for the shape.
    """
    if len(parents) != shape.num_draft_tokens or parents[0] != -1:
        raise ValueError(f"{len(parents)} nodes {list(parents)} are no tree of {shape}")
    groups, used, depths = [0] + [-1] * (len(parents) - 1), [0] * len(parents), [0] * len(parents)
    parent_list, selected, last = [0] * (shape.most_parents + 1), [0] * (len(parents) - 1), 0
    group = 0
    for node, parent in enumerate(parents[1:], start=1):
        depths[node] = depths[parent] + 1
        if not last <= parent < node or used[parent] >= shape.topk or depths[node] > shape.num_steps:
            raise ValueError(f"node {node} behind node {parent} of {list(parents)} is in no tree of {shape}")
        last = parent
        if groups[parent] < 0:
            group += 1
            if group > shape.most_parents:
                raise ValueError(f"{list(parents)} has more than {shape.most_parents} parents, the most of {shape}")
            groups[parent], parent_list[group] = group, selected[parent - 1]
        selected[node - 1] = groups[parent] * shape.topk + used[parent]
        used[parent] += 1
    return parent_list, selected

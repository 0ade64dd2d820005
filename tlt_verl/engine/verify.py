"""Exact verification of a tree of drafts, at any temperature, top-k, top-p and min-p, on every device.

The method: at every node that the walk reaches, draw the target's token exactly as the engine would draw it without
speculation; follow the child that carries that token; stop where there is none and emit the drawn token. What is
emitted is always the draw itself, and each draw depends on nothing but its own prefix, so the emitted tokens follow the
target's distribution by construction, whatever was drafted. A draft is accepted with the target's probability of it,
which is what target-only tree verification (SpecInfer's with certain drafts) reaches too.

What cannot be exact behind a draft (penalties, which change with every token) runs without speculation: such a request
accepts no draft and draws one token from its root, with the penalties of the tokens before it.

Legend: B requests, N nodes a request (root included), V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.eagle_utils import verify_tree_greedy_func
from sglang.srt.utils.async_probe import sanitize_nan_logits

from tlt_verl.engine.algorithm import is_tlt
from tlt_verl.engine.sampling import NodeSampler

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.speculative.eagle_info import EagleVerifyInput


def eagle_sample(
    original: Callable[..., Any], verify_input: Any, batch: Any, logits_output: Any, grammar_mask: Any = None
) -> Any:
    """Stands around SGLang's `eagle_sample` and takes the batches of TLT that stock verification would get wrong."""
    if not is_tlt(batch.spec_algorithm) or stock_is_exact(batch):
        return original(verify_input, batch, logits_output, grammar_mask)
    return sample_and_accept(verify_input, batch, logits_output, grammar_mask)


def stock_is_exact(batch: ScheduleBatch) -> bool:
    """Whether stock verification of this batch is exact: nothing to verify, or greedy without penalties."""
    if batch.forward_mode.is_idle():
        return True
    return batch.sampling_info.is_all_greedy and not _has_penalties(batch.sampling_info)


def sample_and_accept(
    verify_input: EagleVerifyInput,
    batch: ScheduleBatch,
    logits_output: LogitsProcessorOutput,
    grammar_mask: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Verify a batch of trees. Same contract as SGLang's `eagle_sample`.

    Biases and grammar are applied to `logits_output.next_token_logits` in place, as stock verification does: the
    log-probs are computed from it afterwards.

    Returns:
        predict: int32 [B * N], the token drawn at every accepted node.
        accept_lens: int32 [B], tokens produced, the bonus token included.
        accept_index: int32 [B, depth + 1], flat indices of the accepted nodes, -1 behind them.
    """
    requests, nodes = len(batch.seq_lens), verify_input.draft_token_num
    logits, info = logits_output.next_token_logits, batch.sampling_info
    sanitize_nan_logits(logits, "verify: target model logits")
    first_child = verify_input.retrieve_next_token
    if _has_penalties(info):
        first_child = _without_drafts(first_child, batch.reqs)
    _apply_biases(logits, info, nodes)
    if grammar_mask is not None:
        grammar_mask.apply(logits)

    candidates = verify_input.draft_token.view(requests, nodes)
    sample = NodeSampler(logits, info, verify_input.positions, nodes)
    links = (first_child, verify_input.retrieve_next_sibling)
    if logits.device.type == "cpu":
        target = sample_reached(sample, candidates, *links, depth=verify_input.max_tree_depth)
    else:  # all nodes at once: no host synchronisation
        target = sample(torch.arange(requests * nodes, device=logits.device)).view(requests, nodes)
    predict = torch.zeros(requests * nodes, dtype=torch.int32, device=logits.device)
    accept_index = torch.full((requests, verify_input.max_tree_depth), -1, dtype=torch.int32, device=logits.device)
    accepted_drafts = torch.empty(requests, dtype=torch.int32, device=logits.device)
    verify_tree_greedy_func(
        predicts=predict,
        accept_index=accept_index,
        accept_token_num=accepted_drafts,
        candidates=candidates,
        retrieve_index=verify_input.retrieve_index,
        retrieve_next_token=first_child,
        retrieve_next_sibling=verify_input.retrieve_next_sibling,
        target_predict=target,
        topk=verify_input.tree_topk,
    )
    _agree_across_ranks(predict, accept_index, accepted_drafts)
    return predict, accepted_drafts + 1, accept_index


def sample_reached(
    sample: Any, candidates: torch.Tensor, first_child: torch.Tensor, next_sibling: torch.Tensor, depth: int
) -> torch.Tensor:
    """Draw tokens only at the nodes that the walk reaches, level by level: as many rows as tokens are produced.

    Args:
        sample: rows int64 [R] of flat node indices -> tokens int64 [R].
        candidates, first_child, next_sibling: int64 [B, N], on the host.
        depth: nodes on the longest path, the root included.

    Returns:
        int64 [B, N]: the drawn tokens; 0 at nodes that were not reached, which no walk along the drawn tokens visits.
    """
    requests, nodes = candidates.shape
    target = torch.zeros(requests, nodes, dtype=torch.int64)
    tables = [table.tolist() for table in (candidates, first_child, next_sibling)]
    frontier = [(request, 0) for request in range(requests)]
    for _ in range(depth):
        if not frontier:
            break
        rows = torch.tensor([request * nodes + node for request, node in frontier])
        drawn = sample(rows)
        target.view(-1)[rows] = drawn
        reached = []
        for (request, node), token in zip(frontier, drawn.tolist(), strict=True):
            tokens, child, sibling = (table[request] for table in tables)
            following = child[node]
            while following >= 0 and tokens[following] != token:
                following = sibling[following]
            if following >= 0:
                reached.append((request, following))
        frontier = reached
    return target


def _has_penalties(info: SamplingBatchInfo) -> bool:
    """Whether any request of the batch is penalised; in overlap mode the penalties arrive accumulated."""
    orchestrator = info.penalizer_orchestrator
    accumulated = info.acc_additive_penalties is not None or info.acc_scaling_penalties is not None
    return accumulated or (orchestrator is not None and orchestrator.is_required)


def needs_no_drafts(req: Req) -> bool:
    """Whether a request's penalties change from token to token, so that a draft cannot be judged exactly."""
    params = req.sampling_params
    return (
        params.frequency_penalty != 0
        or params.presence_penalty != 0
        or params.repetition_penalty != 1
        or len(req.output_ids) < params.min_new_tokens
    )


def _without_drafts(first_child: torch.Tensor, reqs: list[Req]) -> torch.Tensor:
    """The links [B, N] with the root made childless for the requests that take no draft."""
    rows = [i for i, req in enumerate(reqs) if needs_no_drafts(req)]
    if rows:
        first_child = first_child.clone()
        first_child[torch.tensor(rows, device=first_child.device), 0] = -1
    return first_child


def _apply_biases(logits: torch.Tensor, info: SamplingBatchInfo, nodes: int) -> None:
    """Penalties on the roots, by the engine's own function; the static logit bias on every node. In place."""
    by_node = logits.view(-1, nodes, logits.shape[-1])
    if _has_penalties(info):
        root = by_node[:, 0].clone()
        dataclasses.replace(info, grammar_mask=None, logit_bias=None).apply_logits_bias(root)
        by_node[:, 0] = root
    if info.logit_bias is not None:
        by_node += info.logit_bias[:, None]


def _agree_across_ranks(*tensors: torch.Tensor) -> None:
    """Tensor-parallel ranks draw their own random numbers: rank 0's draws count."""
    group = get_parallel().attn_tp_group if is_dp_attention_enabled() else get_tp_group()
    if group.world_size > 1:
        for tensor in tensors:
            group.broadcast(tensor, src=0)

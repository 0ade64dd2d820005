"""SGLang attention on a CPU, batched: the backend `tlt_cpu`.

SGLang's own `torch_native` loops over the requests of a batch and has no tree verify and no draft modes. This one
gathers a batch's keys and values once per layer and calls one scaled-dot-product attention for all of it, in every
mode: decode, extend (with prefix-cache hits), tree verify, multi-step draft, draft extend. Causal multi-head and
grouped-query attention; sliding windows, logit caps, cross attention, encoders and MLA are refused by name.

Knows SGLang's forward modes and pools; knows nothing of the algorithm TLT or of verl.

Legend: B requests, T topk, S draft steps, n query tokens a request, L key/value tokens a request (padded), H query
heads, K key/value heads, G = H / K query heads that share one, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

NAME = "tlt_cpu"

# A padded extend batch may compute this many times the cells that its requests need before they are run one by one.
_MAX_PADDING = 2.0

# Bytes that one thread gathers faster than two do (docs/LOG.md).
_COPIED_ALONE = 4 << 20


@dataclass(frozen=True)
class Block:
    """Requests that are computed by one attention call.

    Args:
        slots: int64 [B, L] pool slots of the keys and values; padding points at slot 0.
        mask: bool [B, 1, n, L], True where a query sees a key; None when every query sees every key; "causal" for one
            request without prefix.
        rows: the block's queries as a slice of the flat query tensor, when contiguous; else int64 [B, n] indices
            into it, with padding pointing at row 0.
        real: bool [B, n], which queries are not padding; None when all are real.
        n: queries a request.
    """

    slots: torch.Tensor
    mask: torch.Tensor | str | None
    rows: slice | torch.Tensor
    real: torch.Tensor | None
    n: int
    _biases: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    def bias(self, shared: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask as what is added to scores, 0 or -inf; None without one. Made once for all layers of a pass.

        [B, 1, shared * n, L], for `shared` query heads of n queries behind each other; [B, 1, 1, L] where n is 1.
        """
        if not isinstance(self.mask, torch.Tensor):
            return None
        key = shared, dtype
        if key not in self._biases:
            hidden = ~self.mask if self.n == 1 else ~self.mask.repeat(1, 1, shared, 1)
            self._biases[key] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return self._biases[key]


def uniform_block(table: torch.Tensor, kv_lens: torch.Tensor, n: int, tree: torch.Tensor | None = None) -> Block:
    """A block in which every request has n queries: its last n key/value tokens.

    Args:
        table: [B, >= max(kv_lens)] pool slots of each request, in order.
        kv_lens: int64 [B], queries included.
        tree: bool [B, n, n], which of the n last tokens each query sees; causal when None.
    """
    longest = int(kv_lens.max())
    column = torch.arange(longest)
    inside = column < kv_lens[:, None]  # [B, L]
    slots = torch.where(inside, table[:, :longest], 0).long()
    all_rows = slice(0, kv_lens.numel() * n)
    if n == 1:
        full = bool((kv_lens == longest).all())
        return Block(slots, None if full else inside[:, None, None, :], all_rows, None, 1)
    first = (kv_lens - n)[:, None]  # [B, 1], where the queries begin
    if tree is None:
        mask = column[None, None] <= (first + torch.arange(n))[:, :, None]
    else:
        mask = (column[None, None] < first[:, :, None]).repeat(1, n, 1)
        place = (first + torch.arange(n))[:, None, :].expand(-1, n, -1)
        mask.scatter_(2, place, tree)
    return Block(slots, mask[:, None], all_rows, None, n)


def extend_blocks(table: torch.Tensor, kv_lens: list[int], new_lens: list[int]) -> list[Block]:
    """Blocks for an extend batch, whose requests have different numbers of new tokens behind different prefixes.

    Args:
        table: [B, max_context] pool slots of each request.
        kv_lens: tokens a request after the extend; new_lens: how many of them are new (the queries).
    """
    most_new, longest = max(new_lens), max(kv_lens)
    needed = sum(n * length for n, length in zip(new_lens, kv_lens, strict=True))
    if len(kv_lens) == 1 or len(kv_lens) * most_new * longest > _MAX_PADDING * max(needed, 1):
        return _one_by_one(table, kv_lens, new_lens)
    lengths, new = torch.tensor(kv_lens), torch.tensor(new_lens)
    query, column = torch.arange(most_new), torch.arange(longest)
    start = torch.cumsum(new, 0) - new
    real = query < new[:, None]
    rows = torch.where(real, start[:, None] + query, 0)
    position = (lengths - new)[:, None] + torch.where(real, query, 0)
    mask = column <= position[:, :, None]
    slots = torch.where(column < lengths[:, None], table[:, :longest], 0).long()
    return [Block(slots, mask[:, None], rows, real, most_new)]


def _one_by_one(table: torch.Tensor, kv_lens: list[int], new_lens: list[int]) -> list[Block]:
    blocks, start = [], 0
    for request, (length, n) in enumerate(zip(kv_lens, new_lens, strict=True)):
        mask: torch.Tensor | str | None = None
        if n == length:
            mask = "causal"
        elif n > 1:
            mask = (torch.arange(length) <= (length - n + torch.arange(n))[:, None])[None, None]
        slots = table[request : request + 1, :length].long()
        blocks.append(Block(slots, mask, slice(start, start + n), None, n))
        start += n
    return blocks


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: Block, scale: float) -> torch.Tensor:
    """Attention of one block.

    Args:
        query: [B, n, H, D]; keys [slots, K, D] and values [slots, K, Dv] are a layer's whole pools.

    Returns:
        [B, n, H, Dv]
    """
    batch, n, heads, _ = query.shape
    key, value = (gather(pool, block.slots).transpose(1, 2) for pool in (keys, values))  # [B, K, L, D]
    if key.dtype != query.dtype:
        key, value = key.to(query.dtype), value.to(query.dtype)
    shared = heads // key.shape[1]
    if block.mask == "causal":
        out = scaled_dot_product_attention(
            query.transpose(1, 2), key, value, is_causal=True, scale=scale, enable_gqa=shared > 1
        )
        return out.transpose(1, 2)
    # Grouped-query attention as more queries of one head, g-major: keys and values are read once, not once a group.
    grouped = query.view(batch, n, -1, shared, query.shape[-1]).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, K, G*n, D]
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=block.bias(shared, query.dtype), scale=scale)
    return out.unflatten(2, (shared, n)).permute(0, 3, 1, 2, 4).reshape(batch, n, heads, -1)


def gather(pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows [B, L, K, D] of a contiguous pool [slots, K, D].

    Few bytes are copied by this thread: from 64 KiB on torch wakes another, which takes longer than copying them.
    """
    index, row = slots.flatten(), pool[0].nbytes
    if index.numel() * row > _COPIED_ALONE:
        return pool.index_select(0, index).unflatten(0, slots.shape)
    rows = torch.from_numpy(pool.view(torch.uint8).numpy().take(index.numpy(), axis=0))
    return rows.view(pool.dtype).unflatten(0, slots.shape)


def choose_cpu_attention(server_args: Any) -> None:
    """Take this backend for the algorithm TLT where the choice would have no tree verify.

    That is `torch_native`, and `intel_amx` (SGLang's default on a CPU) unless a native sgl_kernel is installed.
    """
    if server_args.device != "cpu" or not is_tlt(server_args):
        return
    if server_args.attention_backend == "torch_native" or (
        server_args.attention_backend == "intel_amx" and not has_native_kernels()
    ):
        logger.info("attention_backend=%s has no tree verify here: using %s", server_args.attention_backend, NAME)
        server_args.attention_backend = NAME


def is_tlt(server_args: Any) -> bool:
    """Whether an engine's arguments name the algorithm TLT."""
    return (server_args.speculative_algorithm or "").upper() == "TLT"


def has_native_kernels() -> bool:
    """Whether `sgl_kernel` is a native build for this CPU, not the torch stand-in."""
    import sgl_kernel

    return not getattr(sgl_kernel, "IS_STANDIN", False)


class CpuAttentionBackend(AttentionBackend):
    """One backend for every mode. Metadata is built once a forward pass and serves all layers.

    Raises:
        NotImplementedError: the model needs MLA, a page size above 1, or an encoder.
    """

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        if runner.use_mla_backend or runner.model_config.is_encoder_decoder:
            kind = "MLA" if runner.use_mla_backend else "encoder-decoder"
            raise NotImplementedError(f"attention_backend={NAME} does not support {kind} models")
        if runner.server_args.page_size not in (None, 1):
            raise NotImplementedError(f"attention_backend={NAME} takes page_size=1, got {runner.server_args.page_size}")
        self.device = runner.device
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.max_context_len = runner.model_config.context_len
        self.blocks: list[Block] = []
        self.plan: Callable[[], list[Block]] | None = None
        """Makes the blocks of this pass when they are first asked for; None where they are there."""

    def support_triton(self) -> bool:
        """No Triton on this device."""
        return False

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Build the blocks of this pass. `seq_lens` excludes the drafts in verify and includes them in draft extend."""
        mode, self.plan = forward_batch.forward_mode, None
        if mode.is_idle():
            self.blocks = []
            return
        table = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices.long()]
        lengths = forward_batch.seq_lens.long()
        if mode.is_decode():
            self.blocks = [uniform_block(table, lengths, 1)]
        elif mode.is_target_verify():
            self.blocks = [self._verify_block(table, lengths, forward_batch.spec_info)]
        else:
            new = self._new_lens(forward_batch)
            if len(new) > 1 and len(set(new)) == 1:
                self.blocks = [uniform_block(table, lengths, new[0])]
            else:
                self.blocks = extend_blocks(table, lengths.tolist(), new)

    @staticmethod
    def _new_lens(forward_batch: ForwardBatch) -> list[int]:
        if forward_batch.extend_seq_lens_cpu is not None:
            return [int(n) for n in forward_batch.extend_seq_lens_cpu]
        return [int(n) for n in forward_batch.extend_seq_lens.tolist()]

    @staticmethod
    def _verify_block(table: torch.Tensor, lengths: torch.Tensor, verify: Any) -> Block:
        n = verify.draft_token_num
        tree = None
        if verify.tree_topk != 1:
            tree = verify.custom_mask[: lengths.numel() * n * n].view(-1, n, n)
        return uniform_block(table, lengths + n, n, tree)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q [tokens, H*D]; k, v [tokens, K, D] or None. Returns [tokens, H*Dv]."""
        _refuse_unsupported(layer)
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = query.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        if self.plan is not None:
            self.blocks, self.plan = self.plan(), None
        for block in self.blocks:
            result = attend(_take(query, block), keys, values, block, layer.scaling)
            if block.real is None:
                out[block.rows] = result.flatten(0, 1)
            else:
                out[block.rows[block.real]] = result[block.real]  # type: ignore[index]
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    forward_extend = _forward
    forward_decode = _forward


def _take(query: torch.Tensor, block: Block) -> torch.Tensor:
    """The block's queries [B, n, H, D] out of [tokens, H, D]."""
    taken = query[block.rows]
    return taken.view(-1, block.n, *query.shape[1:]) if isinstance(block.rows, slice) else taken


def _refuse_unsupported(layer: RadixAttention) -> None:
    window = layer.sliding_window_size
    if window is not None and window > -1:
        raise NotImplementedError(f"attention_backend={NAME} does not support sliding windows (window {window})")
    if layer.logit_cap:
        raise NotImplementedError(f"attention_backend={NAME} does not support a logit cap ({layer.logit_cap})")
    if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
        raise NotImplementedError(f"attention_backend={NAME} supports causal decoder attention, got {layer.attn_type}")


class CpuMultiStepDraftBackend:
    """The draft's S - 1 decode steps over T branches: one `CpuAttentionBackend` a step, planned together.

    Branch t of request b sees the sequence [0, L) and its own drafts, which stand in the slots L + t*S + [0, step].
    """

    needs_cpu_seq_lens = True

    def __init__(self, runner: ModelRunner, topk: int, num_steps: int) -> None:
        self.topk, self.num_steps = topk, num_steps
        self.attn_backends = [CpuAttentionBackend(runner) for _ in range(num_steps - 1)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan every step, when it is taken; `seq_lens` does not advance between them."""
        indices, lengths = forward_batch.req_pool_indices.long(), forward_batch.seq_lens.long()

        @functools.cache
        def table() -> torch.Tensor:
            rows = self.attn_backends[0].req_to_token_pool.req_to_token[indices]
            return branch_table(rows, lengths, self.topk, self.num_steps)

        def plan(step: int) -> list[Block]:
            return [uniform_block(table(), lengths.repeat_interleave(self.topk) + step + 1, 1)]

        for step, backend in enumerate(self.attn_backends):
            backend.plan = functools.partial(plan, step)


def branch_table(rows: torch.Tensor, lengths: torch.Tensor, topk: int, num_steps: int) -> torch.Tensor:
    """Slots of each branch in sequence order.

    Args:
        rows: [B, max_context] slots of each request; lengths: int64 [B].

    Returns:
        [B * T, >= max(lengths) + S]
    """
    if topk == 1:
        return rows
    batch, width = lengths.numel(), int(lengths.max()) + num_steps
    table = rows[:, None, :width].repeat(1, topk, 1)  # [B, T, width]
    place = (lengths[:, None] + torch.arange(num_steps))[:, None].expand(batch, topk, num_steps)
    source = place + (torch.arange(topk) * num_steps)[:, None]
    table.scatter_(2, place, rows.gather(1, source.flatten(1)).view(batch, topk, num_steps))
    return table.flatten(0, 1)

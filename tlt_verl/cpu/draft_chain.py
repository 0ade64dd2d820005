"""A chain of drafts on a CPU, in one loop: the draft model's layer without a forward pass of SGLang around every step.

SGLang's draft step is made for devices where it is captured once and replayed. On a CPU it runs anew for every token,
and for a layer of a few million parameters most of its time is the interpreter's. Here the prefix is gathered once for
all steps, and a step is the layer's operations and nothing else. Its own keys and values go to no pool: whatever draft
extend reads of these slots it has written itself.

What is computed is what SGLang computes, by the layout in `tlt_verl.drafter.eagle`. Trees, and models that are not of
that layout, go SGLang's way. Drafts decide no token: a difference would cost acceptance.

Legend: B requests, S drafts, L key/value tokens (padded), Q query heads, K key/value heads, D head size, H hidden size,
V vocabulary of the draft head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.runtime_context import get_spec

from tlt_verl.cpu.sglang_attention import CpuMultiStepDraftBackend, gather, has_native_kernels, is_tlt

logger = logging.getLogger(__name__)

ARCHITECTURES = ("LlamaForCausalLMEagle", "Qwen2ForCausalLMEagle")
"""SGLang's classes that have the layout."""

_CHAIN = "_tlt_draft_chain"  # attribute of an EagleDraftWorker: a DraftChain, or None where its model has none


def draft_forward(original: Callable[..., Any], worker: Any, forward_batch: Any) -> Any:
    """Stands around SGLang's `EagleDraftWorker.draft_forward` and takes the chains that `DraftChain` can draft."""
    chain = _chain_of(worker)
    batch = len(forward_batch.seq_lens)
    if chain is None or worker.topk != 1 or batch == 0 or batch > len(worker._topk1_parents_prealloc):
        return original(worker, forward_batch)
    info = forward_batch.spec_info
    table = worker.req_to_token_pool.req_to_token[forward_batch.req_pool_indices.long()]
    steps = worker.speculative_num_steps
    tokens = chain.draft(
        info.topk_index[:, 0], info.hidden_states, forward_batch.positions, table, forward_batch.seq_lens.long(), steps
    )
    return worker._topk1_parents_prealloc[:batch], worker._topk1_score_indices_prealloc[:batch], tokens, None


def _chain_of(worker: Any) -> DraftChain | None:
    """The worker's chain, made when it is first asked for."""
    if not hasattr(worker, _CHAIN):
        reason = why_not(worker)
        if reason is not None:
            logger.info("tlt: drafts go through SGLang's forward passes: %s", reason)
        setattr(worker, _CHAIN, None if reason is not None else DraftChain(worker))
    chain: DraftChain | None = getattr(worker, _CHAIN)
    return chain


def why_not(worker: Any) -> str | None:
    """Why a draft worker's chains cannot be drafted here; None where they can."""
    runner = worker.draft_runner
    model = runner.model
    if not is_tlt(worker.server_args):
        return "stock algorithms draft as they do without this plugin"
    if runner.device != "cpu" or has_native_kernels():
        return "the device has kernels of its own"
    if not isinstance(worker.draft_attn_backend, CpuMultiStepDraftBackend):
        return f"the attention backend is a {type(worker.draft_attn_backend).__name__}"
    if runner.ps.tp_size != 1:
        return f"tensor parallelism of {runner.ps.tp_size}"
    if get_spec().speculative_use_rejection_sampling:
        return "rejection sampling"
    if type(model).__name__ not in ARCHITECTURES or len(model.model.layers) != 1:
        return f"a {type(model).__name__} of {len(model.model.layers)} layers"
    layer = model.model.layers[0]
    rope = layer.self_attn.rotary_emb
    if type(rope).forward_native is not RotaryEmbedding.forward_native or not rope.is_neox_style:
        return f"a {type(rope).__name__}"
    if rope.rotary_dim != layer.self_attn.head_dim or type(layer.post_attention_layernorm) is not RMSNorm:
        return "a partial RoPE, or a norm that is not RMSNorm"
    linears = [module for module in model.modules() if isinstance(module, LinearBase)]
    if any(not isinstance(module.quant_method, UnquantizedLinearMethod) for module in linears):
        return "quantised weights"
    return None


@dataclass(frozen=True)
class Weights:
    """What the layer computes with at the moment: a publication may replace any of these.

    Args:
        embed: [V of the target, H]; head: [V, H]; hot: int64 [V], the target's token of each row of the head, or None.
        fc, qkv, out, gate_up, down: weights, and biases or None.
        norm: [H], and its epsilon.
        waves: [positions, D], cosines and then sines.
    """

    embed: torch.Tensor
    fc: tuple[torch.Tensor, torch.Tensor | None]
    qkv: tuple[torch.Tensor, torch.Tensor | None]
    out: tuple[torch.Tensor, torch.Tensor | None]
    norm: tuple[torch.Tensor, float]
    gate_up: torch.Tensor
    down: torch.Tensor
    head: torch.Tensor
    hot: torch.Tensor | None
    waves: torch.Tensor


class DraftChain:
    """The chains of one draft worker.

    Args:
        worker: an `EagleDraftWorker` that `why_not` has nothing against.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        attention = worker.draft_runner.model.model.layers[0].self_attn
        self._sizes = attention.num_heads, attention.num_kv_heads, attention.head_dim
        self._scale, self._layer_id = attention.scaling, attention.attn.layer_id

    def draft(
        self,
        first: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        steps: int,
    ) -> torch.Tensor:
        """The drafts of every request, the likeliest token at each step.

        Args:
            first: int64 [B], the first drafts, as rows of the draft head.
            hidden: [B, H], the drafter's feature behind each.
            positions: int64 [B], of the first drafts' keys.
            table: int [B, >= max(lengths)], pool slots of each request in order.
            lengths: int64 [B], tokens of the drafter's cache.
            steps: S.

        Returns:
            int64 [B, S], in the target's vocabulary.
        """
        pool = self._worker.draft_runner.token_to_kv_pool
        slots, mask = padded_prefix(table, lengths, steps - 1)
        keys, values = (
            gather(buffer, slots).to(hidden.dtype)  # [B, L + S - 1, K, D]
            for buffer in (pool.get_key_buffer(self._layer_id), pool.get_value_buffer(self._layer_id))
        )
        return run_chain(self._weights(), self._sizes, self._scale, first, hidden, positions, keys, values, mask, steps)

    def _weights(self) -> Weights:
        model = self._worker.draft_runner.model
        layer = model.model.layers[0]
        attention, mlp, norm, head = layer.self_attn, layer.mlp, layer.post_attention_layernorm, model.lm_head.weight
        return Weights(
            embed=model.model.embed_tokens.weight,
            fc=(model.model.fc.weight, model.model.fc.bias),
            qkv=(attention.qkv_proj.weight, attention.qkv_proj.bias),
            out=(attention.o_proj.weight, attention.o_proj.bias),
            norm=(norm.weight, norm.variance_epsilon),
            gate_up=mlp.gate_up_proj.weight,
            down=mlp.down_proj.weight,
            head=head[: model.config.vocab_size],  # rows behind it are padding
            hot=self._worker.hot_token_id,
            waves=attention.rotary_emb.cos_sin_cache,
        )


def padded_prefix(table: torch.Tensor, lengths: torch.Tensor, more: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Slots of every request's prefix, ending in the same column, and room behind it.

    Args:
        table: int [B, >= L] slots in order; lengths: int64 [B], L the largest; more: columns behind the prefix.

    Returns:
        int64 [B, L + more] slots (0 where there is none), and bool [B, 1, 1, L + more], False in front of a prefix;
        None where all are as long.
    """
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        return F.pad(table[:, :longest].long(), (0, more)), None
    place = torch.arange(longest) - (longest - lengths)[:, None]  # [B, L]
    real = place >= 0
    slots = torch.where(real, table.gather(1, place.clamp(min=0)), 0).long()
    return F.pad(slots, (0, more)), F.pad(real, (0, more), value=True)[:, None, None, :]


def run_chain(
    w: Weights,
    sizes: tuple[int, int, int],
    scale: float,
    first: torch.Tensor,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    steps: int,
) -> torch.Tensor:
    """The loop of `DraftChain.draft`.

    Args:
        sizes: Q, K, D.
        keys, values: [B, L + S - 1, K, D], the prefix and room for this chain's own, which are written here.
        mask: bool [B, 1, 1, L + S - 1] or None, as `padded_prefix` returns it.

    Returns:
        int64 [B, S].
    """
    (Q, K, D), B = sizes, len(first)
    token = first if w.hot is None else w.hot[first]
    tokens = [token]
    prefix = keys.shape[1] - (steps - 1)
    cos, sin = _waves(w.waves, positions, steps - 1, hidden.dtype)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, K, L + S - 1, D]
    for step in range(steps - 1):
        end = prefix + step + 1
        x = F.linear(torch.cat((F.embedding(token, w.embed), hidden), dim=-1), *w.fc)
        qkv = F.linear(x, *w.qkv).view(B, Q + 2 * K, D)
        turned = _turn(qkv[:, : Q + K], cos[:, step], sin[:, step])
        keys[:, :, end - 1], values[:, :, end - 1] = turned[:, Q:], qkv[:, Q + K :]
        attended = F.scaled_dot_product_attention(
            turned[:, :Q].view(B, K, Q // K, D),  # query heads that share keys are queries of one head
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=None if mask is None else mask[..., :end],
            scale=scale,
        )
        y = x + F.linear(attended.reshape(B, Q * D), *w.out)
        gate, up = F.linear(F.rms_norm(y, y.shape[-1:], *w.norm), w.gate_up).chunk(2, dim=-1)
        hidden = y + F.linear(F.silu(gate) * up, w.down)
        token = F.linear(hidden, w.head).argmax(dim=-1)
        token = token if w.hot is None else w.hot[token]
        tokens.append(token)
    return torch.stack(tokens, dim=1)


def _waves(
    waves: torch.Tensor, positions: torch.Tensor, count: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, count, 1, D] of the positions from `positions` on; the sines of a first half negative."""
    rows = waves[positions.long()[:, None] + torch.arange(count)].to(dtype)[:, :, None]
    cos, sin = rows.chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, heads, D] with RoPE applied, half of a head against the other half; cos, sin [B, 1, D]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)

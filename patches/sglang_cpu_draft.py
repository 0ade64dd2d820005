"""SGLang's loop over draft steps, for chains on a CPU.

There the loop's forward passes are mostly interpreter: `draft_forward` is the one place that all drafts of a chain go
through, and there is no hook inside it. What replaces it reads the draft model's layer by its parts' names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlt_verl.patches import hooks
from tlt_verl.patches.seam import Seam, Target

_DRAFT = "sglang.srt.speculative.eagle_worker_v2:EagleDraftWorker.draft_forward"


def _install(draft_forward: Callable[..., Any]) -> None:
    """Put `draft_forward(original, worker, forward_batch)` around the stock method."""
    hooks.around(SEAM.name, _DRAFT, draft_forward)


SEAM = Seam(
    name="sglang.cpu_draft",
    package="sglang",
    versions=">=0.5.17,<0.5.18",
    targets=(
        Target(
            path=_DRAFT,
            parameters=("forward_batch",),
            source_contains=(
                "topk_index = self.hot_token_id[topk_index]",
                "forward_batch.positions.add_(1)",
                "self._topk1_score_indices_prealloc[:bs]",
                "return parent_list, top_scores_index, draft_tokens, draft_probs",
            ),
        ),
        Target(
            path="sglang.srt.speculative.eagle_worker_v2:EagleDraftWorker.draft",
            source_contains=("self.draft_forward(forward_batch)",),
        ),
        Target(
            path="sglang.srt.models.llama_eagle:LlamaModel.forward",
            source_contains=(
                "torch.cat((hidden_states, forward_batch.spec_info.hidden_states), dim=-1)",
                "return hidden_states + residual",
            ),
        ),
        Target(
            path="sglang.srt.models.llama_eagle:LlamaDecoderLayer.__init__",
            source_contains=("del self.input_layernorm",),
        ),
        Target(
            path="sglang.srt.models.qwen2_eagle:Qwen2Model.forward",
            source_contains=("return hidden_states + residual",),
        ),
        Target(
            path="sglang.srt.models.llama:LlamaAttention.forward_prepare_native",
            source_contains=("split([self.q_size, self.kv_size, self.kv_size], dim=-1)",),
        ),
        Target(path="sglang.srt.models.llama:LlamaMLP.forward", source_contains=("self.gate_up_proj(x)",)),
        Target(
            path="sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_native",
            source_contains=("self.cos_sin_cache.index_select(0, positions)", "cos, sin = cos_sin.chunk(2, dim=-1)"),
        ),
        Target(path="sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod"),
        Target(path="sglang.srt.layers.linear:LinearBase"),
        Target(path="sglang.srt.layers.layernorm:RMSNorm"),
    ),
    why="Drafts of a chain in one loop on a CPU, where SGLang's forward pass a step is mostly interpreter.",
    install=_install,
    cpu_only=True,
)

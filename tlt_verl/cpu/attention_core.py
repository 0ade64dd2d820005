"""Core attention of Megatron's local layer spec, on torch's scaled_dot_product_attention.

Megatron's own `DotProductAttention` refuses packed sequences and materialises (B, H, S, S) scores in the parameter's
dtype. This one takes what verl sends: padded batches with a (B, S) keep-mask and packed sequences with their
boundaries. Causal self-attention only. It knows nothing of verl; its shapes are Megatron's:

S tokens of a padded sample · T tokens of a packed batch · B samples · H query heads · G key/value heads · D head width
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class SdpaCoreAttention(DotProductAttention):
    """Causal attention, exact for padded and for packed batches.

    Raises:
        NotImplementedError: the configuration asks for something that is not causal softmax attention.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if self.config.softmax_type != "vanilla" or self.config.window_size is not None:
            raise NotImplementedError(
                f"attention on the CPU device: softmax_type={self.config.softmax_type!r}, "
                f"window_size={self.config.window_size!r}; it has only the vanilla softmax over the whole sequence"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (S, B, H, D), or (T, H, D) when packed; `key` and `value` likewise with G heads.
            attention_mask: None, or bool (B, S), True where a token is real, or bool (B or 1, 1, S, S), True where a
                pair is forbidden (Megatron's own form, which already contains the causal triangle). Unused when packed.
            packed_seq_params: boundaries of the samples in the packed batch.

        Returns:
            (S, B, H·D), or (T, H·D) when packed.
        """
        if attention_bias is not None:
            raise NotImplementedError("attention on the CPU device takes no attention_bias")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (B, H or G, S, D)
        out = self._sdpa(q, k, v, _forbidden_pairs(attention_mask))
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        """One call a sample, so that no sample sees another. A sample's padding follows it and is not seen either."""
        starts = _boundaries(params)
        if starts[0] != 0 or starts[-1] != query.shape[0]:
            raise ValueError(f"packed batch of {query.shape[0]} tokens, but its samples span {starts[0]}:{starts[-1]}")
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, H or G, T, D)
        outs = [
            self._sdpa(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], None)[0]
            for start, stop in itertools.pairwise(starts)
            if stop > start
        ]
        return torch.cat(outs, dim=1).transpose(0, 1).flatten(1)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, forbidden: Tensor | None) -> Tensor:
        """(B, H, S, D) from q (B, H, S, D) and k, v (B, G, S, D)."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if forbidden is None else ~forbidden,
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            is_causal=forbidden is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _boundaries(params: PackedSeqParams) -> list[int]:
    """Where each packed sample starts, and the end of the last: samples and their own padding."""
    padded = params.cu_seqlens_q_padded
    return (params.cu_seqlens_q if padded is None else padded).tolist()


def _forbidden_pairs(attention_mask: Tensor | None) -> Tensor | None:
    """None when the causal triangle is all that is needed, else (B or 1, 1, S, S), True where a pair is forbidden."""
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        return attention_mask
    if attention_mask.dim() != 2:
        raise ValueError(f"attention mask of shape {tuple(attention_mask.shape)}: (B, S) or (B, 1, S, S) is understood")
    if (attention_mask[:, 1:] & ~attention_mask[:, :-1]).any():
        raise ValueError("attention mask keeps a token after padding: the CPU device takes right-padded batches only")
    return None  # right padding comes after every real token, where a causal query never looks

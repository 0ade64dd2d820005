"""Fingerprints: what they tell apart, and how an SGLang model's fused tensors become a checkpoint's again.

A fingerprint that forgets a dtype, or a split at the wrong row, would call a wrong weight sync right, or a right one
wrong.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tlt_verl.engine.fingerprint import fingerprints_of, unfused
from tlt_verl.fingerprint import differences, fingerprint, fingerprints

H, HEADS, KV_HEADS, V, I = 12, 4, 2, 10, 7  # noqa: E741


# --- one tensor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_equal_tensors_have_equal_fingerprints_whatever_their_layout(dtype):
    tensor = (torch.arange(12).reshape(3, 4) % 5).to(dtype)
    view = torch.cat([tensor, tensor])[3:]  # a part of a larger storage
    strided = tensor.t().contiguous().t()  # the same values, column by column
    assert fingerprint(tensor) == fingerprint(view) == fingerprint(strided) == fingerprint(nn.Parameter(tensor, False))


def test_one_bit_dtype_and_shape_all_count():
    zeros = torch.zeros(4, 2)
    one_ulp = zeros.clone()
    one_ulp[3, 1] = torch.finfo(torch.float32).smallest_normal
    others = [one_ulp, -zeros, zeros.to(torch.int32), zeros.t(), zeros.flatten(), zeros[:3]]
    assert len({fingerprint(tensor) for tensor in [zeros, *others]}) == 1 + len(others)


def test_empty_and_scalar_tensors_have_one_too():
    assert fingerprint(torch.zeros(0)) != fingerprint(torch.zeros(0, 3)) != fingerprint(torch.tensor(0.0))


def test_differences_are_those_that_differ_and_those_that_one_side_lacks():
    left = fingerprints([("same", torch.ones(2)), ("changed", torch.ones(2)), ("lost", torch.ones(2))])
    right = fingerprints([("new", torch.ones(2)), ("changed", torch.zeros(2)), ("same", torch.ones(2))])
    assert differences(left, right) == ["changed", "lost", "new"]
    assert differences(left, dict(left)) == []


# --- a model ----------------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """A decoder with SGLang's names and shapes: fused projections, a vocabulary padded to a multiple."""

    def __init__(self, head_dim: int | None = None, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        D = head_dim or H // HEADS
        self.config = SimpleNamespace(
            hidden_size=H, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=V, head_dim=head_dim
        )
        attention, mlp = nn.Module(), nn.Module()
        attention.qkv_proj = nn.Linear(H, (HEADS + 2 * KV_HEADS) * D, bias=bias)
        attention.o_proj = nn.Linear(HEADS * D, H, bias=False)
        mlp.gate_up_proj = nn.Linear(H, 2 * I, bias=False)
        layer = nn.Module()
        layer.self_attn, layer.mlp, layer.input_layernorm = attention, mlp, nn.LayerNorm(H, bias=False)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V + 6, H)
        self.model.layers = nn.ModuleList([layer])
        self.lm_head = self.model.embed_tokens if tied else nn.Linear(H, V + 6, bias=False)


LAYER = "model.layers.0"


def test_fused_projections_are_split_where_a_checkpoint_splits_them():
    model = Fused()
    D = H // HEADS
    tensors = dict(unfused(model))
    qkv = model.model.layers[0].self_attn.qkv_proj.weight
    assert torch.equal(tensors[f"{LAYER}.self_attn.q_proj.weight"], qkv[: HEADS * D])
    assert torch.equal(tensors[f"{LAYER}.self_attn.k_proj.weight"], qkv[HEADS * D : (HEADS + KV_HEADS) * D])
    assert torch.equal(tensors[f"{LAYER}.self_attn.v_proj.weight"], qkv[(HEADS + KV_HEADS) * D :])
    gate_up = model.model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(tensors[f"{LAYER}.mlp.gate_proj.weight"], gate_up[:I])
    assert torch.equal(tensors[f"{LAYER}.mlp.up_proj.weight"], gate_up[I:])


def test_the_names_are_a_checkpoints():
    assert set(dict(unfused(Fused(bias=True)))) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        f"{LAYER}.input_layernorm.weight",
        f"{LAYER}.mlp.gate_proj.weight",
        f"{LAYER}.mlp.up_proj.weight",
        f"{LAYER}.self_attn.o_proj.weight",
        *(f"{LAYER}.self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")),
    }


def test_a_head_dimension_of_its_own_is_used():
    """Qwen3: head_dim is not hidden_size / heads."""
    tensors = dict(unfused(Fused(head_dim=5)))
    assert tensors[f"{LAYER}.self_attn.q_proj.weight"].shape == (HEADS * 5, H)
    assert tensors[f"{LAYER}.self_attn.v_proj.weight"].shape == (KV_HEADS * 5, H)


def test_padding_rows_of_the_vocabulary_do_not_count():
    model = Fused()
    before = fingerprints_of(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[V:] += 1
        model.lm_head.weight[V:] += 1
    assert fingerprints_of(model) == before
    with torch.no_grad():
        model.lm_head.weight[V - 1] += 1
    assert differences(before, fingerprints_of(model)) == ["lm_head.weight"]


def test_a_head_that_is_the_embedding_is_left_out():
    """As in the checkpoint of a tied model, and in a policy's export."""
    assert "lm_head.weight" not in dict(unfused(Fused(tied=True)))


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_changed_projection_is_found_under_its_own_name(part):
    model = Fused()
    before = fingerprints_of(model)
    dict(unfused(model))[f"{LAYER}.self_attn.{part}_proj.weight"][0, 0] += 1  # a view: this writes into the model
    assert differences(before, fingerprints_of(model)) == [f"{LAYER}.self_attn.{part}_proj.weight"]


def test_a_policys_head_is_left_out_only_where_it_is_its_embedding():
    from tlt_verl.rollout.adapter import without_tied_head

    tied = {"model.embed_tokens.weight": "a", "lm_head.weight": "a", "model.norm.weight": "a"}
    assert without_tied_head(tied) == {"model.embed_tokens.weight": "a", "model.norm.weight": "a"}
    for own in (tied | {"lm_head.weight": "b"}, {"lm_head.weight": "a", "model.norm.weight": "a"}):
        assert without_tied_head(own) == own

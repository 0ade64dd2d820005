"""The drafter as a torch module: its tensors are the file's, and it computes what the layout says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_targets import FAMILIES, SIZES, ReferenceDrafter, config_of, make_target, save_target
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tlt_verl.drafter import DrafterError, make_drafter
from tlt_verl.drafter.eagle import tensor_shapes
from tlt_verl.drafter.model import EagleDrafter

KINDS = [(family, {}) for family in FAMILIES] + [
    ("llama", {"attention_bias": True}),
    ("qwen3", {"attention_bias": True}),
]
CONFIG = SIZES | {"architectures": ["LlamaForCausalLMEagle"], "model_type": "llama", "num_hidden_layers": 1}
CONFIG |= {"rms_norm_eps": 1e-5, "head_dim": 8}
SCALED = {
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def drafter_folder(tmp_path: Path, family: str, **options) -> Path:
    """A drafter whose every tensor matters: made from a target, then moved away from that start."""
    target = save_target(make_target(family, **options), tmp_path / "target")
    folder = make_drafter(target, tmp_path / "drafter")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    moved = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(moved, folder / "model.safetensors")
    return folder


def inputs(T: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, 32, generator=generator), torch.randn(T, 32, generator=generator)


@pytest.mark.parametrize(("family", "options"), KINDS, ids=str)
def test_it_is_the_reference(tmp_path, family, options):
    folder = drafter_folder(tmp_path, family, **options)
    embeddings, features = inputs(21)
    found = EagleDrafter.from_folder(folder)(embeddings, features, [21])
    torch.testing.assert_close(found, ReferenceDrafter(folder)(embeddings[None], features[None])[0])


@pytest.mark.parametrize(("family", "options"), KINDS, ids=str)
def test_its_tensors_have_the_names_and_shapes_of_the_file(tmp_path, family, options):
    folder = drafter_folder(tmp_path, family, **options)
    state = EagleDrafter(config_of(folder)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == tensor_shapes(config_of(folder))


def test_a_folder_is_read_whole_and_in_float32(tmp_path):
    target = save_target(make_target("qwen2", dtype=torch.bfloat16), tmp_path / "target")
    folder = make_drafter(target, tmp_path / "drafter")
    written = load_file(folder / "model.safetensors")
    save_file(written | {"lm_head.weight": torch.zeros(96, 32)}, folder / "model.safetensors")
    drafter = EagleDrafter.from_folder(folder)
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.float32}
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, written[name].float()), name


def test_each_sequence_begins_at_position_0(tmp_path):
    drafter = EagleDrafter.from_folder(drafter_folder(tmp_path, "llama"))
    embeddings, features = inputs(30)
    together = drafter(embeddings, features, [7, 0, 1, 22])
    alone = [drafter(embeddings[a:b], features[a:b], [b - a]) for a, b in ((0, 7), (7, 8), (8, 30))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_its_parts_are_the_whole(tmp_path):
    drafter = EagleDrafter.from_folder(drafter_folder(tmp_path, "qwen3"))
    embeddings, features = inputs(9)
    x = drafter.merge(embeddings, features)
    q, k, v = drafter.qkv(x, torch.arange(9))
    assert (q.shape, k.shape, v.shape) == ((9, 4, 16), (9, 2, 16), (9, 2, 16))
    later = torch.ones(9, 9).triu(1).bool()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)).div(4).masked_fill(later, float("-inf"))
    attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, 1)).flatten(1)
    torch.testing.assert_close(drafter.finish(x, attended), drafter(embeddings, features, [9]))


def test_autocast_computes_in_bfloat16_next_to_float32(tmp_path):
    drafter = EagleDrafter.from_folder(drafter_folder(tmp_path, "llama"))
    embeddings, features = inputs(40)
    exact = drafter(embeddings, features, [15, 25])
    with torch.autocast("cpu", torch.bfloat16):
        found = drafter(embeddings, features.bfloat16(), [15, 25])
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 0.02 * exact.norm()


def test_lengths_that_do_not_add_up_are_an_error():
    with pytest.raises(ValueError, match=r"lengths: got \[3, 4\].* add up to the 8 rows"):
        EagleDrafter(CONFIG)(*inputs(8), [3, 4])


# --- RoPE -----------------------------------------------------------------------------------------------------------


def rotated_by_transformers(rope: dict, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor):
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1, "rope_parameters": rope})
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    return (
        t[0].transpose(0, 1) for t in apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    )


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rope_is_transformers_own(kind):
    drafter = EagleDrafter(CONFIG | {"rope_parameters": SCALED[kind]})
    plain = EagleDrafter(CONFIG)
    plain.load_state_dict(drafter.state_dict())
    x, positions = inputs(50)[0], torch.arange(100, 400, 6)
    q0, k0, v0 = drafter.qkv(x, torch.zeros(50, dtype=torch.int64))  # not rotated, but scaled
    q, k, v = drafter.qkv(x, positions)
    wanted_q, wanted_k = rotated_by_transformers(
        SCALED[kind], positions, q0 / drafter.rope_scale, k0 / drafter.rope_scale
    )
    torch.testing.assert_close(q, wanted_q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(k, wanted_k, rtol=1e-4, atol=1e-5)
    assert torch.equal(v, v0)
    assert (plain.qkv(x, positions)[0] - q).abs().max() > 0.1
    assert (drafter.rope_scale != 1.0) == (kind == "yarn")


@pytest.mark.parametrize("scaling", [None, SCALED["linear"], {"type": "linear", "factor": 4.0}], ids=str)
def test_the_rope_of_an_older_config_is_the_same(scaling):
    old = {key: value for key, value in CONFIG.items() if key != "rope_parameters"}
    old |= {"rope_theta": 5000.0, "rope_scaling": scaling}
    new = CONFIG | {"rope_parameters": SCALED["linear"] if scaling else SIZES["rope_parameters"]}
    assert torch.equal(EagleDrafter(old).rope_frequencies, EagleDrafter(new).rope_frequencies)


# --- what is no such drafter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "architectures: got LlamaForCausalLMEagle3, takes one of"),
        ({"architectures": []}, "architectures: got None"),
        ({"num_hidden_layers": 2}, "num_hidden_layers: got 2, takes 1"),
        ({"hidden_act": "gelu"}, "hidden_act: got gelu, takes silu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}},
            "rope_type: got dynamic, takes one of default, linear, llama3, yarn",
        ),
    ],
)
def test_a_config_of_something_else_is_refused(changes, message):
    with pytest.raises(DrafterError, match=message):
        EagleDrafter(CONFIG | changes)


@pytest.mark.parametrize("damage", ["missing", "shape", "no file", "truncated"])
def test_a_folder_that_is_not_whole_is_refused(tmp_path, damage):
    folder = drafter_folder(tmp_path, "llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors["fc.bias"]
    elif damage == "shape":
        tensors["fc.weight"] = tensors["fc.weight"][:, :32].contiguous()
    save_file(tensors, path)
    if damage == "no file":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    message = {"missing": "lack fc.bias", "shape": r"fc.weight is \(32, 32\)", "no file": "no .*safetensors"}
    with pytest.raises(DrafterError, match="^a.b: got .*" + message.get(damage, "cannot be")):
        EagleDrafter.from_folder(folder, option="a.b")

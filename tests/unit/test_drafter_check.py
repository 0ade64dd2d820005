"""What is said of a drafter, or of a target, that cannot be used."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_targets import FAMILIES, config_of, make_target, save_target

from tlt_verl.drafter import DrafterError, check_drafter, check_target, make_drafter
from tlt_verl.drafter.eagle import FAMILIES as SUPPORTED
from tlt_verl.drafter.eagle import tensor_shapes
from tlt_verl.drafter.tensors import TensorFolder


@pytest.fixture
def target(tmp_path) -> dict:
    return config_of(save_target(make_target("llama"), tmp_path / "target"))


@pytest.fixture
def drafter(tmp_path, target) -> Path:
    return make_drafter(tmp_path / "target", tmp_path / "drafter")


def edit_config(drafter: Path, **changes: object) -> None:
    config = config_of(drafter) | changes
    (drafter / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(drafter: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(drafter / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, drafter / "model.safetensors")


def message(drafter: Path, target: dict) -> str:
    with pytest.raises(DrafterError) as error:
        check_drafter(drafter, target)
    text = str(error.value)
    assert text.startswith("drafter.path: got ") and str(drafter) in text
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_made_for_the_target_passes(tmp_path, family):
    model = make_target(family)
    folder = make_drafter(save_target(model, tmp_path / "target"), tmp_path / "drafter")
    check_drafter(folder, config_of(tmp_path / "target"))
    check_drafter(str(folder), model.config.to_dict())


def test_a_copy_of_the_embedding_and_head_in_the_file_is_fine(drafter, target):
    edit_tensors(drafter, **{"embed_tokens.weight": torch.zeros(96, 32), "lm_head.weight": torch.zeros(96, 32)})
    check_drafter(drafter, target)


def test_nothing_there(tmp_path, target):
    assert "is not a folder" in message(tmp_path / "nowhere", target)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in message(tmp_path / "empty", target)


def test_a_config_that_is_no_config(drafter, target):
    (drafter / "config.json").write_text("{")
    assert "is not JSON" in message(drafter, target)
    (drafter / "config.json").write_text("[]")
    assert "is not an object" in message(drafter, target)


def test_no_weights(drafter, target):
    (drafter / "model.safetensors").unlink()
    assert "no *.safetensors" in message(drafter, target)


def test_torn_weights(drafter, target):
    path = drafter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "cannot be read" in message(drafter, target)


def test_weights_in_shards_are_read(drafter, target):
    tensors = load_file(drafter / "model.safetensors")
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, drafter / f"part-{i}.safetensors")
    index = {"weight_map": {name: f"part-{i}.safetensors" for i, name in enumerate(tensors)}}
    (drafter / "model.safetensors").unlink()
    (drafter / "model.safetensors.index.json").write_text(json.dumps(index))
    check_drafter(drafter, target)
    (drafter / "part-0.safetensors").unlink()
    assert "part-0.safetensors" in message(drafter, target)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLMEagle", None])
def test_another_architecture(drafter, target, architecture):
    edit_config(drafter, architectures=architecture and [architecture])
    text = message(drafter, target)
    assert (architecture or "no architecture") in text
    assert "the EAGLE drafter of a LlamaForCausalLM is a LlamaForCausalLMEagle" in text


def test_eagle3_is_refused_by_name(drafter, target):
    edit_config(drafter, architectures=["LlamaForCausalLMEagle3"])
    assert "EAGLE-3 is not available in this version" in message(drafter, target)


@pytest.mark.parametrize(("key", "other"), [("hidden_size", 64), ("vocab_size", 128)])
def test_another_size(drafter, target, key, other):
    edit_config(drafter, **{key: other})
    assert f"whose {key} is {other}; the target's is {target[key]}" in message(drafter, target)


def test_a_config_without_its_sizes(drafter, target):
    edit_config(drafter, hidden_size=None, vocab_size="many")
    assert "no hidden_size, vocab_size" in message(drafter, target)


def test_tied_embeddings(drafter, target):
    edit_config(drafter, tie_word_embeddings=True)
    assert '"tie_word_embeddings": false' in message(drafter, target)


def test_a_missing_tensor(drafter, target):
    edit_tensors(drafter, **{"fc.bias": None, "layers.0.mlp.up_proj.weight": None})
    assert "lack fc.bias, layers.0.mlp.up_proj.weight." in message(drafter, target)


def test_many_missing_tensors_are_counted(drafter, target):
    tensors = load_file(drafter / "model.safetensors")
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, drafter / "model.safetensors")
    assert "and 6 more" in message(drafter, target)


def test_a_config_that_asks_for_biases_which_are_not_there(drafter, target):
    edit_config(drafter, bias=True)  # SGLang reads `bias` as well, and would serve uninitialised memory
    assert "lack layers.0.self_attn.q_proj.bias" in message(drafter, target)


def test_a_tensor_that_sglang_would_drop(drafter, target):
    edit_tensors(drafter, **{"layers.0.input_layernorm.weight": torch.ones(32)})
    text = message(drafter, target)
    assert "layers.0.input_layernorm.weight" in text and "would drop" in text


def test_a_tensor_of_another_shape(drafter, target):
    edit_tensors(drafter, **{"fc.weight": torch.zeros(32, 96)})
    assert "fc.weight has the shape (32, 96); its config.json asks for (32, 64)" in message(drafter, target)


def test_layers_behind_the_first_have_a_norm_before_their_attention(drafter):
    shapes = tensor_shapes(config_of(drafter) | {"num_hidden_layers": 2})
    assert "layers.1.input_layernorm.weight" in shapes and "layers.0.input_layernorm.weight" not in shapes


def test_no_tensor_is_loaded(drafter, target, monkeypatch):
    monkeypatch.setattr(TensorFolder, "load", lambda self, name: pytest.fail(f"loaded {name}"))
    started = time.perf_counter()
    check_drafter(drafter, target)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "architecture", ["Qwen3MoeForCausalLM", "GPT2LMHeadModel", "Qwen2_5_VLForConditionalGeneration"]
)
def test_a_target_without_a_drafter_is_refused_by_name(drafter, architecture):
    with pytest.raises(DrafterError, match=r"^actor_rollout_ref\.model\.path: got a ") as error:
        check_target({"architectures": [architecture]})
    assert architecture in str(error.value)
    assert all(name in str(error.value) for name in SUPPORTED)
    with pytest.raises(DrafterError, match=architecture):
        check_drafter(drafter, {"architectures": [architecture]})


def test_a_target_that_names_no_architecture_and_a_quantised_one():
    with pytest.raises(DrafterError, match="model of type 'gpt2'"):
        check_target({"model_type": "gpt2"})
    with pytest.raises(DrafterError, match="m: got quantised weights"):
        check_target({"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}, option="m")

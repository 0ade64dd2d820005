"""A drafter made from a target: its files, its start, and when it is made again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_targets import DRAFTER_OF, FAMILIES, ReferenceDrafter, config_of, make_target, save_target
from transformers import AutoConfig

from tlt_verl.drafter import DrafterError, check_drafter, from_target, make_drafter, prepare_drafter
from tlt_verl.drafter.eagle import tensor_shapes
from tlt_verl.drafter.tensors import TensorFolder


def made(tmp_path: Path, model, name: str = "drafter", **kwargs) -> Path:
    target = save_target(model, tmp_path / f"{name}-target")
    return make_drafter(target, tmp_path / name, **kwargs)


def features_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model(ids).last_hidden_state  # (B, T, H), behind the final norm


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_the_layout(tmp_path, family, tied, sharded):
    model = make_target(family, tie_word_embeddings=tied)
    target = save_target(model, tmp_path / "target", sharded)
    assert (target / "model.safetensors.index.json").exists() == sharded
    drafter = make_drafter(target, tmp_path / "a" / "drafter")

    assert sorted(path.name for path in drafter.iterdir()) == ["config.json", "model.safetensors"]
    config = config_of(drafter)
    assert config["architectures"] == [DRAFTER_OF[family]]
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(drafter / "model.safetensors").items()}
    assert shapes == tensor_shapes(config)
    assert not any(name.startswith(("embed_tokens", "lm_head")) for name in shapes)
    check_drafter(drafter, config_of(target))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_keeps_what_the_target_says(tmp_path, family):
    model = make_target(family, dtype=torch.bfloat16, tie_word_embeddings=True, rms_norm_eps=3e-5)
    config = AutoConfig.from_pretrained(made(tmp_path, model))
    assert config.model_type == {"llama": "llama", "qwen2": "qwen2", "qwen3": "llama"}[family]
    assert config.num_hidden_layers == 1
    assert config.tie_word_embeddings is False
    assert config.dtype == torch.bfloat16
    assert config.head_dim == (16 if family == "qwen3" else 8)
    same = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    same += ("rms_norm_eps", "max_position_embeddings", "rope_parameters", "hidden_act")
    for key in same:
        assert getattr(config, key) == getattr(model.config, key), key


def test_no_sliding_window_is_left(tmp_path):
    model = make_target("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1)
    config = config_of(made(tmp_path, model))
    assert not [key for key in config if "window" in key or key == "layer_types"]


def test_the_rope_of_an_older_config_is_kept(tmp_path):
    target = save_target(make_target("qwen3"), tmp_path / "target")
    old = config_of(target) | {"rope_theta": 5000.0, "rope_scaling": None, "torch_dtype": "float32"}
    del old["rope_parameters"], old["dtype"]
    (target / "config.json").write_text(from_target.json.dumps(old))
    config = AutoConfig.from_pretrained(make_drafter(target, tmp_path / "drafter"))
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert config.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tensors_have_the_targets_dtype(tmp_path, dtype):
    tensors = load_file(made(tmp_path, make_target("llama", dtype=dtype)) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_only_the_last_layer_and_the_final_norm_are_read(tmp_path, monkeypatch):
    target = save_target(make_target("qwen3"), tmp_path / "target", sharded=True)
    read = []
    load = TensorFolder.load
    monkeypatch.setattr(TensorFolder, "load", lambda self, name: read.append(name) or load(self, name))
    make_drafter(target, tmp_path / "drafter")
    assert len(read) == 12
    assert all(name.startswith("model.layers.2.") or name == "model.norm.weight" for name in read)


# --- the start ------------------------------------------------------------------------------------------------------


def scale_of(model, drafter: ReferenceDrafter, writer: str) -> float:
    """r: what the layer's writers were divided by, beside the final norm."""
    written = model.model.layers[-1].get_submodule(writer).weight * model.model.norm.weight[:, None]
    return (written.norm() / drafter.tensors[f"layers.0.{writer}.weight"].norm()).item()


@torch.no_grad()
def last_layer(model, stream: torch.Tensor) -> torch.Tensor:
    """The target's last layer on a residual stream (1, T, H), causal."""
    T = stream.shape[1]
    positions = torch.arange(T)[None]
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    rope = model.model.rotary_emb(stream, positions)
    return model.model.layers[-1](stream, attention_mask=mask, position_ids=positions, position_embeddings=rope)


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("llama", {"attention_bias": True}), ("qwen2", {})], ids=str
)
@pytest.mark.parametrize("exact_in", ["a constant final norm", "attention alone", "mlp alone"])
def test_the_fold_is_the_last_layer_in_the_basis_of_the_features(tmp_path, family, options, exact_in):
    model = make_target(family, rms_norm_eps=1e-9, **options)
    attention_writes, mlp_writes = "self_attn.o_proj", "mlp.down_proj"
    direction = F.rms_norm(torch.randn(1, 12, 32), (32,))
    with torch.no_grad():
        if exact_in == "a constant final norm":
            model.model.norm.weight.fill_(1.7)
        else:  # each branch alone is exact for any final norm; the MLP where the feature's rms is the norm's
            dead = mlp_writes if exact_in == "attention alone" else attention_writes
            for parameter in model.model.layers[-1].get_submodule(dead).parameters():
                parameter.zero_()
            direction = direction if exact_in == "attention alone" else direction.sign()
    drafter = ReferenceDrafter(made(tmp_path, model))
    w = model.model.norm.weight.detach()
    r = scale_of(model, drafter, mlp_writes if exact_in == "mlp alone" else attention_writes)

    found = drafter(torch.randn(1, 12, 32), direction * w)
    torch.testing.assert_close(found, last_layer(model, direction * r) * w / r, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_branches_add_half_of_the_feature_whatever_the_residual_stream_was(tmp_path, family):
    model = make_target(family)
    small = ReferenceDrafter(made(tmp_path, model, "small"))
    with torch.no_grad():
        model.model.layers[-1].self_attn.o_proj.weight.mul_(300)
        model.model.layers[-1].mlp.down_proj.weight.mul_(300)
    large = ReferenceDrafter(made(tmp_path, model, "large"))
    for name, tensor in small.tensors.items():
        torch.testing.assert_close(tensor, large.tensors[name], msg=name)

    features = torch.randn(64, 1, 32) * model.model.norm.weight.detach()
    added = small(torch.zeros_like(features), features) - features
    assert 0.25 < rms(added) / rms(features) < 1.0


def test_a_layer_that_was_copied_as_it_is_would_drown_the_feature(tmp_path):
    model = make_target("llama")
    with torch.no_grad():
        model.model.layers[-1].self_attn.o_proj.weight.mul_(30)
        model.model.layers[-1].mlp.down_proj.weight.mul_(30)
    drafter = ReferenceDrafter(made(tmp_path, model))
    features = features_of(model, torch.randint(0, 96, (2, 16)))
    nothing = torch.zeros_like(features)
    assert rms(drafter(nothing, features)) < 2 * rms(features)
    for name, parameter in model.model.layers[-1].named_parameters():
        drafter.tensors[f"layers.0.{name}"] = parameter.detach()
    assert rms(drafter(nothing, features)) > 10 * rms(features)


def test_the_norms_of_qwen3_become_constants_of_the_same_size(tmp_path):
    model = make_target("qwen3")
    with torch.no_grad():  # so that only the norms can bring them to their size
        model.model.layers[-1].self_attn.q_proj.weight.mul_(10)
        model.model.layers[-1].self_attn.k_proj.weight.mul_(0.1)
    drafter = ReferenceDrafter(made(tmp_path, model))
    features = torch.randn(512, 32) * model.model.norm.weight.detach()
    for name in ("q", "k"):
        heads = F.linear(features, drafter.tensors[f"layers.0.self_attn.{name}_proj.weight"]).unflatten(-1, (-1, 16))
        norm = getattr(model.model.layers[-1].self_attn, f"{name}_norm").weight.detach()
        wanted = (F.rms_norm(heads, (16,)) * norm).square().mean(dim=(0, 2)).sqrt()  # (heads,)
        torch.testing.assert_close(heads.square().mean(dim=(0, 2)).sqrt(), wanted, rtol=0.25, atol=0)


def test_a_final_norm_with_a_dead_channel_gives_finite_tensors(tmp_path):
    model = make_target("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = 0.0
    assert all(t.isfinite().all() for t in ReferenceDrafter(made(tmp_path, model)).tensors.values())


def test_a_last_layer_that_writes_nothing_gives_the_feature_back(tmp_path):
    model = make_target("qwen3")
    with torch.no_grad():
        model.model.layers[-1].self_attn.o_proj.weight.zero_()
        model.model.layers[-1].mlp.down_proj.weight.zero_()
    features = torch.randn(1, 5, 32)
    torch.testing.assert_close(ReferenceDrafter(made(tmp_path, model))(torch.randn(1, 5, 32), features), features)


@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_on_its_own_output_stays_bounded(tmp_path, family):
    model = make_target(family)
    drafter = ReferenceDrafter(made(tmp_path, model))
    ids = torch.randint(0, 96, (2, 12))
    features = features_of(model, ids)[:, :-1]
    scale = rms(features)
    for _ in range(6):
        out = drafter(F.embedding(ids[:, 1:], model.model.embed_tokens.weight), features)
        logits = model.lm_head(out[:, -1])
        assert logits.shape == (2, 96) and logits.isfinite().all()
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        features = torch.cat([features, out[:, -1:]], dim=1)
    assert rms(features[:, -1]) < 20 * scale


def test_a_few_steps_of_training_teach_it_and_reach_the_half_for_the_embedding(tmp_path):
    model = make_target("llama")
    drafter = ReferenceDrafter(made(tmp_path, model))
    ids = torch.randint(0, 96, (16, 24))
    features, embeddings = features_of(model, ids), F.embedding(ids, model.model.embed_tokens.weight.detach())
    wanted = model.lm_head(features[:, 1:]).argmax(-1).detach()
    parameters = [tensor.requires_grad_() for tensor in drafter.tensors.values()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)

    def agreement_and_loss() -> tuple[float, torch.Tensor]:
        out = drafter(embeddings[:, 1:], features[:, :-1])
        agrees = (model.lm_head(out).argmax(-1) == wanted).float().mean().item()
        return agrees, F.smooth_l1_loss(out, features[:, 1:])

    before = agreement_and_loss()
    for _ in range(200):
        optimizer.zero_grad()
        agreement_and_loss()[1].backward()
        optimizer.step()
    after = agreement_and_loss()
    assert after[1] < 0.5 * before[1]
    assert after[0] > before[0] + 0.2
    assert drafter.tensors["fc.weight"][:, :32].abs().max() > 1e-3


# --- made once ------------------------------------------------------------------------------------------------------


def identity_of(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_ino


def test_the_same_target_is_not_made_twice_and_another_is(tmp_path):
    model = make_target("llama")
    drafter = made(tmp_path, model)
    first = identity_of(drafter)
    assert identity_of(made(tmp_path, model)) == first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)  # no part of the drafter
    assert identity_of(made(tmp_path, model)) == first
    with torch.no_grad():
        model.model.layers[-1].mlp.up_proj.weight[0, 0] += 1
    second = identity_of(made(tmp_path, model))
    assert second != first
    model.config.rms_norm_eps = 1e-4
    third = identity_of(made(tmp_path, model))
    assert third != second
    assert identity_of(made(tmp_path, model, seed=1)) != third
    assert not list(tmp_path.glob(".drafter.*/"))


def test_the_same_seed_gives_the_same_drafter(tmp_path):
    model = make_target("qwen3")
    one, two = (load_file(made(tmp_path, model, name) / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_was_not_made_here_is_not_overwritten(tmp_path):
    out = tmp_path / "drafter"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DrafterError, match="exists and is not a drafter that was made"):
        made(tmp_path, make_target("llama"))
    assert (out / "notes.txt").read_text() == "mine"


def test_a_crash_while_writing_leaves_the_old_drafter(tmp_path, monkeypatch):
    model = make_target("llama")
    drafter = made(tmp_path, model)
    first = identity_of(drafter)

    def torn(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(from_target, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        made(tmp_path, model, seed=1)
    assert identity_of(drafter) == first
    assert not list(tmp_path.glob(".drafter.*/"))


def test_several_makers_at_once_make_one(tmp_path):
    target = save_target(make_target("qwen2"), tmp_path / "target")
    identities: list[int] = []

    def make() -> None:
        identities.append(identity_of(make_drafter(target, tmp_path / "drafter")))

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(identities) == 6 and len(set(identities)) == 1


# --- targets that have no drafter -----------------------------------------------------------------------------------


def refused(target: Path, tmp_path: Path) -> str:
    with pytest.raises(DrafterError) as error:
        make_drafter(target, tmp_path / "drafter")
    assert not (tmp_path / "drafter").exists()
    return str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    text = refused(tmp_path / "nowhere", tmp_path)
    assert text.startswith("actor_rollout_ref.model.path: got") and "nowhere" in text and "not a folder" in text


def test_weights_in_another_format(tmp_path):
    target = save_target(make_target("llama"), tmp_path / "target")
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    text = refused(target, tmp_path)
    assert "no *.safetensors" in text and "save_pretrained" in text


def test_a_missing_shard(tmp_path):
    target = save_target(make_target("llama"), tmp_path / "target", sharded=True)
    next(target.glob("*.safetensors")).unlink()
    assert "is missing" in refused(target, tmp_path)


def test_a_truncated_file(tmp_path):
    target = save_target(make_target("llama"), tmp_path / "target")
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in refused(target, tmp_path)


def test_a_missing_tensor(tmp_path):
    target = save_target(make_target("qwen2"), tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.bias"]
    save_file(tensors, target / "model.safetensors")
    assert "lack model.layers.2.self_attn.q_proj.bias" in refused(target, tmp_path)


def test_a_config_of_other_weights(tmp_path):
    target = save_target(make_target("llama"), tmp_path / "target")
    config = config_of(target) | {"intermediate_size": 64}
    (target / "config.json").write_text(from_target.json.dumps(config))
    text = refused(target, tmp_path)
    assert "(48, 32)" in text and "(64, 32)" in text


# --- what the engine asks for ---------------------------------------------------------------------------------------


def test_prepare_makes_one_in_the_cache_and_finds_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target = save_target(make_target("llama"), tmp_path / "target")
    drafter = prepare_drafter(str(target), None)
    assert drafter.parent == tmp_path / "cache" / "tlt_verl" / "drafters"
    monkeypatch.chdir(tmp_path)
    first = identity_of(drafter)
    assert identity_of(prepare_drafter("target", None)) == first
    with safe_open(drafter / "model.safetensors", "pt") as file:
        assert "tlt_verl.made_from" in file.metadata()


def test_prepare_checks_the_one_that_is_given(tmp_path):
    model = make_target("llama")
    target = save_target(model, tmp_path / "target")
    drafter = made(tmp_path, make_target("llama", vocab_size=128), "other")
    with pytest.raises(DrafterError, match=r"^tlt\.drafter\.path: .*vocab_size is 128; the target's is 96"):
        prepare_drafter(str(target), str(drafter), option="tlt.drafter.path")
    assert prepare_drafter(str(target), str(made(tmp_path, model))) == tmp_path / "drafter"


@pytest.mark.parametrize("name", ["nobody/no-such-model", "/nowhere/at/all"])
def test_prepare_names_a_target_that_is_not_here(name):
    with pytest.raises(DrafterError, match="neither a folder nor a model in the Hugging Face cache") as error:
        prepare_drafter(name, None)
    assert name in str(error.value)

"""Checkpoints of a drafter: what is written is what is read, in the background, and what is wrong is named."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_targets import config_of, make_target, save_target

import tlt_verl
from tlt_verl.drafter import DrafterError, check_drafter, make_drafter
from tlt_verl.drafter.checkpoint import CheckpointWriter, check_weights, latest, load_checkpoint
from tlt_verl.drafter.snapshot import HostCopy

HOT = torch.tensor([0, 5, 17, 95])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A drafter and, beside it, its target."""
    folder = tmp_path_factory.mktemp("made")
    save_target(make_target("llama"), folder / "target")
    return make_drafter(folder / "target", folder / "drafter")


@pytest.fixture
def config(made) -> dict:
    return config_of(made)


@pytest.fixture
def weights(made) -> dict[str, torch.Tensor]:
    return load_file(made / "model.safetensors")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def trainer_state(weights: dict[str, torch.Tensor]) -> dict:
    moments = {name: {"exp_avg": torch.randn_like(tensor), "step": 3} for name, tensor in weights.items()}
    return {"optimizer": {"state": moments, "groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]}, "tokens": 12, "rng": None}


def assert_same(found: object, wanted: object) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same(a, b)
    else:
        assert found == wanted


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".*"))


class Disk:
    """A disk that stops before the first file of the next version, until it is told to go on."""

    def __init__(self, monkeypatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        real = Path.mkdir

        def mkdir(path: Path, *args, **kwargs) -> None:
            if path.name.startswith(".tmp-v"):
                self.reached.set()
                assert self.go_on.wait(20)
            real(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", mkdir)


def test_what_is_saved_is_read(folder, config, weights):
    state = trainer_state(weights)
    with CheckpointWriter(folder) as writer:
        writer.save(config, weights, state, version=7, info={"accept_len": 2.5, "tokens": 1000}, hot=HOT)
    found = load_checkpoint(folder / "latest")
    assert found.folder == (folder / "v7").resolve() and latest(folder) == folder / "v7"
    assert found.version == 7 and found.info == {"accept_len": 2.5, "tokens": 1000}
    assert found.config == config | {"hot_vocab_size": 4}
    assert_same(found.hot, HOT)
    assert_same(dict(sorted(found.weights.items())), dict(sorted(weights.items())))
    assert_same(found.trainer_state, state)
    assert leftovers(folder) == []


def test_sglang_takes_the_folder(made, folder, config, weights):
    with CheckpointWriter(folder) as writer:
        writer.save(config, weights, None, version=0, hot=HOT)
    check_drafter(folder / "latest", config_of(made.parent / "target"))
    with safe_open(folder / "v0" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "tlt_verl.version": tlt_verl.__version__}
    token_map = torch.load(folder / "v0" / "hot_tokens.pt", weights_only=True)  # as SGLang's load_token_map does
    assert torch.tensor(token_map, dtype=torch.int64).tolist() == HOT.tolist()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder / "v0").iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_without_trainer_state_and_hot_tokens(folder, config, weights):
    with CheckpointWriter(folder) as writer:
        writer.save(config | {"hot_vocab_size": 9}, weights, None, version=1)
    assert sorted(path.name for path in (folder / "v1").iterdir()) == ["config.json", "info.json", "model.safetensors"]
    found = load_checkpoint(folder / "v1")
    assert found.trainer_state is None and found.hot is None and "hot_vocab_size" not in found.config


def test_a_drafter_that_was_just_made_is_read_too(made, weights, tmp_path):
    found = load_checkpoint(made)
    assert (found.version, found.info, found.trainer_state, found.hot) == (0, {}, None, None)
    assert found.weights.keys() == weights.keys()
    (tmp_path / "config.json").write_text((made / "config.json").read_text())
    save_file(weights | {"embed_tokens.weight": torch.zeros(96, 32)}, tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path).weights.keys() == weights.keys()


def test_what_was_saved_is_what_it_was_when_save_was_called(folder, config, weights, monkeypatch):
    disk = Disk(monkeypatch)
    wanted = {name: tensor.clone() for name, tensor in weights.items()}
    state = {"step": torch.tensor(3)}
    with CheckpointWriter(folder) as writer:
        writer.save(config, weights, state, version=1)
        assert disk.reached.wait(20)
        for tensor in weights.values():
            tensor.zero_()
        state["step"].add_(1)
        writer.save(config, weights, state, version=2)
        disk.go_on.set()
    first, second = load_checkpoint(folder / "v1"), load_checkpoint(folder / "v2")
    assert all(torch.equal(first.weights[name], wanted[name]) for name in wanted)
    assert not any(tensor.any() for tensor in second.weights.values())
    assert (int(first.trainer_state["step"]), int(second.trainer_state["step"])) == (3, 4)


def test_save_never_waits_and_the_newest_wins(folder, config, weights, monkeypatch):
    disk = Disk(monkeypatch)
    with CheckpointWriter(folder, keep=9) as writer:
        for version in range(1, 6):
            writer.save(config, weights, None, version=version)
            assert disk.reached.wait(20)
        assert writer.replaced == 3
        with pytest.raises(TimeoutError, match="still being written"):
            writer.wait(0.01)
        assert latest(folder) is None
        disk.go_on.set()
    assert sorted(path.name for path in folder.glob("v*")) == ["v1", "v5"]


def test_the_memory_of_the_copies_is_reused(folder, config, weights):
    with CheckpointWriter(folder) as writer:
        places = set()
        for version in range(6):
            writer.save(config, weights, {"m": torch.ones(4)}, version=version)
            writer.wait(20)
            places |= {tensor.data_ptr() for copy in writer._spare for tensor in copy._memory.values()}
    assert len(places) <= 2 * (len(weights) + 1)


def test_only_the_newest_are_kept(folder, config, weights):
    with CheckpointWriter(folder, keep=2) as writer:
        for version in (3, 9, 10, 11):
            writer.save(config, weights, None, version=version)
            writer.wait(20)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "v10", "v11"]
    assert os.readlink(folder / "latest") == "v11"  # so that the folder can be moved


def test_what_kept_a_version_from_being_written_is_said_at_the_next_call(folder, config, weights):
    writer = CheckpointWriter(folder)
    writer.save(config, weights, None, version=1)
    writer.wait(20)
    (folder / ".tmp-v2").write_text("in the way")
    for call in (lambda: writer.wait(20), lambda: writer.save(config, weights, None, version=3)):
        writer.save(config, weights, None, version=2)
        if thread := writer._thread:
            thread.join(20)
        with pytest.raises(FileExistsError) as error:
            call()
        assert str(folder) in error.value.__notes__[0]
        assert latest(folder) == folder / "v1"
        writer.wait(20)  # said once
    (folder / ".tmp-v2").unlink()
    writer.save(config, weights, None, version=2)
    writer.close()
    assert latest(folder) == folder / "v2"


@pytest.mark.parametrize("size", [0, 1000, 20_000, 41_000])
def test_a_version_that_does_not_fit_leaves_nothing(folder, config, weights, size):
    state = trainer_state(weights)
    with CheckpointWriter(folder) as writer:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            writer.save(config, weights, state, version=1)
            with pytest.raises((OSError, RuntimeError, SafetensorError)):
                writer.wait(20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(folder.iterdir()) == []
        writer.save(config, weights, state, version=1)
    assert_same(load_checkpoint(folder / "latest").trainer_state, state)


def test_what_a_killed_writer_left_is_swept_and_latest_is_put_right(folder, config, weights):
    with CheckpointWriter(folder) as writer:
        for version in (1, 2):
            writer.save(config, weights, None, version=version)
            writer.wait(20)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("v1")
    (folder / ".tmp-v3").mkdir()
    (folder / ".tmp-v3" / "config.json").write_text("{}")
    (folder / ".tmp-latest").symlink_to("v3")
    (folder / "v4.bak").mkdir()  # not ours
    CheckpointWriter(folder).close()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "v1", "v2", "v4.bak"]
    assert load_checkpoint(folder / "latest").version == 2


def test_a_version_that_a_killed_writer_had_no_time_to_remove_is_removed(folder, config, weights):
    with CheckpointWriter(folder, keep=3) as writer:
        for version in (1, 2, 3):
            writer.save(config, weights, None, version=version)
            writer.wait(20)
    CheckpointWriter(folder, keep=2).close()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "v2", "v3"]


def test_one_writer_at_a_time(folder):
    with CheckpointWriter(folder), pytest.raises(DrafterError, match="has a checkpoint writer already"):
        CheckpointWriter(folder)
    CheckpointWriter(folder).close()


def test_versions_only_grow(folder, config, weights):
    with CheckpointWriter(folder) as writer:
        writer.save(config, weights, None, version=4)
        with pytest.raises(DrafterError, match=r"version: got 4, and .* has version 4 already"):
            writer.save(config, weights, None, version=4)
    with CheckpointWriter(folder) as writer, pytest.raises(DrafterError, match="version: got 3"):
        writer.save(config, weights, None, version=3)
    with pytest.raises(DrafterError, match="is closed"):
        writer.save(config, weights, None, version=9)
    with pytest.raises(DrafterError, match="keep: got 0"):
        CheckpointWriter(folder, keep=0)


def test_what_does_not_belong_into_a_checkpoint_is_refused_by_name(folder, config, weights):
    with CheckpointWriter(folder) as writer:

        def message(error: type[Exception], weights=weights, state=None, **options) -> str:
            with pytest.raises(error) as raised:
                writer.save(config, weights, state, version=1, **options)
            return str(raised.value)

        short = {name: tensor for name, tensor in weights.items() if name != "fc.bias"}
        assert "weights lack fc.bias" in message(DrafterError, short)
        more = weights | {"lm_head.weight": torch.zeros(96, 32)}
        assert "lm_head.weight" in message(DrafterError, more)
        assert "fc.bias has the shape (3,)" in message(DrafterError, weights | {"fc.bias": torch.zeros(3)})
        assert "checkpoint['trainer']['a'][0] is a set" in message(TypeError, state={"a": [{1}]})
        assert "JSON" in message(TypeError, info={"a": torch.ones(1)})
        assert "token 96" in message(DrafterError, hot=torch.tensor([3, 96]))
        assert "not ascending" in message(DrafterError, hot=torch.tensor([3, 3]))
        assert "not a list of token ids" in message(DrafterError, hot=torch.tensor([0.5]))
        writer.save(config, weights, None, version=1)  # none of it disturbs the next
    assert load_checkpoint(folder / "latest").version == 1


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", b"{", "not JSON"),
        ("config.json", None, "has no config.json"),
        ("model.safetensors", b"torn", "model.safetensors cannot be read"),
        ("model.safetensors", None, "no *.safetensors"),
        ("trainer.pt", b"torn", "trainer.pt cannot be read"),
        ("hot_tokens.pt", b"torn", "hot_tokens.pt cannot be read"),
        ("hot_tokens.pt", None, "hot_tokens.pt is missing"),
        ("info.json", b"{", "info.json is not JSON"),
        ("info.json", b"{}", "info.json does not say which version"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(folder, config, weights, file, content, said):
    with CheckpointWriter(folder) as writer:
        writer.save(config, weights, trainer_state(weights), version=1, hot=HOT)
    if content is None:
        (folder / "v1" / file).unlink()
    else:
        (folder / "v1" / file).write_bytes(content)
    with pytest.raises(DrafterError) as error:
        load_checkpoint(folder / "latest")
    assert said in str(error.value) and str(folder) in str(error.value)


def test_files_that_do_not_belong_together(folder, config, weights):
    with CheckpointWriter(folder) as writer:
        writer.save(config, weights, None, version=1, hot=HOT)
    torch.save([1, 2], folder / "v1" / "hot_tokens.pt")
    with pytest.raises(DrafterError, match=r"holds 2 tokens, and config\.json has hot_vocab_size 4"):
        load_checkpoint(folder / "v1")
    save_file(weights | {"fc.bias": torch.zeros(1)}, folder / "v1" / "model.safetensors")
    with pytest.raises(DrafterError, match=r"fc\.bias has the shape"):
        load_checkpoint(folder / "v1")


def test_nothing_there(folder):
    assert latest(folder) is None
    with pytest.raises(DrafterError, match="is not a folder"):
        load_checkpoint(folder / "latest")


def test_code_in_a_trainer_state_is_not_run(folder, config, weights):
    with CheckpointWriter(folder) as writer:
        writer.save(config, weights, {"a": 1}, version=1)
    torch.save({"a": threading.Thread}, folder / "v1" / "trainer.pt")
    with pytest.raises(DrafterError, match=r"trainer\.pt cannot be read"):
        load_checkpoint(folder / "v1")


def test_weights_to_publish(config, weights):
    assert check_weights(weights, config) is None
    assert check_weights({}, config).startswith("weights lack fc.weight, fc.bias")
    assert "embed_tokens.weight" in check_weights(weights | {"embed_tokens.weight": torch.zeros(96, 32)}, config)
    assert "(32, 64)" in check_weights(weights | {"fc.weight": torch.zeros(1)}, config)
    assert "int64" in check_weights(weights | {"fc.bias": torch.zeros(32, dtype=torch.int64)}, config)
    for value, kind in ((float("nan"), "NaN"), (float("-inf"), "infinity")):
        bad = weights["fc.bias"].clone()
        bad[[1, 4]] = value
        assert check_weights(weights | {"fc.bias": bad}, config) == f"fc.bias holds {kind} in 2 of 32 places"


def test_a_host_copy_keeps_its_memory_until_a_shape_changes():
    copy = HostCopy()
    source = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    first = copy.take({"a": source, "b": (1, None)})
    assert first["b"] == (1, None) and torch.equal(first["a"], source.detach()) and first["a"].is_contiguous()
    assert not first["a"].requires_grad
    second = copy.take({"a": source.detach() + 1})
    assert second["a"].data_ptr() == first["a"].data_ptr() and float(first["a"][0, 0]) == 1
    assert copy.take({"a": torch.ones(5)})["a"].tolist() == [1] * 5


def test_a_host_copy_takes_into_the_memory_that_was_reserved():
    copy, source = HostCopy(), {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    copy.reserve(source)
    reserved = {tensor.data_ptr() for tensor in copy._memory.values()}
    copy.take({"a": source["a"]})  # what is missing once keeps its memory
    assert {tensor.data_ptr() for tensor in copy.take(source).values()} == reserved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_a_host_copy_of_any_dtype_and_shape(dtype, shape):
    source = torch.ones(shape, dtype=dtype)
    found = HostCopy().take([source])[0]
    assert_same(found, source)
    assert found.shape == source.shape and (not source.numel() or found.data_ptr() != source.data_ptr())

"""An exported drafter: complete, fitting its target, and with a command line that SGLang takes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_targets import FAMILIES, config_of, make_target, save_target

from tlt_verl.drafter import DrafterError, check_drafter, make_drafter
from tlt_verl.drafter.checkpoint import CheckpointWriter, load_checkpoint
from tlt_verl.drafter.export import export_drafter

HOT = torch.tensor([1, 4, 90])


def saved(folder: Path, family: str = "llama", hot: torch.Tensor | None = None, sharded: bool = False) -> Path:
    """A target in `folder/target`, and the checkpoint of a drafter that was trained for it."""
    target = save_target(make_target(family), folder / "target", sharded)
    made = make_drafter(target, folder / "made")
    weights = {name: tensor + 0.5 for name, tensor in load_file(made / "model.safetensors").items()}
    with CheckpointWriter(folder / "checkpoints") as writer:
        writer.save(config_of(made), weights, {"secret": torch.ones(3)}, version=12, hot=hot)
    return folder / "checkpoints" / "latest"


def command_in(readme: str) -> list[str]:
    """The words of the README's command line."""
    block = [line.strip() for line in readme.splitlines() if line.startswith("    ")]
    return shlex.split(" ".join(line.removesuffix("\\") for line in block))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True])
def test_the_drafter_and_the_targets_embedding(tmp_path, family, sharded):
    checkpoint = saved(tmp_path, family, sharded=sharded)
    out = export_drafter(checkpoint, tmp_path / "target", tmp_path / "deep" / "out")
    assert out == tmp_path / "deep" / "out"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    tensors, trained = load_file(out / "model.safetensors"), load_checkpoint(checkpoint)
    assert torch.equal(tensors.pop("embed_tokens.weight"), make_target(family).model.embed_tokens.weight)
    assert tensors.keys() == trained.weights.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in trained.weights.items())
    assert config_of(out) == trained.config
    check_drafter(out, config_of(tmp_path / "target"))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_reduced_head(tmp_path):
    out = export_drafter(saved(tmp_path, hot=HOT), tmp_path / "target", tmp_path / "out")
    assert torch.load(out / "hot_tokens.pt", weights_only=True) == HOT.tolist()
    assert config_of(out)["hot_vocab_size"] == 3
    text = (out / "README.md").read_text()
    assert "knows 3 tokens" in text
    command = command_in(text)
    assert command[command.index("--speculative-token-map") + 1] == str(out / "hot_tokens.pt")


def test_sglang_takes_the_command_line(tmp_path):
    from sglang.srt.server_args import ServerArgs

    folder = tmp_path / "a folder"
    folder.mkdir()
    out = export_drafter(saved(folder, hot=HOT), folder / "target", folder / "out")
    command = command_in((out / "README.md").read_text())
    assert command[:3] == ["python", "-m", "sglang.launch_server"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    parsed, unknown = parser.parse_known_args(command[3:])
    assert unknown == []
    assert (parsed.model_path, parsed.speculative_algorithm) == (str(folder / "target"), "EAGLE")
    assert parsed.speculative_draft_model_path == str(out)
    assert parsed.speculative_token_map == str(out / "hot_tokens.pt")
    sizes = (parsed.speculative_num_steps, parsed.speculative_eagle_topk, parsed.speculative_num_draft_tokens)
    assert sizes == (3, 1, 4)


def test_an_export_can_be_exported_and_replaced(tmp_path):
    checkpoint = saved(tmp_path, hot=HOT)
    out = export_drafter(checkpoint, tmp_path / "target", tmp_path / "out")
    again = export_drafter(out, tmp_path / "target", tmp_path / "again")
    assert load_checkpoint(again).weights.keys() == load_checkpoint(checkpoint).weights.keys()
    (out / "config.json").write_text("{}")
    export_drafter(checkpoint, tmp_path / "target", out)
    check_drafter(out, config_of(tmp_path / "target"))
    (tmp_path / "empty").mkdir()
    export_drafter(checkpoint, tmp_path / "target", tmp_path / "empty")


def test_what_is_no_export_is_not_overwritten(tmp_path):
    checkpoint = saved(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for place in ("file", "notes", "target", "made", "checkpoints", "checkpoints/v12"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(DrafterError, match="exists and is not an export, so it is not overwritten"):
            export_drafter(checkpoint, tmp_path / "target", tmp_path / place)
        assert sorted(tmp_path.rglob("*")) == before


def test_what_does_not_fit_is_said(tmp_path):
    checkpoint = saved(tmp_path)

    def message() -> str:
        with pytest.raises(DrafterError) as error:
            export_drafter(checkpoint, tmp_path / "target", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    path = tmp_path / "target" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path)
    assert "actor_rollout_ref.model.path" in message() and "lack model.embed_tokens.weight" in message()
    save_file(tensors | {"model.embed_tokens.weight": embedding[1:].clone()}, path)
    assert "has the shape (95, 32); its config.json asks for (96, 32)" in message()
    path.write_bytes(b"torn")
    assert "cannot be read" in message()
    save_target(make_target("llama", hidden_size=64), tmp_path / "target")
    assert "whose hidden_size is 32; the target's is 64" in message()
    checkpoint = tmp_path / "nowhere"
    assert "checkpoint: got " in message() and "is not a folder" in message()

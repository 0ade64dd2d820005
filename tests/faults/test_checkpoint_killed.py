"""A process that saves checkpoints is killed at any moment: the last good one stays, and nothing else does."""

from __future__ import annotations

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tlt_verl.drafter.checkpoint import CheckpointWriter, latest, load_checkpoint
from tlt_verl.drafter.eagle import drafter_config, tensor_shapes

KILLS = 24
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TARGET = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96, "rms_norm_eps": 1e-5, **SIZES}
CONFIG = drafter_config(TARGET)


def weights_of(version: int) -> dict[str, torch.Tensor]:
    """Weights that only this version has."""
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(CONFIG).items()}


def hot_of(version: int) -> torch.Tensor:
    return torch.arange(1 + version % 50)


def save_for_ever(folder: Path, pipe: Connection) -> None:
    """Save one version after the other, each as soon as the one before is written; say each that is."""
    torch.set_num_threads(1)
    with CheckpointWriter(folder) as writer:
        names = sorted(path.name for path in folder.iterdir())
        found = latest(folder)
        version = -1 if found is None else load_checkpoint(found).version
        pipe.send((names, version))
        while True:
            version += 1
            weights = weights_of(version)
            state = {"exp_avg": {name: 2 * tensor for name, tensor in weights.items()}, "version": version}
            writer.save(CONFIG, weights, state, version=version, info={"twice": 2 * version}, hot=hot_of(version))
            writer.wait()
            pipe.send(version)


def check(checkpoint: Path) -> int:
    """The version, which everything in the checkpoint agrees on."""
    found = load_checkpoint(checkpoint)
    version = found.version
    assert found.info == {"twice": 2 * version} and found.folder.name == f"v{version}"
    wanted = weights_of(version)
    assert found.weights.keys() == wanted.keys()
    assert found.trainer_state is not None and found.trainer_state["version"] == version
    for name, tensor in wanted.items():
        assert torch.equal(found.weights[name], tensor), name
        assert torch.equal(found.trainer_state["exp_avg"][name], 2 * tensor), name
    assert torch.equal(found.hot, hot_of(version))
    return version


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_last_good_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tlt_verl.drafter.checkpoint"])
    folder, moments = tmp_path / "checkpoints", random.Random(1)
    torn = begun = 0
    for kill in range(KILLS):
        ours, theirs = context.Pipe(duplex=False)
        saver = context.Process(target=save_for_ever, args=(folder, theirs))
        saver.start()
        theirs.close()
        names, resumed = ours.recv()
        assert not [name for name in names if name.startswith(".")], "the restart left something"
        assert resumed >= begun - 1
        said = resumed
        if kill % 4:  # some are killed before they finish a version
            said = ours.recv()
        time.sleep(moments.uniform(0, 0.04))
        saver.kill()
        saver.join(10)
        assert saver.exitcode == -9
        while ours.poll():
            try:
                said = ours.recv()
            except EOFError:
                break
        if said < 0:  # nothing was ever finished
            assert latest(folder) is None or check(latest(folder)) == 0
            continue
        newest = check(latest(folder))
        assert newest in (said, said + 1)
        assert check(folder / "latest") in (newest, newest - 1)  # the link may be one rename behind
        assert all(check(path) >= 0 for path in folder.glob("v*"))
        torn += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        begun = newest + 1
    assert begun > KILLS // 2 and torn > KILLS // 4, f"{torn} of {KILLS} kills fell into a write"
    CheckpointWriter(folder).close()
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(["latest", f"v{begun - 1}", f"v{begun - 2}"])
    assert check(folder / "latest") == begun - 1

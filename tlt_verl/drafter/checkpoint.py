"""Checkpoints of a drafter: written in the background, complete or not there at all, and read back.

Knows the files of a version; how a version comes to be complete is `versions`. Knows neither the trainer nor the gate.

    <folder>/v12/
        config.json         for SGLang, with `hot_vocab_size` where the head is reduced
        model.safetensors   only what is trained: embedding and head are the target's
        hot_tokens.pt       a list of token ids, for SGLang's --speculative-token-map; only with a reduced head
        trainer.pt          optimizer and whatever else the trainer gave; only if it gave something
        info.json           version, and what the caller said of it
    <folder>/latest -> v12
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import tlt_verl
from tlt_verl.drafter.check import Problem, layout_problem
from tlt_verl.drafter.eagle import HOT_TOKENS, SHARED_TENSORS, DrafterError, read_config
from tlt_verl.drafter.snapshot import HostCopy
from tlt_verl.drafter.tensors import TensorFolder
from tlt_verl.drafter.versions import add_version, latest, lock, newest_version, sweep

__all__ = ["Checkpoint", "CheckpointWriter", "check_weights", "latest", "load_checkpoint"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_TRAINER, _INFO = "trainer.pt", "info.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A drafter as it was read from a folder."""

    folder: Path
    """The version's own folder, links followed."""
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    """Every tensor of `eagle.tensor_shapes(config)`, on the CPU."""
    trainer_state: dict[str, Any] | None
    hot: torch.Tensor | None
    """int64 [hot_vocab_size]: the target's token for each row of the reduced head. None is the whole vocabulary."""
    version: int
    """0 for a drafter that was not written by `CheckpointWriter`."""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """One version, copied, on its way to the disk."""

    version: int
    config: str
    info: str
    hot: list[int] | None
    state: dict[str, Any]  # "weights" and "trainer"
    memory: HostCopy


class CheckpointWriter:
    """Writes versions into a folder from a background thread.

    One version may be being written and one more may wait. A third replaces the one that waits, which is then never
    written (`replaced` counts it): `save` never waits for the disk, and the memory is that of two copies. One thread
    at a time may call it.

    Args:
        folder: made if it is not there. One writer at a time.
        keep: how many versions stay, the newest.

    Attributes:
        replaced: versions that a newer one replaced before they were written.

    Raises:
        DrafterError: `keep` is not positive, or another writer has the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise DrafterError(f"keep: got {keep}; takes at least 1, the checkpoint that a restart continues from.")
        self.folder, self.replaced = Path(folder), 0
        self._keep = keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock(self.folder)
        sweep(self.folder, keep)
        self._newest = newest_version(self.folder)
        self._changed = threading.Condition()
        self._spare = [HostCopy(), HostCopy()]
        self._waiting: _Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        trainer_state: Mapping[str, Any] | None,
        *,
        version: int,
        info: Mapping[str, Any] | None = None,
        hot: torch.Tensor | None = None,
    ) -> None:
        """Copy one version to host memory and return; the thread writes it. All arguments may change afterwards.

        Args:
            config: the drafter's `config.json`; `hot_vocab_size` is set here.
            weights: exactly the tensors of `eagle.tensor_shapes(config)`, on any device.
            trainer_state: what `HostCopy.take` takes; None for none.
            version: higher than every version in the folder.
            info: goes to `info.json`.
            hot: int64 [hot_vocab_size], ascending: the target's tokens of a reduced head.

        Raises:
            DrafterError: a tensor is missing, unknown or of the wrong shape; the version is not new; `hot` is no list
                of tokens.
            TypeError: `trainer_state`, `config` or `info` hold something that cannot be written.
            OSError, or whatever else kept the thread from writing an earlier version: once, and this one is not saved.
        """
        self._raise_error()
        self._check(weights, config, version)
        tokens = None if hot is None else _hot_list(hot, config["vocab_size"], "hot")
        config_text = _json({key: value for key, value in config.items() if key != "hot_vocab_size"}, tokens)
        info_text = _json(dict(info or {}) | {"version": version})
        with self._changed:
            if self._waiting:
                self._spare.append(self._waiting.memory)
                self._waiting = None
                self.replaced += 1
            memory = self._spare.pop()
        try:
            state = memory.take({"weights": weights, "trainer": trainer_state}, "checkpoint")
        except BaseException:
            self._spare.append(memory)
            raise
        self._newest = version
        self._start(_Snapshot(version, config_text, info_text, tokens, state, memory))

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when everything saved is on the disk.

        Raises:
            TimeoutError: it is not, after `timeout_s` seconds.
            OSError, or whatever else kept the thread from writing: once.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout_s):
                raise TimeoutError(f"a checkpoint is still being written to {self.folder} after {timeout_s} s")
        self._raise_error()

    def close(self, timeout_s: float | None = None) -> None:
        """Wait as `wait` does, then let another writer have the folder. Closing twice is allowed."""
        try:
            self.wait(timeout_s)
        finally:
            if self._thread is None and self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], version: int) -> None:
        if self._lock is None:
            raise DrafterError(f"the writer of {self.folder} is closed. Make another one.")
        if version < 0 or (self._newest is not None and version <= self._newest):
            raise DrafterError(
                f"version: got {version}, and {self.folder} has version {self._newest} already. Continue from its "
                "latest checkpoint, or choose another folder."
            )
        if problem := layout_problem({name: tuple(t.shape) for name, t in weights.items()}, config, shared=()):
            raise DrafterError(f"version {version} of the drafter cannot be saved: its {problem.text}.")

    def _start(self, snapshot: _Snapshot) -> None:
        with self._changed:
            self._waiting = snapshot
            if self._thread is None:
                # Not a daemon: when the interpreter ends, it ends after the last version is written.
                self._thread = threading.Thread(target=self._drain, name="checkpoint-writer")
                self._thread.start()

    def _drain(self) -> None:
        while True:
            with self._changed:
                snapshot, self._waiting = self._waiting, None
                if snapshot is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
            try:
                add_version(self.folder, snapshot.version, partial(_write_files, snapshot), self._keep)
            except BaseException as error:
                self._error = error  # raised where the caller can act on it, in `save` and `wait`
            finally:
                with self._changed:
                    self._spare.append(snapshot.memory)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._newest = newest_version(self.folder)  # what was not written may be saved again
            error.add_note(f"while a drafter checkpoint was written to {self.folder}")
            raise error


def load_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read a drafter: a version's folder, the link `latest`, or any drafter in SGLang's format.

    Embedding and head, if they are in the file, are left out. The trainer's state is read with
    `torch.load(weights_only=True)`, so reading runs no code.

    Raises:
        DrafterError: a file is missing, torn, or does not fit the others; the message names it.
    """
    given = Path(folder)
    folder = given.resolve()
    config = read_config(folder, "checkpoint")
    weights = _read_weights(folder, config)
    info: dict[str, Any] = {}
    if (folder / _INFO).exists():
        info = _read_info(folder / _INFO)
    hot = _read_hot(folder / HOT_TOKENS, config)
    trainer = _torch_load(folder / _TRAINER) if (folder / _TRAINER).exists() else None
    return Checkpoint(folder, config, weights, trainer, hot, info.pop("version", 0), info)


def check_weights(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str | None:
    """Why a set of tensors must not be published, as the rest of a sentence; None when nothing is wrong."""
    problem = weights_problem(weights, config)
    return problem.text if problem else None


def weights_problem(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Problem | None:
    """What is wrong with a set of tensors that is to be published.

    Args:
        weights: on any device.
        config: the drafter's `config.json`.

    Returns:
        The first problem: a tensor that is missing, unknown (embedding and head are) or of the wrong shape, that is no
        floating-point one (`dtype`), or that holds NaN or infinity (`nan`).
    """
    if problem := layout_problem({name: tuple(t.shape) for name, t in weights.items()}, config, shared=()):
        return problem
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            return Problem("dtype", f"{name} has the dtype {tensor.dtype}, which is no floating-point type")
        if not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            places = f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} places"
            return Problem("nan", f"{name} holds {kind} in {places}")
    return None


def write_drafter(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    hot: torch.Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a drafter into an existing folder as SGLang reads it: config, weights, and the token map of a hot head.

    Args:
        weights: on any device.
        hot: int64 [hot_vocab_size].
        metadata: more of it for the header of the weights.
    """
    tokens = None if hot is None else hot.tolist()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    text = _json({key: value for key, value in config.items() if key != "hot_vocab_size"}, tokens)
    _write_serving(folder, text, tensors, tokens, metadata)


def _write_serving(
    folder: Path,
    config: str,
    weights: dict[str, torch.Tensor],
    hot: list[int] | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    (folder / CONFIG).write_text(config, encoding="utf-8")
    header = {"format": "pt", "tlt_verl.version": tlt_verl.__version__, **(metadata or {})}
    save_file(weights, folder / WEIGHTS, metadata=header)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors hides it from other users
    if hot is not None:
        torch.save(hot, folder / HOT_TOKENS)  # a plain list, as SGLang's `load_token_map` reads it


def _write_files(snapshot: _Snapshot, scratch: Path) -> None:
    _write_serving(scratch, snapshot.config, snapshot.state["weights"], snapshot.hot)
    (scratch / _INFO).write_text(snapshot.info, encoding="utf-8")
    if snapshot.state["trainer"] is not None:
        torch.save(snapshot.state["trainer"], scratch / _TRAINER)


def _json(value: dict[str, Any], hot: list[int] | None = None) -> str:
    return json.dumps(value | ({"hot_vocab_size": len(hot)} if hot is not None else {}), indent=2) + "\n"


def _hot_list(hot: Any, vocab_size: int, what: str) -> list[int]:
    """The tokens of a reduced head as a list.

    Raises:
        DrafterError: they are not ascending ids below `vocab_size`.
    """
    tokens = hot.tolist() if isinstance(hot, torch.Tensor) else hot
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise DrafterError(f"{what} is not a list of token ids.")
    if wrong := [token for token in tokens if not 0 <= token < vocab_size]:
        raise DrafterError(f"{what} holds token {wrong[0]}; takes ids from 0 to {vocab_size - 1}, the vocabulary's.")
    if any(token <= before for before, token in itertools.pairwise(tokens)):
        raise DrafterError(f"{what} is not ascending; takes each token once, in order.")
    return tokens


def _read_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    try:
        tensors = TensorFolder(folder)
        problem = layout_problem({name: tensors.shape(name) for name in tensors}, config)
        if problem is None:
            return {name: tensors.load(name) for name in tensors if name not in SHARED_TENSORS}
    except KeyError as error:
        raise DrafterError(f"{folder / CONFIG} has no {error}, which a drafter needs.") from None
    except (OSError, ValueError) as error:
        raise DrafterError(f"the weights in {folder} cannot be read: {error}") from error
    raise DrafterError(f"{folder} is not a drafter: its {problem.text}.")


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DrafterError(f"{path} is not JSON: {error}") from None
    if not isinstance(info, dict) or not isinstance(info.get("version"), int):
        raise DrafterError(f"{path} does not say which version this is.")
    return info


def _read_hot(path: Path, config: Mapping[str, Any]) -> torch.Tensor | None:
    size = config.get("hot_vocab_size")
    if not path.exists():
        if size is None:
            return None
        raise DrafterError(f"{path} is missing, and config.json has hot_vocab_size {size}.")
    tokens = _hot_list(_torch_load(path), config["vocab_size"], str(path))
    if size != len(tokens):
        raise DrafterError(f"{path} holds {len(tokens)} tokens, and config.json has hot_vocab_size {size}.")
    return torch.tensor(tokens, dtype=torch.int64)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file can be any of a dozen types
        raise DrafterError(f"{path} cannot be read: {error}") from error

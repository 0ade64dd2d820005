"""The master of the drafter: copies that were trained apart come in, and one state with one version goes out.

Knows trainer states (`DrafterTrainer.state_dict`), tokens, versions, the hot vocabulary and what serves. Knows neither
Ray, files, processes nor clocks, and is for one thread at a time: `coordinator` is the actor around it.

Local SGD (arXiv 1805.09767) with unequal shares: a worker takes the master of version `base`, trains a copy on t
tokens, and gives it back whenever it must leave. With C tokens merged after `base`, by others,

    master' = (C * master + t * copy) / (C + t)

Copies with one base end as the mean of all of them, weighted by tokens, in whatever order they come. A copy of the
current master has C = 0 and replaces it, so one worker alone trains as if there were no master.

No tensor is ever written to: a merge makes new ones, one at a time, and drops the old. So whoever was given the state
keeps what it was given, nothing is copied for it, and what came through Ray may be read-only memory.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from tlt_verl.drafter.checkpoint import Checkpoint, weights_problem
from tlt_verl.drafter.eagle import DrafterError

KINDS = ("tokens", "base", "shape", "nan")
"""Kinds of refusal, in the order in which they are looked for. Infinity counts as `nan`."""

HISTORY = 64
"""Merges whose tokens are remembered one by one. A copy with an older base counts these: it gets too large a share of
little, and its work is not lost."""

_KEY = "spot"  # of what is kept here, in a checkpoint's info
_STATE = {"drafter", "optimizer", "steps", "noise"}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class SubmissionRefused(ValueError):  # noqa: N818 - what happened, in the gate's word
    """A copy that is not merged. `kind` is of `KINDS`, the message is one sentence; the master is as it was."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Merge:
    """What a merge made of the master.

    Args:
        version: the master's, now.
        share: of the copy in it, above 0 and at most 1.
    """

    version: int
    share: float


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds, as `CheckpointWriter.save` takes it.

    Args:
        config: the drafter's `config.json`.
        weights: those that serve, so that SGLang may load the folder; the master's where none do.
        trainer_state: the master, as `DrafterTrainer.load_state_dict` takes it; None while nothing was trained.
        info: version, tokens and all other numbers of `Coordination`.
        hot: int64 [Vh] or None.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    trainer_state: Mapping[str, Any] | None
    info: Mapping[str, Any]
    hot: torch.Tensor | None


class Coordination:
    """The master state of a drafter, and the rules by which copies of it are merged.

    Args:
        start: the drafter that the engines begin with; the master's version 0. With a trainer's state (a warm-up wrote
            it), the master begins with that; without one, with its weights and no optimizer.
        serves: whether the engines draft with it. They do not with one that was made and never trained.

    Attributes:
        config: the drafter's `config.json`.
        version: of the master; every merge makes a higher one.
        tokens: that the master and all copies merged into it were trained on since the start.
        report: the last submission's `loss`, `ce` and `accept`, where it said them.
        hot: int64 [Vh], the hot vocabulary of all; None while nobody has proposed one.
        serving_version: of `serving`; 0 while there is none. A start that serves has its own, or 1.
        serving_accept_len: tokens per verification of these, as the gate measured them; None where it did not.
        merged, refused, recovered: how many copies; `refused` by kind, `recovered` as in `recover`.

    Raises:
        DrafterError: the start's trainer state is not one of its drafter.
    """

    def __init__(self, start: Checkpoint, *, serves: bool = True) -> None:
        self.config = {key: value for key, value in start.config.items() if key != "hot_vocab_size"}
        self.version = self.tokens = self.merged = self.recovered = 0
        self.refused: Counter[str] = Counter()
        self.report: dict[str, float] = {}
        self.hot = start.hot
        self.serving_version = max(start.version, 1) if serves else 0
        self.serving_accept_len: float | None = start.info.get("accept_len")
        self._given = self._unsent = self.serving_version
        self._serving = start.weights
        self._history: deque[tuple[int, int]] = deque(maxlen=HISTORY)  # (version, tokens) of each merge
        self._kept: int | None = None  # the version from which a dead coordinator's successor went on
        if start.trainer_state is None:
            drafter = {name: tensor.to(torch.float32) for name, tensor in start.weights.items()}
            self._state: dict[str, Any] = {"drafter": drafter}
            return
        try:
            check_state(start.trainer_state, self.config)
        except SubmissionRefused as error:
            raise DrafterError(f"the trainer's state in {start.folder} is not its drafter's: {error}") from None
        self._state = _entries(start.trainer_state)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Coordination:
        """Go on from what `checkpoint` gave: the same numbers, master, hot vocabulary and serving weights.

        Raises:
            DrafterError: the checkpoint is of another kind, or torn.
        """
        coordination = cls(checkpoint)
        try:
            kept = dict(checkpoint.info[_KEY])
            coordination._history.extend((version, tokens) for version, tokens in kept.pop("history"))
            coordination.refused.update(kept.pop("refused"))
            for name in _NUMBERS:
                setattr(coordination, name, kept[name])
        except (KeyError, TypeError, ValueError):
            raise DrafterError(
                f"{checkpoint.folder} was not written by spot training: it cannot go on there."
            ) from None
        return coordination

    def checkpoint(self) -> Saved:
        """What `from_checkpoint` goes on from. Later merges do not change it."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in _NUMBERS}
        kept |= {"history": [list(merge) for merge in self._history], "refused": dict(self.refused)}
        info = {"tokens": self.tokens, "accept_len": self.serving_accept_len, _KEY: kept}
        weights = self.state()["drafter"] if self.serving is None else self.serving
        return Saved(self.config, weights, self.state() if self.trained else None, info, self.hot)

    # --- the master ---

    @property
    def trained(self) -> bool:
        """Whether `state` has an optimizer in it, and is what `DrafterTrainer.load_state_dict` takes."""
        return "optimizer" in self._state

    def state(self) -> dict[str, Any]:
        """The master: always `drafter`, float32 by name; with `optimizer`, `steps` and `noise` once it was trained.

        The tensors are the master's own and must not be written to. Later merges do not change them.
        """
        return _entries(self._state)

    def fetch(self, version: int, serving_version: int) -> dict[str, Any]:
        """What a window of training begins with, without what the worker has: the fields of `links.Master`.

        Args:
            version: of the master that the worker has; -1 for none. A worker that outlived a coordinator may be ahead
                of this one (`recover`), and is told to go on with what it has.
            serving_version: of the serving weights that it has; 0 for none.
        """
        is_ahead = self._kept is not None and version > self.version
        return {
            "version": version if is_ahead else self.version,
            "state": None if is_ahead or version == self.version else self.state(),
            "hot": self.hot,
            "serving_version": self.serving_version,
            "serving": None if serving_version == self.serving_version else self.serving,
        }

    def merge(
        self, base: int, state: Mapping[str, Any], tokens: int, report: Mapping[str, float] | None = None
    ) -> Merge:
        """Take in a copy that was trained.

        Drafter and moments are averaged in float32; of step counters the larger stays; the optimizer's settings and the
        state of the noise's generator are the copy's.

        Args:
            base: the version that the copy began from.
            state: what `DrafterTrainer.state_dict` gives, on the CPU. It is not kept, nor written to.
            tokens: that the copy was trained on since.
            report: `loss`, `ce` and `accept` of its last steps.

        Raises:
            SubmissionRefused: `tokens` is not positive, `base` is no version that was ever given, the state is not one
                of this drafter's, or something in it is not finite. It is counted, and nothing else has changed.
        """
        try:
            self._check_numbers(base, tokens, report or {})
            check_state(state, self.config)
        except SubmissionRefused as refused:
            self.refused[refused.kind] += 1
            raise
        others = sum(merged for version, merged in self._history if version > base)
        share = tokens / (others + tokens)
        _take_in(self._state, state, share)
        self.recovered += self._is_lost(base)
        self.version = max(self.version, base) + 1
        self.tokens += tokens
        self.merged += 1
        self.report.update(report or {})
        self._history.append((self.version, tokens))
        return Merge(self.version, share)

    def _check_numbers(self, base: int, tokens: int, report: Mapping[str, float]) -> None:
        if tokens <= 0:
            raise SubmissionRefused("tokens", f"the copy was trained on {tokens} tokens; takes 1 or more")
        if base < 0 or (base > self.version and self._kept is None):
            raise SubmissionRefused("base", f"the copy is of version {base}; takes 0 to {self.version}, the master's")
        for name, value in report.items():
            if not math.isfinite(value):
                raise SubmissionRefused("nan", f"the copy's {name} is {value}")

    # --- after a death ---

    def told(self) -> dict[str, int]:
        """The numbers that others may have seen: what `recover` of a successor takes. Small, to be kept at once."""
        return {"version": self.version, "tokens": self.tokens, "given": self._given}

    def recover(self, told: Mapping[str, int]) -> None:
        """Be the successor of a coordinator that died behind its last checkpoint, which this one was made from.

        Merges between that checkpoint and the death are lost, but workers may hold copies of what they made. The rule:
        numbers go on from those that were told, so that no version means two states, and a copy whose base is a lost
        version, or one above all that is known (the last numbers could not be kept), is no mistake. It holds all that
        was lost, no other copy has a claim beside it (C = 0) until another one is merged, and it is counted in
        `recovered`. Without `recover`, a base from the future is refused.

        Args:
            told: the predecessor's last `told`; may lack any number.
        """
        self._kept = self.version
        self.continue_numbers(told)

    def continue_numbers(self, told: Mapping[str, int]) -> None:
        """Let no number be below one that was told."""
        self.version = max(self.version, told.get("version", 0))
        self.tokens = max(self.tokens, told.get("tokens", 0))
        self._given = max(self._given, told.get("given", 0))
        self._lost = range((self._kept or 0) + 1, self.version + 1)

    def _is_lost(self, base: int) -> bool:
        """Whether a predecessor made this version and took it to its grave."""
        return self._kept is not None and (base in self._lost or base > self.version)

    # --- what serves ---

    @property
    def serving(self) -> Mapping[str, torch.Tensor] | None:
        """The weights that the engines draft with; None while they draft with none."""
        return self._serving if self.serving_version else None

    @property
    def to_send(self) -> bool:
        """Whether an engine that has just started lacks `serving`: it was published."""
        return self.serving_version > self._unsent

    def choose_hot(self, hot: torch.Tensor | None) -> torch.Tensor | None:
        """Propose the hot vocabulary. The first proposal is everybody's.

        Args:
            hot: int64 [Vh], ascending ids of the target's vocabulary; None only asks.

        Returns:
            The chosen one; None while there is none.

        Raises:
            ValueError: it is not that, and none was chosen before.
        """
        if self.hot is None and hot is not None:
            V = self.config["vocab_size"]
            if hot.ndim != 1 or hot.dtype != torch.int64 or not len(hot):
                raise ValueError(f"hot: got {hot.dtype} {list(hot.shape)}, takes int64 [Vh], Vh >= 1")
            if hot[0] < 0 or hot[-1] >= V or not bool((hot.diff() > 0).all()):
                raise ValueError(f"hot: takes each token once, ascending, from 0 to {V - 1}")
            self.hot = hot.clone()
        return self.hot

    def next_serving(self, seen: int = 0) -> int:
        """A version, above what a server has `seen`, for weights that are about to be sent. It is never given again."""
        self._given = max(self._given, seen) + 1
        return self._given

    def published(self, weights: Mapping[str, torch.Tensor], version: int, accept_len: float | None) -> None:
        """Note that these weights serve.

        Args:
            weights: of any float dtype, on the CPU. They are copied.
            version: from `next_serving`.
            accept_len: tokens per verification, as the gate measured them.

        Raises:
            ValueError: the version was not given, or a newer one serves.
        """
        if not self.serving_version < version <= self._given:
            raise ValueError(f"version: got {version}, takes {self.serving_version + 1} to {self._given}")
        self._serving = {name: tensor.clone() for name, tensor in weights.items()}
        self.serving_version, self.serving_accept_len = version, accept_len

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and the last report, under the names of verl's logger."""
        values: dict[str, float] = {f"tlt/drafter/{name}": self.report[name] for name in _SHOWN if name in self.report}
        values["tlt/drafter/tokens"] = self.tokens
        values["tlt/spot/merged"] = self.merged
        values["tlt/spot/refused"] = self.refused.total()
        values["tlt/spot/recovered"] = self.recovered
        return {name: float(value) for name, value in values.items()}


_SHOWN = ("loss", "ce")
_NUMBERS = (
    *("version", "tokens", "merged", "recovered", "report"),
    *("serving_version", "serving_accept_len", "_given", "_unsent"),
)


def check_state(state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise unless a state is what `DrafterTrainer.state_dict` gives of a drafter with this config, all of it finite.

    Raises:
        SubmissionRefused: it is not; of the kind `shape` or `nan`.
    """
    if not isinstance(state, Mapping) or state.keys() != _STATE:
        raise SubmissionRefused("shape", f"the copy's state is not the entries {sorted(_STATE)} of a trainer")
    drafter, noise = state["drafter"], state["noise"]
    if problem := weights_problem(drafter, config):
        raise SubmissionRefused("nan" if problem.kind == "nan" else "shape", f"the copy's {problem.text}")
    if not isinstance(noise, torch.Tensor) or noise.dtype != torch.uint8 or type(state["steps"]) is not int:
        raise SubmissionRefused("shape", "the copy's steps are no integer, or its noise is no generator's state")
    moments = state["optimizer"].get("state", {})
    if moments.keys() != set(range(len(drafter))):
        raise SubmissionRefused("shape", f"the copy's optimizer has no state for each of {len(drafter)} parameters")
    for index, (name, parameter) in enumerate(drafter.items()):  # AdamW counts parameters in this order
        _check_moments(moments[index], name, parameter)


def _check_moments(entries: Mapping[str, Any], name: str, parameter: torch.Tensor) -> None:
    if entries.keys() != {"step", *_MOMENTS}:
        raise SubmissionRefused("shape", f"the copy's optimizer has {sorted(entries)} of {name}, which is not AdamW's")
    for key, shape in (("step", ()), *((moment, tuple(parameter.shape)) for moment in _MOMENTS)):
        tensor = torch.as_tensor(entries[key])
        if tuple(tensor.shape) != shape:
            raise SubmissionRefused("shape", f"the copy's {key} of {name} has the shape {tuple(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise SubmissionRefused("nan", f"the copy's {key} of {name} is not finite")


def _take_in(master: dict[str, Any], copy: Mapping[str, Any], share: float) -> None:
    """Replace each tensor of the master by the mean. The copy was checked; the master may have no optimizer yet."""
    master["drafter"] = _means(master["drafter"], copy["drafter"], tuple(copy["drafter"]), share)
    before = master.get("optimizer", {"state": {}})["state"]
    moments = {}
    for index, entries in copy["optimizer"]["state"].items():
        old = before.pop(index, {})
        step = torch.maximum(torch.as_tensor(entries["step"]), torch.as_tensor(old.get("step", 0.0)))
        moments[index] = {"step": step} | _means(old, entries, _MOMENTS, share)
    master["optimizer"] = {"state": moments, "param_groups": _entries(copy["optimizer"])["param_groups"]}
    master["steps"] = max(copy["steps"], master.get("steps", 0))
    master["noise"] = copy["noise"].clone()


def _means(
    master: dict[str, Any], copy: Mapping[str, Any], names: tuple[str, ...], share: float
) -> dict[str, torch.Tensor]:
    """New tensors, in the copy's order, which the optimizer counts by. The master's go one by one as they come."""
    means = {}
    for name in names:
        old, new = master.pop(name, None), copy[name].detach()
        new = new.to(torch.float32, copy=True)
        means[name] = new if old is None or share == 1 else torch.lerp(old.to(torch.float32), new, share)
    return means


def _entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same tensors in new dicts and lists."""

    def renewed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: renewed(item) for key, item in value.items()}
        return [renewed(item) for item in value] if isinstance(value, list) else value

    return cast("dict[str, Any]", renewed(state))

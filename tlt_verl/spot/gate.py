"""The gate before publication: a candidate serves only if it would have been accepted as much as the serving drafter.

Knows drafter weights, held-out samples of the current policy and the replay that measures accept length on them. It
publishes nothing itself, trains nothing, and knows neither the scheduler nor the coordinator: the caller acts on the
verdict. The two drafters are measured on the same samples, so that which samples were held out decides nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tlt_verl.drafter.checkpoint import weights_problem, write_drafter
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample
from tlt_verl.drafter.replay import replay
from tlt_verl.drafter.trainer import SharedTensors

KINDS = ("missing", "unknown", "shape", "dtype", "nan", "no_data", "accept_len")
"""Kinds of rejection, in the order in which they are looked for. Infinity counts as `nan`."""


@dataclass(frozen=True)
class Verdict:
    """What the gate decided about one candidate.

    Args:
        published: whether the candidate may serve.
        reason: one sentence, with the tensor or the figures that decided.
        kind: of `KINDS` where it was rejected, "" where it was published.
        candidate_accept_len: tokens per verification (`tlt_verl.drafter.replay`); None where it was not measured.
        serving_accept_len: the same of the serving drafter; None without one, or where it was not measured.
        tokens: held-out tokens that both were measured on.
    """

    published: bool
    reason: str
    kind: str = ""
    candidate_accept_len: float | None = None
    serving_accept_len: float | None = None
    tokens: int = 0


class Gate:
    """Judges candidates and counts what it decided.

    Args:
        num_steps: drafts of one verification, as the engine serves them (a chain, topk 1).
        margin: tokens per verification that a candidate must gain over the serving drafter. 0: it must not lose any.
        least: tokens per verification that a candidate must reach where nothing is being drafted yet; below it, drafts
            cost more than they bring.
        dtype: of the replay, see `tlt_verl.drafter.replay.replay`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, num_steps: int, margin: float = 0.0, *, least: float = 1.2, dtype: torch.dtype | None = None
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: got {num_steps}, takes 1 or more")
        if not margin >= 0:
            raise ValueError(f"margin: got {margin}, takes 0 or more tokens per verification")
        if not 1 <= least <= num_steps + 1:
            raise ValueError(f"least: got {least}, takes 1 to num_steps + 1 = {num_steps + 1} tokens per verification")
        self.num_steps, self.margin, self.least, self.dtype = num_steps, margin, least, dtype
        self.published = 0
        self.reasons: Counter[str] = Counter()
        self._folder: Path | None = None
        self._keep = 0

    @property
    def rejected(self) -> int:
        """Candidates rejected so far; `reasons` has them by kind."""
        return self.reasons.total()

    def metrics(self) -> dict[str, float]:
        """The counters since the gate was made, under the names of verl's logger."""
        return {"tlt/gate/published": float(self.published), "tlt/gate/rejected": float(self.rejected)}

    def keep_rejected(self, folder: Path, keep: int = 2) -> None:
        """Keep the last rejected candidates, each in a folder of its own below `folder`.

        A kept one is `rejected-<number>/` with `model.safetensors`, the drafter's `config.json` and `verdict.json`;
        numbers go on where an earlier run stopped. An error of the disk is raised by `judge`, after it has counted.

        Raises:
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep: got {keep}, takes 1 or more")
        self._folder, self._keep = folder, keep

    def judge(
        self,
        candidate_weights: Mapping[str, torch.Tensor],
        serving_weights: Mapping[str, torch.Tensor] | None,
        config: Mapping[str, Any],
        shared: SharedTensors,
        samples: Sequence[Sample],
    ) -> Verdict:
        """Decide about one candidate.

        Args:
            candidate_weights: the drafter's trainable tensors by name, shapes as in `tlt_verl.drafter.eagle`.
            serving_weights: those in use; None where nothing is being drafted (the drafter is untrained).
            config: the drafter's `config.json`, of both.
            shared: the current target's embedding, head and hot vocabulary.
            samples: held out from training, sampled by the current policy.

        Raises:
            RuntimeError: the serving weights do not fit `config`: such weights cannot be serving.
            OSError: a rejected candidate could not be kept.
        """
        judging = self.judging(candidate_weights, serving_weights, config, shared, samples)
        while True:
            try:
                next(judging)
            except StopIteration as end:
                return end.value

    def judging(
        self,
        candidate_weights: Mapping[str, torch.Tensor],
        serving_weights: Mapping[str, torch.Tensor] | None,
        config: Mapping[str, Any],
        shared: SharedTensors,
        samples: Sequence[Sample],
    ) -> Generator[None, None, Verdict]:
        """As `judge`, in steps that each replay one sample: one who has to yield goes on later, or closes it.

        Nothing is counted before the verdict, which the generator returns.
        """
        verdict = yield from self._decide(candidate_weights, serving_weights, config, shared, samples)
        if verdict.published:
            self.published += 1
            return verdict
        self.reasons[verdict.kind] += 1
        if self._folder is not None:
            _keep(self._folder, self._keep, candidate_weights, config, shared.hot, verdict)
        return verdict

    def _decide(
        self,
        candidate_weights: Mapping[str, torch.Tensor],
        serving_weights: Mapping[str, torch.Tensor] | None,
        config: Mapping[str, Any],
        shared: SharedTensors,
        samples: Sequence[Sample],
    ) -> Generator[None, None, Verdict]:
        if problem := weights_problem(candidate_weights, config):
            return Verdict(False, f"the candidate's {problem.text}", problem.kind)
        candidate = yield from self._replay(candidate_weights, config, shared, samples)
        if candidate.verifications == 0:
            return Verdict(False, f"none of the {len(samples)} held-out samples has a token to draft", "no_data")
        if serving_weights is None:
            bar, serving_len, what = self.least, None, "the least that pays"
        else:
            serving_len = (yield from self._replay(serving_weights, config, shared, samples)).accept_len
            bar, what = serving_len + self.margin, "the serving drafter's"
            what += f" and a margin of {self.margin:g}" if self.margin else ""
        published = candidate.accept_len >= bar
        reason = (
            f"accept length {candidate.accept_len:.4f} is {'not ' if published else ''}below {bar:.4f}, {what}, "
            f"on {candidate.tokens} held-out tokens"
        )
        kind = "" if published else "accept_len"
        return Verdict(published, reason, kind, candidate.accept_len, serving_len, candidate.tokens)

    def _replay(
        self,
        weights: Mapping[str, torch.Tensor],
        config: Mapping[str, Any],
        shared: SharedTensors,
        samples: Sequence[Sample],
    ) -> Generator[None, None, _Sums]:
        drafter = EagleDrafter.from_weights(config, weights).to(shared.embed.device)
        sums = _Sums(0, 0)
        for sample in samples:
            part = replay(drafter, shared, [sample], self.num_steps, dtype=self.dtype)
            sums = _Sums(sums.tokens + part.tokens, sums.verifications + part.verifications)
            yield
        return sums


class _Sums(NamedTuple):
    """What a drafter did on the samples."""

    tokens: int
    verifications: int

    @property
    def accept_len(self) -> float:
        return self.tokens / self.verifications if self.verifications else float("nan")


def _keep(
    folder: Path,
    keep: int,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    hot: torch.Tensor | None,
    verdict: Verdict,
) -> None:
    """Write a rejected candidate under a temporary name, rename it, and remove the oldest behind the last `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = _kept(folder)
    number = _number(kept[-1]) + 1 if kept else 1
    written = folder / f".rejected-{number:06d}"
    shutil.rmtree(written, ignore_errors=True)  # of a run that died while it wrote
    written.mkdir()
    write_drafter(written, config, weights, hot)
    (written / "verdict.json").write_text(json.dumps(asdict(verdict), indent=2), encoding="utf-8")
    written.rename(folder / f"rejected-{number:06d}")
    for old in _kept(folder)[:-keep]:
        shutil.rmtree(old)


def _kept(folder: Path) -> list[Path]:
    """The kept candidates, oldest first."""
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"rejected-\d+", path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])

"""Two workers whose copies are averaged, against one worker, at equal total tokens.

The real trainer and the real master, on a made target: a fixed Markov chain of order 2 over 100 tokens, whose features
are a fixed function of the last two tokens and whose head gives the chain's own probabilities. Seeds are fixed, so a
result is the same in every run on one machine.

Averaging halves the number of steps in a row, and lessens the noise of a step. What it costs hangs on which of the two
holds the loss up. Measured here, 1,500 steps in all, loss of two over loss of one:

    tokens a step   learning rate           in rounds   leaving at random   a master that forgets
    62              4e-3                    +0.0%       -0.2%               +2.3%
    62              6e-3                    -1.0%       -1.6%               +2.7%
    186             6e-3                    +1.1%       +0.8%               +3.1%
    186             3e-3                    +3.4%       +2.8%               +3.5%
    186             1.5e-3                  +4.5%       +3.9%               +4.0%
    186             3e-3, the one's 1.5e-3  +1.2%       +0.7%               +1.4%

So two workers are worth one of twice the tokens a second where steps are small or the rate is high. Where the loss
still falls with every step they need twice the rate (the last row; `lr_scale` of the trainer), or cost more than the 3%
that is asked for. The test is the first row, with a bound of 1.6%: other moments of leaving have given up to +0.8%, and
it sees a master that throws away what the other worker learnt (+2.3%) and half the tokens (+2.5%), which a bound of 3%
would let pass.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tlt_verl.drafter.checkpoint import Checkpoint
from tlt_verl.drafter.eagle import drafter_config
from tlt_verl.drafter.loss import eagle_loss
from tlt_verl.drafter.model import EagleDrafter
from tlt_verl.drafter.packing import Sample, pack
from tlt_verl.drafter.trainer import DrafterTrainer, SharedTensors, TrainerSettings
from tlt_verl.spot.coordination import Coordination

pytestmark = pytest.mark.slow

V, H, T = 100, 32, 32
SEQUENCES = 2  # of a step
TOKENS = SEQUENCES * (T - 1)
STEPS = 1500  # of the one worker, and of two together
EVERY = 25  # steps between two averages
BOUND = 0.016
SIZES = {"hidden_size": H, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = drafter_config({"architectures": ["LlamaForCausalLM"], "vocab_size": V, "rms_norm_eps": 1e-5, **SIZES})


class World(NamedTuple):
    """The chain: embedding and head [V, H], and the two matrices [H, H] that make features."""

    embed: torch.Tensor
    head: torch.Tensor
    now: torch.Tensor
    before: torch.Tensor

    def features(self, tokens: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """[..., H] of tokens and the tokens before them, int64 [...]."""
        return torch.tanh(self.embed[tokens] @ self.now + self.embed[previous] @ self.before)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small lose time on a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def world() -> World:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(rows, H, generator=generator)

    return World(normal(V, 1.0), normal(V, 1.0), normal(H, 0.8 * H**-0.5), normal(H, 0.6 * H**-0.5))


def samples(count: int, seed: int) -> list[Sample]:
    """Sequences of T tokens, drawn from the chain."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (count, 2), generator=generator)
    while tokens.shape[1] < T:
        last = world().features(tokens[:, -1], tokens[:, -2])
        drawn = torch.multinomial((last @ world().head.T).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn], dim=1)
    previous = torch.cat([torch.zeros(count, 1, dtype=torch.int64), tokens[:, :-1]], dim=1)
    features = world().features(tokens, previous)
    return [Sample(tokens[i], features[i], 2) for i in range(count)]


@cache
def packs() -> list[list[Sample]]:
    """What a step learns from. Nothing is seen twice: the loss on held-out samples is the loss."""
    drawn = samples(SEQUENCES * STEPS * 2, seed=1)
    return [drawn[at : at + SEQUENCES] for at in range(0, len(drawn), SEQUENCES)]


def trainer(seed: int) -> DrafterTrainer:
    torch.manual_seed(0)
    shared, settings = SharedTensors(world().embed, world().head), TrainerSettings(dtype="float32", lr=4e-3)
    return DrafterTrainer(EagleDrafter(CONFIG), shared, settings, seed=seed)


@torch.no_grad()
def held_out_loss(state: dict[str, Any]) -> float:
    """The trainer's loss on samples that nobody learns from."""
    drafter = EagleDrafter(CONFIG)
    drafter.load_state_dict(state["drafter"])
    batch = pack(samples(200, seed=2))
    predicted = drafter(world().embed[batch.embedding_tokens], batch.features, batch.lengths)
    settings = TrainerSettings()
    weights = {"feature_weight": settings.feature_weight, "ce_weight": settings.ce_weight}
    return eagle_loss(predicted, batch.wanted, world().head, batch.mask, **weights).loss.item()


class Worker:
    """Trains a copy of the master in windows."""

    def __init__(self, master: Coordination, number: int, data: Iterator[list[Sample]]) -> None:
        self._master, self._data, self._trainer = master, data, trainer(seed=number)
        self._base, self.tokens = 0, 0

    def begin(self) -> None:
        given = self._master.fetch(-1, 0)
        self._base, self.tokens = given["version"], 0
        self._trainer.load_state_dict(self._trainer.state_dict() | given["state"])

    def step(self) -> None:
        self.tokens += self._trainer.step(next(self._data)).tokens

    @property
    def overlapped(self) -> bool:
        """Whether another copy was merged since this one began."""
        return self._master.version > self._base

    def end(self, forgets: bool = False) -> None:
        if self.tokens:
            base = self._master.version if forgets else self._base
            self._master.merge(base, self._trainer.state_dict(copies=False), self.tokens)


def untrained() -> Coordination:
    weights = trainer(0).weights(torch.float32)
    return Coordination(Checkpoint(Path("start"), CONFIG, weights, None, None, 0), serves=False)


@cache
def alone(steps: int, first: int = 0) -> float:
    """The loss after one worker's steps, from this pack on."""
    training = trainer(0)
    for members in packs()[first : first + steps]:
        training.step(members)
    return held_out_loss(training.state_dict())


def in_rounds(every: int) -> float:
    """Two workers that begin together and are averaged after `every` steps, until both have done half of them all."""
    master = untrained()
    workers = [Worker(master, number, iter(packs()[number:STEPS:2])) for number in range(2)]
    for _ in range(STEPS // 2 // every):
        for worker in workers:
            worker.begin()
        for worker in workers:
            for _ in range(every):
                worker.step()
            worker.end()
    return held_out_loss(master.state())


def leaving(seed: int, forgets: bool = False) -> tuple[float, dict[str, int]]:
    """Two workers that come and go at random, until as many tokens are merged as one worker's steps have.

    In each tick of time a worker that trains makes a step. Its window lasts 0 to 39 ticks (with none, it contributes
    nothing) and the pause behind it 0 to 19, so copies overlap in every way and by different amounts. In one of ten
    windows the worker dies, and what it learnt is lost with it.

    Args:
        forgets: the negative control: every copy replaces the master, and what was merged since its base is lost.
    """
    chance, master, data = random.Random(seed), untrained(), iter(packs())
    workers = [Worker(master, number, data) for number in range(2)]
    left, trains = [0, chance.randrange(20)], [False, False]
    counts = {"windows": 0, "empty": 0, "lost": 0, "overlapped": 0}
    while master.tokens < STEPS * TOKENS:
        for i, worker in enumerate(workers):
            if left[i] > 0:
                left[i] -= 1
                if trains[i]:
                    worker.step()
                continue
            if trains[i]:
                counts["windows"] += 1
                counts["empty"] += worker.tokens == 0
                counts["overlapped"] += worker.overlapped
                if chance.random() < 0.1:
                    counts["lost"] += 1
                else:
                    worker.end(forgets)
            else:
                worker.begin()
            trains[i] = not trains[i]
            left[i] = chance.randrange(40 if trains[i] else 20)
    return held_out_loss(master.state()), counts


def over_one(loss: float, what: str) -> float:
    """A loss over the one worker's, less 1; printed."""
    excess = loss / alone(STEPS) - 1
    print(f"\n{what}: loss {loss:.4f}, one worker's {alone(STEPS):.4f}: {excess:+.2%}")
    return excess


def test_two_averaged_workers_learn_what_one_learns() -> None:
    assert over_one(in_rounds(EVERY), f"two workers, averaged every {EVERY} steps") < BOUND


@pytest.mark.parametrize("seed", [0, 1])
def test_workers_that_leave_at_random_moments_do_not_spoil_it(seed: int) -> None:
    loss, counts = leaving(seed)
    assert over_one(loss, f"two workers that come and go, {counts}") < BOUND
    assert counts["empty"] > 0 and counts["lost"] > 0 and counts["overlapped"] > 20, "nothing left at random"


def test_a_master_that_forgets_and_half_the_tokens_are_seen() -> None:
    """The negative controls: the bound is one that a wrong average does not meet."""
    assert over_one(leaving(0, forgets=True)[0], "every copy replaces the master") > BOUND
    assert over_one(alone(STEPS // 2), "one worker, half the tokens") > BOUND

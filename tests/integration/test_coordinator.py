"""The spot coordinator as a real Ray actor: copies from several workers, servers that hang or die, and kill -9.

The servers are actors around a real `Subscriber` that only record what they are sent: what a real one does with it is
the publication's test. What these would catch: a wait without a bound, a version that is told twice, work that a death
takes along, tensors that do not survive Ray, and a disk that stops training.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import RayError
from small_trainer import CONFIG, H, sample, trainer

from tlt_verl.drafter.checkpoint import CheckpointWriter, latest, load_checkpoint
from tlt_verl.spot.coordinator import create
from tlt_verl.spot.process import upstream
from tlt_verl.spot.subscriber import Subscriber

pytestmark = pytest.mark.slow

REPORT = {"loss": 2.0, "ce": 1.5, "accept": 0.25}
HOT = torch.tensor([1, 4, 9])
ANSWER_S, HANGS_S, BEAT_S = 8.0, 60.0, 0.1
UP_S = 60.0  # that a killed actor may take to be back: a Python process that imports torch


@ray.remote(num_cpus=0)
class Server:
    """Asks as a replica's server does, records what it is sent, and answers as it is told."""

    def __init__(
        self, name: str, replica: str, reason: str | None = None, wait_s: float = 0.0, serves: int = 0
    ) -> None:
        self.name, self.reason, self.wait_s, self.awake = name, reason, wait_s, True
        self.received: list[tuple[int, dict, torch.Tensor | None]] = []
        self.subscriber = Subscriber(replica, self.receive, lambda: self.awake)
        self.subscriber.serves, self.beats, self.failures = serves, 0, 0

    async def receive(self, version: int, config: dict, weights: dict, hot: torch.Tensor | None) -> str | None:
        assert config == CONFIG
        self.received.append((version, {name: tensor.clone() for name, tensor in weights.items()}, hot))
        await asyncio.sleep(self.wait_s)
        return self.reason

    async def begin(self) -> None:
        self.asking = asyncio.create_task(self.ask_for_ever())

    async def ask_for_ever(self) -> None:
        while True:
            try:
                await self.subscriber.beat(ray.get_actor(self.name))
                self.beats += 1
            except (RayError, TimeoutError, ValueError):  # the coordinator is killed, or being started
                self.failures += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.subscriber.has_news.wait(), BEAT_S)

    async def wake(self, awake: bool) -> None:
        self.awake = awake

    async def seen(self) -> list[tuple[int, dict, torch.Tensor | None]]:
        return self.received

    async def beaten(self) -> int:
        return self.beats


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, namespace="tlt", log_to_driver=False)
    yield
    ray.shutdown()


class Jobs:
    """Begins coordinators with one start, and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.actors: list[Any] = []
        self.servers: list[Any] = []
        self.name = ""
        with CheckpointWriter(folder / "start") as writer:
            writer.save(CONFIG, trainer().weights(torch.bfloat16), None, version=0)

    def begin(self, own: Path | None = None) -> Any:
        self.name, start = f"{self.folder.name}-{time.monotonic_ns()}", self.folder / "start" / "latest"
        self.actors.append(create(self.name, folder=own or self.folder / "own", start=start, answer_s=ANSWER_S))
        return self.actors[-1]

    def serve(self, replica: str, **options: Any) -> Any:
        """A server that has asked: its start is not the coordinator's to wait for."""
        server = Server.remote(self.name, replica, **options)
        self.servers.append(server)
        ask(server.begin)
        heard_twice(server)
        return server

    def end(self) -> None:
        """End what was begun, and wait until the processes are gone, and their locks with them."""
        while self.servers:
            ray.kill(self.servers.pop())
        while self.actors:
            ray.kill(self.actors.pop())
        until(lambda: not processes(), "a killed coordinator lives")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(tmp_path)
    yield made
    made.end()


def trained(seed: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state after one more step, on a sample of this seed."""
    training = trainer(seed)
    if state is not None:
        training.load_state_dict(training.state_dict() | state)
    training.step([sample(seed)])
    return training.state_dict()


def ask(method: Any, *args: Any) -> Any:
    """The answer, from an actor that may be on its way back."""
    deadline = time.monotonic() + UP_S
    while True:
        try:
            return ray.get(method.remote(*args), timeout=UP_S)
        except RayError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def heard_twice(server: Any) -> None:
    """Wait until the coordinator knows what the server says of itself now."""
    before = ask(server.beaten)
    until(lambda: ask(server.beaten) >= before + 2, "the coordinator does not answer")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + UP_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(same, one, other)) if isinstance(one, list) else one == other


def processes() -> list[psutil.Process]:
    """The coordinators' processes, among this test's own children."""
    return [p for p in psutil.Process().children(recursive=True) if "SpotCoordinator" in command(p)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def kill_9() -> None:
    """Kill the one coordinator that runs."""
    (process,) = processes()
    process.send_signal(signal.SIGKILL)


def test_copies_are_averaged_and_go_back_to_trainers(jobs):
    """One object of Ray's store is given twice: nothing may write to it."""
    actor = jobs.begin()
    first = ask(actor.fetch)
    assert first["version"] == 0 and first["state"].keys() == {"drafter"}
    copies = [ray.put(trained(seed, first["state"])) for seed in (1, 2)]
    answers = [ask(actor.submit, str(i), 0, copies[i], tokens, REPORT) for i, tokens in ((0, 100), (1, 300), (0, 100))]
    assert [(a["version"], a["share"]) for a in answers] == [(1, 1.0), (2, 0.75), (3, 0.2)]
    assert answers[0].keys() == {"version", "share"}
    assert ask(actor.__ray_call__, lambda _: upstream()) == [], "the coordinator imports what it does not need"
    one, two = (trained(seed, first["state"]) for seed in (1, 2))
    assert same(ray.get(copies[0]), one) and same(ray.get(copies[1]), two)
    state = ask(actor.fetch, 2)["state"]
    for name, tensor in state["drafter"].items():
        torch.testing.assert_close(tensor, 0.4 * one["drafter"][name] + 0.6 * two["drafter"][name], rtol=0, atol=1e-6)
    assert ask(actor.fetch, 3)["state"] is None
    training = trainer()
    training.load_state_dict(state)
    refused = ask(actor.submit, "0", 9, trained(3, state), 10, REPORT)
    assert refused["refused"] == "base" and "takes 0 to 3" in refused["reason"]
    metrics = ask(actor.metrics)
    assert (metrics["tlt/spot/merged"], metrics["tlt/spot/refused"], metrics["tlt/drafter/tokens"]) == (3, 1, 500)
    assert metrics["tlt/drafter/ce"] == 1.5 and metrics["tlt/spot/checkpoint_errors"] == 0


def test_what_takes_long_takes_only_what_nobody_else_wants(jobs):
    """A copy is handed in when the policy begins to compute, on the same cores."""
    actor = jobs.begin()

    def idle_threads() -> int:
        (process,) = processes()
        return sum(os.sched_getscheduler(thread.id) == os.SCHED_IDLE for thread in process.threads())

    until(lambda: len(processes()) == 1, "no coordinator")
    before = idle_threads()
    assert ask(actor.submit, "0", 0, trained(1, ask(actor.fetch)["state"]), 100, REPORT)["version"] == 1
    assert idle_threads() > before


def test_a_publication_reaches_every_server_and_who_rejects_it_is_named(jobs):
    actor = jobs.begin()
    takes, rejects = jobs.serve("0"), jobs.serve("1", reason="the captured graphs have no room")
    weights = trainer(1).weights(torch.bfloat16)
    begin = time.monotonic()
    answer = ask(actor.publish, "0", weights, HOT, 2.5)
    print(f"\na publication took {time.monotonic() - begin:.2f} s")
    assert answer == {"version": 2, "rejected": {"1": "the captured graphs have no room"}, "serves": True}
    for server in (takes, rejects):
        heard_twice(server)
        ((version, received, hot),) = ask(server.seen)  # who has rejected it is not asked again
        assert version == 2 and same(received, weights) and torch.equal(hot, HOT)
    fetched = ask(actor.fetch, -1, 0)
    assert fetched["serving_version"] == 2 and same(fetched["serving"], weights) and torch.equal(fetched["hot"], HOT)
    assert torch.equal(ask(actor.choose_hot, torch.tensor([2, 3])), HOT)
    assert ask(actor.publish, "0", weights, torch.tensor([2, 3]), 2.5)["refused"] == "hot"
    assert ask(actor.publish, "0", weights | {"fc.bias": torch.full((H,), torch.nan)}, HOT, 2.5)["refused"] == "nan"
    assert len(ask(takes.seen)) == 1


def test_a_drafter_that_nobody_takes_waits_for_who_wakes_and_who_is_dead_is_forgotten(jobs):
    actor = jobs.begin()
    weights = trainer(1).weights(torch.bfloat16)
    server, dies = jobs.serve("0"), jobs.serve("1")
    ask(server.wake, False)
    heard_twice(server)
    ray.kill(dies)
    begin = time.monotonic()
    answer = ask(actor.publish, "0", weights, HOT, 2.5)
    took_s = time.monotonic() - begin
    assert took_s < ANSWER_S + 5 and not answer["serves"] and answer["rejected"].keys() == {"0", "1"}
    assert answer["rejected"]["0"] == "its engine is asleep" and ask(actor.fetch)["serving_version"] == 1
    until(lambda: ask(actor.publish, "0", weights, HOT, 2.5)["rejected"].keys() == {"0"}, "the dead one is waited for")
    assert not ask(server.seen)
    ask(server.wake, True)
    until(lambda: ask(actor.fetch)["serving_version"] > 1, "who wakes does not get what waits")
    ((version, *_),) = ask(server.seen)
    assert version == ask(actor.fetch)["serving_version"]
    new = jobs.serve("2")
    until(lambda: [v for v, *_ in ask(new.seen)] == [version], "the new server did not get what serves")


def test_a_server_that_hangs_is_named_in_bounded_time(jobs):
    actor = jobs.begin()
    takes, hangs = jobs.serve("0"), jobs.serve("1", wait_s=HANGS_S)
    weights = trainer(1).weights(torch.bfloat16)
    begin = time.monotonic()
    pending = actor.publish.remote("0", weights, None, 2.5)
    until(lambda: len(ray.get(hangs.seen.remote())) == 1, "the publication has not begun")
    asked = time.monotonic()
    assert ask(actor.submit, "0", 0, trained(1), 10, REPORT)["version"] == 1  # nothing else waits for it
    others_s = time.monotonic() - asked
    answer = ray.get(pending, timeout=HANGS_S)
    took_s = time.monotonic() - begin
    print(f"\na server that hangs: publish took {took_s:.1f} s of {ANSWER_S:g} s and a call; others {others_s:.2f} s")
    assert took_s < ANSWER_S + 5 and others_s < ANSWER_S
    assert answer["rejected"] == {"1": f"no answer in {ANSWER_S:g} s"} and answer["serves"]
    begin = time.monotonic()
    assert ask(actor.publish, "0", weights, None, 2.5)["serves"]
    assert time.monotonic() - begin < ANSWER_S, "it is waited for again"
    assert [version for version, *_ in ask(takes.seen)] == [2, 3] and len(ask(hangs.seen)) == 1


def test_a_killed_coordinator_goes_on(jobs, tmp_path):
    """Three kills, at random moments of a worker that hands in one copy after the other."""
    actor, moments = jobs.begin(), random.Random(1)
    server = jobs.serve("0")
    state, base, tokens, told = ask(actor.fetch)["state"], 0, 0.0, 0
    serving = ask(actor.publish, "0", trainer(1).weights(torch.bfloat16), None, 2.5)["version"]
    back_s = []
    for _ in range(3):
        for _ in range(moments.randrange(2, 6)):
            state = trained(base, state)
            answer = ask(actor.submit, "0", base, state, 10, REPORT)
            assert answer["version"] > base and answer["share"] == 1
            base, tokens = answer["version"], ask(actor.metrics)["tlt/drafter/tokens"]
            time.sleep(moments.uniform(0, 0.05))
        told += 1
        kill_9()
        begin = time.monotonic()
        fetched = ask(actor.fetch, base, serving)
        back_s.append(time.monotonic() - begin)
        assert fetched["version"] >= base and fetched["state"] is None and fetched["serving_version"] <= serving
        assert ask(actor.metrics)["tlt/drafter/tokens"] >= tokens, "tokens went back"
        answer = ask(actor.submit, "0", base, state, 10, REPORT)
        assert answer["version"] > base and answer["share"] == 1
        assert same(ask(actor.fetch)["state"], state), "what the worker had is not the master"
        base = answer["version"]
        heard_twice(server)  # it asks the new one by itself
        answer = ask(actor.publish, "0", trainer(base).weights(torch.bfloat16), None, 2.5)
        assert answer["version"] > serving and answer["rejected"] == {}
        serving = answer["version"]
    versions = [version for version, *_ in ask(server.seen)]
    assert versions == sorted(set(versions)), "a version was sent twice"
    print(f"\nkilled {told} times; back after {', '.join(f'{s:.1f}' for s in back_s)} s; versions served {versions}")


def test_a_recovered_master_is_the_last_checkpoint(jobs, tmp_path):
    actor = jobs.begin()
    state = trained(1)
    ask(actor.submit, "0", 0, state, 10, REPORT)
    until(lambda: kept(tmp_path / "own") == 1, "no checkpoint of version 1")
    kill_9()
    fetched = ask(actor.fetch)
    assert fetched["version"] == 1 and same(fetched["state"], state)
    assert ask(actor.metrics)["tlt/drafter/loss"] == 2.0
    jobs.end()
    fresh = jobs.begin()  # another job in the same folder begins with its own start
    assert ask(fresh.fetch)["version"] == 0
    for version in range(3):
        ask(fresh.submit, "0", version, trained(2), 10, REPORT)
    until(lambda: kept(tmp_path / "own") == 3, "the second job's checkpoint is not kept")
    assert ask(fresh.metrics)["tlt/spot/checkpoint_errors"] == 0


def kept(folder: Path) -> int:
    """The master's version in the newest checkpoint; -1 without one."""
    found = latest(folder)
    return -1 if found is None else load_checkpoint(found).info["spot"]["version"]


def test_a_disk_that_takes_nothing_does_not_stop_training(jobs, tmp_path):
    folder = tmp_path / "file" / "own"
    folder.parent.write_text("not a folder")  # an error for root too, whom a read-only folder lets pass
    actor = jobs.begin(folder)
    state = None
    for version in range(3):
        state = trained(version, state)
        assert ask(actor.submit, "0", version, state, 10, REPORT)["version"] == version + 1
    until(lambda: ask(actor.metrics)["tlt/spot/checkpoint_errors"] >= 2, "errors are not counted")
    assert "Not a directory" in ask(actor.save, str(folder)) or "File exists" in ask(actor.save, str(folder))
    server, weights = jobs.serve("0"), trainer(1).weights(torch.bfloat16)
    given = [ask(actor.publish, "0", weights, HOT, 2.5)["version"] for _ in range(2)]
    kill_9()
    assert ask(actor.submit, "0", 3, state, 10, REPORT)["version"] == 4  # what is lost here, the worker has
    metrics = ask(actor.metrics)
    assert metrics["tlt/spot/recovered"] == 1 and metrics["tlt/drafter/tokens"] == 10
    heard_twice(server)
    published = ask(actor.publish, "0", weights, HOT, 2.5)
    assert published["serves"] and published["version"] > max(given), (
        "a version that the server has seen is given again"
    )
    assert [version for version, *_ in ask(server.seen)] == [*given, published["version"]]
    folder.parent.unlink()
    ask(actor.submit, "0", 4, state, 10, REPORT)
    until(lambda: kept(folder) == 5, "the disk is back, and has no checkpoint")


def test_a_run_is_resumed(jobs, tmp_path):
    """As verl does it: the checkpoint of one job is loaded into the coordinator of the next."""
    actor = jobs.begin()
    state = trained(1)
    ask(actor.submit, "0", 0, state, 10, REPORT)
    weights = trainer(1).weights(torch.bfloat16)
    jobs.serve("0")
    assert ask(actor.publish, "0", weights, HOT, 2.75)["serves"]
    assert ask(actor.save, str(tmp_path / "verl" / "tlt")) is None
    assert ask(actor.save, str(tmp_path / "verl" / "tlt")) is None  # a step that is saved again
    metrics = ask(actor.metrics)
    jobs.end()
    resumed = jobs.begin(tmp_path / "other")
    server = jobs.serve("0")
    assert "no config.json" in ask(resumed.load, str(tmp_path)) and ask(resumed.fetch)["version"] == 0
    assert ask(resumed.load, str(tmp_path / "verl" / "tlt")) is None
    ((version, received, hot),) = ask(server.seen)
    assert version == 2 and same(received, weights) and torch.equal(hot, HOT)
    fetched = ask(resumed.fetch)
    assert fetched["version"] == 1 and same(fetched["state"], state) and fetched["serving_version"] == 2
    assert ask(resumed.metrics) == metrics
    assert os.listdir(tmp_path / "verl" / "tlt") and ask(resumed.publish, "0", weights, HOT, 2.8)["version"] == 3
    assert ask(resumed.submit, "0", 1, trained(2, state), 10, REPORT)["share"] == 1

"""How the suite is run: in which order, on which worker, which tests by default, and what is seen of it meanwhile.

Two pytest-xdist workers take one part after the other: tests that share an engine or a run are one part, the long parts
come first. What measures time, or has to train a drafter on idle cores within a few steps, has the marker `alone` and
runs in a session of its own after them (`--alone`). Long forms have the marker `long` and run only when they are asked
for.

Knows test ids and markers. Knows nothing of what is tested.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

import engine_logs
import pytest

ENGINES = r"test_(greedy_lossless|tap|publication|switching)\.py"
PARTS = (
    r"test_spot_faults\.py",
    r"test_lossless_sampling\.py.*\[tree",
    r"test_lossless_sampling\.py.*\[switching",
    r"test_lossless_sampling\.py.*\[chain",
    rf"{ENGINES}.*\[tree",
    rf"{ENGINES}.*\[switching",
    rf"{ENGINES}",
    r"test_warmup\.py",
    r"test_lossless_sampling\.py",
    r"test_draft_chain_in_sglang\.py",
    r"test_verl_run\.py::test_two_replicas",
    r"test_verl_run\.py::test_a_tuned_run",
    r"test_leftovers_of_runs\.py",
    r"test_bad_input\.py",
    r"test_megatron_cpu\.py",
    r"test_coordinator\.py",
    r"test_averaging\.py",
    r"test_contracts\.py",
)
"""Ids of tests that go to one worker together, the longest part first. Other tests: by file, the slow ones first.

The first part waits for idle cores: beside it run engines, which compute with one thread; runs of verl come later.
"""

_SHOWN_EVERY_S = 30.0


def part_of(nodeid: str) -> str:
    """The part that a test belongs to: a pattern of `PARTS`, or the test's file."""
    return next((pattern for pattern in PARTS if re.search(pattern, nodeid)), nodeid.partition("::")[0])


# --- which tests, and in which order ----------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alone", action="store_true", help="only tests that have the marker alone, not all others")
    parser.addoption("--whole", action="store_true", help="tests with the marker alone among all others")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "alone", "long")):
            item.add_marker("quick")
    kept = [item for item in items if _is_asked_for(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    order = {pattern: place for place, pattern in enumerate(PARTS)}
    last = len(order)

    def place(item: pytest.Item) -> tuple[int, str]:
        part = part_of(item.nodeid)
        return order.get(part, last + (item.get_closest_marker("slow") is None)), part

    items[:] = sorted(kept, key=place)


def _is_asked_for(config: pytest.Config, item: pytest.Item) -> bool:
    """Long forms only where the marker is named; of the two sessions of scripts/test.sh, only this one's."""
    if item.get_closest_marker("long") and "long" not in config.option.markexpr:
        return False
    alone = item.get_closest_marker("alone") is not None
    return config.option.whole or alone == config.option.alone


# --- on which worker --------------------------------------------------------------------------------------------------


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One part after the other, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class PartScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid)

    config.option.loadscopereorder = False
    return PartScheduling(config, log)


# --- what is seen of it -----------------------------------------------------------------------------------------------


class Progress:
    """A line for each slow test that has ended, and every half a minute one that says what goes on.

    Args:
        config: of the session that reports, not of a worker of its own.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._began = config, time.monotonic()
        self._running: dict[str, float] = {}
        self._done = self._slow = self._failed = 0
        self._shown_at = self._began

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed += report.failed
        now = time.monotonic()
        if report.when == "teardown":
            self._done += 1
            took_s = now - self._running.pop(report.nodeid, now)
            if "slow" in report.keywords:
                self._slow += 1
                self._say(f"{took_s:6.1f} s  {report.nodeid}")
        if now - self._shown_at > _SHOWN_EVERY_S:
            running = ", ".join(nodeid.rpartition("::")[2] for nodeid in self._running)
            self._say(f"{self._failed} failed; now: {running}")

    def _say(self, text: str) -> None:
        self._shown_at = time.monotonic()
        minutes, seconds = divmod(int(self._shown_at - self._began), 60)
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(f"  {minutes:2d}:{seconds:02d}  {self._done:5d} done  {text}")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Progress(config), "suite_progress")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """Shows what engines and runs wrote beside a failure of a test that may have used one."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and item.get_closest_marker("slow"):
        report.sections += engine_logs.shown()

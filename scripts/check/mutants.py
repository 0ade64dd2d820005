#!/usr/bin/env python3
"""Twenty faults, put into the product one after the other: the tests must find each of them.

    python3 scripts/check/mutants.py --list
    python3 scripts/check/mutants.py --only gate-strict segment-checksum
    python3 scripts/check/mutants.py --tree ../clone --out results.json

A mutant is a small change of one file that a person could have made by mistake. The script writes it into a checkout,
runs the tests that could find it there with the checkout's own interpreter, and puts the file back, whatever happens.
The checkout must have its own environment (`scripts/setup.sh`), for the package is installed in editable mode: so the
processes that a test starts (engines, Ray's workers) import the changed file too. Nothing else should run there
meanwhile.

A mutant is found when a test fails, and only then: tests that are not there, or that cannot be collected, are an error,
and a timeout is none either. The exit status is 0 when all are found, 1 when one is not, 2 when something is wrong.

A table of results says little where the tests fail anyway: `--unchanged` runs the same tests without the mutants, and
wants them to pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

PASSED, FAILED, USAGE, NOTHING = 0, 1, 4, 5  # pytest's exit statuses
FOUND, NOT_FOUND, TIMEOUT, BROKEN = "found", "NOT FOUND", "TIMEOUT", "ERROR"
GRACE_S = 60.0  # that pytest has to end its engines when its time is up
COLLECT_S = 600.0

VERIFY, TAP, GATE, SPOT = "verification and sampling", "tap and segments", "gate and tuner", "worker and coordinator"

LOSSLESS = "tests/statistical/test_lossless_sampling.py"
FIRST_TOKENS = f"{LOSSLESS}::test_first_three_tokens_follow_the_exact_distribution"


class MutantError(Exception):
    """Something is wrong with the table or the checkout, not with the product."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One fault.

    Args:
        name: short and unique.
        area: of the product.
        file: that is changed, relative to the checkout.
        old: stands exactly once in the file.
        new: takes its place.
        breaks: what is wrong then, in one sentence.
        tests: pytest's arguments, the cheapest test that could find it first.
    """

    name: str
    area: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one mutant.

    Args:
        state: FOUND, NOT_FOUND, TIMEOUT or BROKEN.
        found_by: node id of the first test that failed.
        reason: why it failed, or why nothing can be said.
        seconds: that the tests took.
    """

    name: str
    state: str
    found_by: str = ""
    reason: str = ""
    seconds: float = 0.0


MUTANTS = (
    # --- verification and sampling
    Mutant(
        name="top-k-then-top-p",
        area=VERIFY,
        file="tlt_verl/engine/sampling.py",
        old="        probs = torch.softmax(scaled, dim=-1)\n",
        new="        probs = torch.softmax(scaled, dim=-1)\n"
        "        most = self._info.top_ks[request].long().clamp(max=probs.shape[1])[:, None]\n"
        "        least = probs.sort(-1, descending=True).values.gather(1, most - 1)\n"
        "        probs = torch.softmax(scaled.masked_fill(probs < least, -torch.inf), dim=-1)\n",
        breaks="Top-p cuts what top-k has left, and not the whole distribution as the engine does.",
        tests=(f"{FIRST_TOKENS}[chain 3x1@4-top_k=6, top_p=0.8, T=0.8]",),
    ),
    Mutant(
        name="draft-accepted-too-often",
        area=VERIFY,
        file="tlt_verl/engine/verify.py",
        old="        target = sample_reached(sample, candidates, *links, depth=verify_input.max_tree_depth)\n",
        new="        drafts = candidates.flatten().roll(-1)\n"
        "        either = lambda rows: torch.where((one := sample(rows)) == drafts[rows], one, sample(rows))\n"
        "        target = sample_reached(either, candidates, *links, depth=verify_input.max_tree_depth)\n",
        breaks="Two tokens are drawn at a node, and the draft is accepted where either of them is the draft.",
        tests=(f"{FIRST_TOKENS}[chain 3x1@4-T=1]",),
    ),
    Mutant(
        name="tree-without-its-mask",
        area=VERIFY,
        file="tlt_verl/cpu/sglang_attention.py",
        old="        if verify.tree_topk != 1:\n",
        new="        if verify.tree_topk > 2:\n",
        breaks="The nodes of a tree with two branches see each other as if they were a chain.",
        tests=(
            "tests/integration/test_greedy_lossless.py::"
            "test_every_token_is_the_one_without_speculation[tree 3x2@6-batch 8]",
        ),
    ),
    Mutant(
        name="third-sibling-missed",
        area=VERIFY,
        file="tlt_verl/engine/verify.py",
        old="                following = sibling[following]\n",
        new="                following = sibling[following] if following == child[node] else -1\n",
        breaks="The walk looks at two children of a node; behind the third, the bonus token is the one of no node.",
        tests=("tests/unit/test_sample_reached.py",),
    ),
    Mutant(
        name="no-catch-up",
        area=VERIFY,
        file="tlt_verl/engine/speculation.py",
        old="            self._catch_up.close(batch)\n",
        new="            self._catch_up.forget(batch.reqs)\n",
        breaks="A drafter that was skipped drafts again with a cache that lacks the tokens in between.",
        tests=(
            "tests/integration/test_switching.py::"
            "test_a_drafter_that_is_skipped_at_random_drafts_as_well_as_one_that_never_is",
        ),
    ),
    # --- tap and segments
    Mutant(
        name="tap-position-off-by-one",
        area=TAP,
        file="tlt_verl/engine/tap_batch.py",
        old="len(req.output_ids) - 1 for req in batch.reqs]",
        new="len(req.output_ids) for req in batch.reqs]",
        breaks="The hidden states of a verification are recorded under positions that are one too high.",
        tests=("tests/unit/test_worker_overlap.py", "tests/integration/test_tap.py"),
    ),
    Mutant(
        name="tap-logprobs-shifted",
        area=TAP,
        file="tlt_verl/engine/tap_batch.py",
        old="known[max(start - split, 0) : max(end - split, 0)]",
        new="known[max(start - split - 1, 0) : max(end - split - 1, 0)]",
        breaks="A recorded token has the log-prob of the token before it.",
        tests=("tests/integration/test_tap.py::test_log_probs_are_those_of_the_answer[chain 3x1@4]",),
    ),
    Mutant(
        name="tap-before-the-result",
        area=TAP,
        file="patches/sglang_batch_result.py",
        old="    return around(partial(original, scheduler), batch, result)\n",
        new="    around(lambda *given: None, batch, result)\n    return original(scheduler, batch, result)\n",
        breaks="The tap looks at a response before the accepted drafts are part of it, and leaves them out.",
        tests=(
            "tests/integration/test_tap.py::test_every_kept_token_is_recorded_once_under_its_position[chain 3x1@4]",
        ),
    ),
    Mutant(
        name="segment-checksum",
        area=TAP,
        file="tlt_verl/segments.py",
        old="        if fields[0] != number or checksum != _checksum(packed, *parts):\n",
        new="        if fields[0] != number:\n",
        breaks="A reader returns a torn segment.",
        tests=("tests/unit/test_segments.py", "tests/faults/test_segments_killed.py"),
    ),
    Mutant(
        name="recomputed-rows-recorded-again",
        area=TAP,
        file="tlt_verl/engine/tap.py",
        old="        start = stretch.start if recorded is None else max(stretch.start, recorded.end)\n",
        new="        start = stretch.start\n",
        breaks="What is computed again after a retraction is recorded a second time.",
        tests=("tests/unit/test_tap_core.py", "tests/integration/test_tap.py"),
    ),
    # --- gate and tuner
    Mutant(
        name="gate-strict",
        area=GATE,
        file="tlt_verl/spot/gate.py",
        old="        published = candidate.accept_len >= bar\n",
        new="        published = candidate.accept_len > bar\n",
        breaks="A candidate that loses nothing is rejected.",
        tests=("tests/unit/test_gate.py", "tests/unit/test_spot_worker_gate.py"),
    ),
    Mutant(
        name="replay-position-off-by-one",
        area=GATE,
        file="tlt_verl/drafter/replay.py",
        old="self.drafter.qkv(x, roots.row - roots.start + depth + 1)",
        new="self.drafter.qkv(x, roots.row - roots.start + depth)",
        breaks="The gate replays the drafts behind the first at positions that are one too low.",
        tests=("tests/unit/test_replay.py",),
    ),
    Mutant(
        name="tuner-never-tries",
        area=GATE,
        file="tlt_verl/engine/tuner.py",
        old="        if before is not None and before.done and not before.explores:\n",
        new="        if before is not None and before.done and before.explores:\n",
        breaks="The tuner tries another strategy only behind a try, so it never does.",
        tests=("tests/unit/test_tuner.py",),
    ),
    Mutant(
        name="no-doubt-after-a-change",
        area=GATE,
        file="tlt_verl/engine/beliefs.py",
        old="                known.variance += variance\n",
        new="                known.rate = None\n",
        breaks="After a new policy or drafter, the old accept lengths are believed as firmly as before.",
        tests=("tests/unit/test_tuner.py",),
    ),
    Mutant(
        name="nan-is-published",
        area=GATE,
        file="tlt_verl/engine/publication.py",
        old="            if not torch.isfinite(tensor).all():\n",
        new="            if torch.isinf(tensor).any():\n",
        breaks="A drafter with NaN in its weights comes to serve.",
        tests=("tests/integration/test_publication.py",),
    ),
    # --- worker and coordinator
    Mutant(
        name="shares-not-by-tokens",
        area=SPOT,
        file="tlt_verl/spot/coordination.py",
        old="        share = tokens / (others + tokens)\n",
        new="        share = 1 / (1 + sum(version > base for version, _ in self._history))\n",
        breaks="A copy's share in the average does not depend on how many tokens it was trained on.",
        tests=("tests/unit/test_coordination.py", "tests/integration/test_coordinator.py"),
    ),
    Mutant(
        name="publication-does-not-wait",
        area=SPOT,
        file="tlt_verl/spot/coordinator.py",
        old="        while (late := self._late(asked, version)) and time.monotonic() < end:\n",
        new="        while (late := self._late(asked, version)) and time.monotonic() > end:\n",
        breaks="A publication does not wait for the servers, and names those that would have taken the drafter.",
        tests=(
            "tests/integration/test_coordinator.py::"
            "test_a_publication_reaches_every_server_and_who_rejects_it_is_named",
        ),
    ),
    Mutant(
        name="copy-handed-in-twice",
        area=SPOT,
        file="tlt_verl/spot/worker.py",
        old='"accept": last.accept}\n        learner.tokens = 0\n',
        new='"accept": last.accept}\n',
        breaks="The tokens of a copy that was handed in are handed in again with the next one.",
        tests=("tests/unit/test_spot_worker.py", "tests/faults/test_yield.py"),
    ),
    Mutant(
        name="device-not-released",
        area=SPOT,
        file="tlt_verl/spot/worker.py",
        old="        self.learner.release()\n",
        new="",
        breaks="A worker that yields keeps the device's memory.",
        tests=("tests/faults/test_yield.py::test_nothing_makes_it_raise_and_it_trains_again[release]",),
    ),
    Mutant(
        name="one-quick-step-is-enough",
        area=SPOT,
        file="tlt_verl/spot/micro.py",
        old="larger if slowest * larger / self.rows < self._planned_s",
        new="larger if seconds * larger / self.rows < self._planned_s",
        breaks="A micro-step grows by the time of the last one, however slow those before it were.",
        tests=("tests/unit/test_micro.py",),
    ),
)


# --- the checkout


class Checkout:
    """A checkout with an environment of its own.

    Args:
        folder: of the checkout.

    Raises:
        MutantError: it has no environment, or that imports the package from elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._python = self.folder / ".venv" / "bin" / "python"
        self._environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # no bytecode of a mutant is left behind
        if not self._python.exists():
            raise MutantError(f"{self.folder} has no .venv: run its scripts/setup.sh")
        self._check_imports()

    def _check_imports(self) -> None:
        """The interpreter must import what is going to be changed, also from another folder."""
        names = {"tlt_verl": "tlt_verl", "tlt_verl.patches": "patches"}
        program = "import importlib.util as u, sys; print(*(u.find_spec(n).origin for n in sys.argv[1:]), sep='\\n')"
        command = [str(self._python), "-c", program, *names]
        done = subprocess.run(command, cwd="/", env=self._environment, capture_output=True, text=True)
        found = done.stdout.splitlines()
        wanted = [str(self.folder / part / "__init__.py") for part in names.values()]
        if found != wanted:
            raise MutantError(f"{self._python} imports {found or done.stderr[-500:]}, not {wanted}")

    def text_of(self, mutant: Mutant) -> str:
        """The file's text, as it is committed.

        Raises:
            MutantError: it has changes that are not committed, or the mutant's old text not exactly once.
        """
        path = self.folder / mutant.file
        if not path.is_file():
            raise MutantError(f"{mutant.name}: there is no {mutant.file}")
        command = ["git", "-C", str(self.folder), "status", "--porcelain", "--", mutant.file]
        if changes := subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip():
            raise MutantError(f"{mutant.name}: {mutant.file} has changes that are not committed ({changes})")
        text = path.read_text(encoding="utf-8")
        if (times := text.count(mutant.old)) != 1:
            raise MutantError(f"{mutant.name}: its old text stands {times} times in {mutant.file}")
        return text

    @contextlib.contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """The mutant is in the file for as long as the block takes; text and times are restored behind it."""
        path, text = self.folder / mutant.file, self.text_of(mutant)
        changed, before = text.replace(mutant.old, mutant.new), path.stat()
        compile(changed, mutant.file, "exec")
        try:
            path.write_text(changed, encoding="utf-8")
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def pytest(self, arguments: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
        """Pytest's exit status, None where it took too long, and what it printed."""
        command = [str(self._python), "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
            output.seek(0)
            return status, output.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it, so that it ends what its tests have started; kill it where it does not."""
    for number, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)


# --- one mutant


def try_mutant(checkout: Checkout, mutant: Mutant, timeout_s: float, unchanged: bool = False) -> Result:
    """Look whether the tests are there, run them with the mutant, and say which one failed first.

    Args:
        unchanged: run them without the mutant.
    """
    begun = time.monotonic()
    try:
        checkout.text_of(mutant)
        check_collected(checkout, mutant)
        begun = time.monotonic()
        with (
            contextlib.nullcontext() if unchanged else checkout.mutated(mutant),
            tempfile.TemporaryDirectory() as folder,
        ):
            report = Path(folder, "report.xml")
            options = ["-x", "-o", "junit_family=xunit1", f"--junitxml={report}"]
            status, output = checkout.pytest([*options, *mutant.tests], timeout_s)
            return judged(mutant.name, status, output, report, time.monotonic() - begun)
    except MutantError as error:
        return Result(name=mutant.name, state=BROKEN, reason=str(error), seconds=time.monotonic() - begun)


def check_collected(checkout: Checkout, mutant: Mutant) -> None:
    """Raise unless pytest finds all the tests in the checkout as it is."""
    status, output = checkout.pytest(["--collect-only", *mutant.tests], COLLECT_S)
    if status != PASSED:
        what = {USAGE: "a test is not there", NOTHING: "no test is there"}.get(status or 0, "they cannot be collected")
        raise MutantError(f"{mutant.name}: {what}: {_end_of(output)}")


def judged(name: str, status: int | None, output: str, report: Path, seconds: float) -> Result:
    """What pytest's exit status says. Only a test that failed is a finding."""
    if status == PASSED:
        return Result(name=name, state=NOT_FOUND, seconds=seconds)
    if status is None:
        return Result(name=name, state=TIMEOUT, reason=_end_of(output), seconds=seconds)
    failure = first_failure(report) if status == FAILED else None
    if failure is None:
        return Result(name=name, state=BROKEN, reason=f"pytest ended with {status}: {_end_of(output)}", seconds=seconds)
    return Result(name=name, state=FOUND, found_by=failure[0], reason=failure[1], seconds=seconds)


def first_failure(report: Path) -> tuple[str, str] | None:
    """Node id and message of the first test that failed, or whose fixture did; None where there is none."""
    for case in ElementTree.parse(report).iter("testcase"):
        for outcome in case:
            if outcome.tag in ("failure", "error"):
                return f"{case.get('file')}::{case.get('name')}", " ".join(outcome.get("message", "").split())[:500]
    return None


def _end_of(output: str) -> str:
    return " | ".join([line for line in output.splitlines() if line.strip()][-5:])[-500:]


# --- all of them


def chosen(names: Sequence[str], tests_file: Path | None) -> list[Mutant]:
    """The mutants of these names, all without names, with the tests that a file says they have.

    Raises:
        MutantError: there is no mutant of a name.
    """
    tests: dict[str, list[str]] = json.loads(tests_file.read_text(encoding="utf-8")) if tests_file else {}
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := sorted({*names, *tests} - known.keys()):
        raise MutantError(f"no mutant is called {', '.join(unknown)}; --list has the names")
    picked = [known[name] for name in names] or list(MUTANTS)
    return [Mutant(**asdict(m) | {"tests": tuple(tests.get(m.name, m.tests))}) for m in picked]


def show(mutants: Sequence[Mutant]) -> None:
    """Print what each of them is."""
    for mutant in mutants:
        print(f"{mutant.name}  ({mutant.area}, {mutant.file})\n    {mutant.breaks}")
        print("".join(f"    {test}\n" for test in mutant.tests), end="")


def try_all(checkout: Checkout, mutants: Sequence[Mutant], options: argparse.Namespace) -> list[Result]:
    """Try one after the other, print a row each, and write what is known so far after each."""
    results: list[Result] = []
    for mutant in mutants:
        results.append(result := try_mutant(checkout, mutant, options.timeout, options.unchanged))
        print(row(result, options.unchanged), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n", encoding="utf-8")
    return results


def row(result: Result, unchanged: bool) -> str:
    """Name, seconds, and what found the mutant, or what became of it."""
    found = result.found_by if result.state == FOUND else f"{result.state} {result.reason}".rstrip()
    if unchanged and result.state in (FOUND, NOT_FOUND):
        found = f"fails without it: {result.found_by}" if result.state == FOUND else "passes without it"
    return f"{result.name:32} {result.seconds:6.0f} s  {found}"


def own_checkout() -> Path:
    """The repository that this script lies in."""
    here = Path(__file__).resolve()
    return next((folder for folder in here.parents if (folder / "setup.cfg").is_file()), Path.cwd())


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=own_checkout(), help="checkout with its own .venv")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these mutants alone")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    parser.add_argument("--timeout", type=float, default=1200.0, metavar="S", help="of one mutant's tests")
    parser.add_argument("--tests-file", type=Path, help="JSON, name -> pytest's arguments in place of the table's")
    parser.add_argument("--unchanged", action="store_true", help="run the tests without the mutants: all must pass")
    return parser.parse_args()


def _terminated(number: int, frame: object) -> None:
    """Leave as from an interrupt, so that the file is put back."""
    sys.exit(128 + number)


def main() -> int:
    """Try the mutants; returns the exit status."""
    options = arguments()
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and pytest with it
    try:
        mutants = chosen(options.only, options.tests_file)
        if options.list:
            show(mutants)
            return 0
        results = try_all(Checkout(options.tree), mutants, options)
    except MutantError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    wanted = NOT_FOUND if options.unchanged else FOUND
    right = sum(result.state == wanted for result in results)
    print(f"{right} of {len(results)} {'pass without the mutant' if options.unchanged else 'are found'}")
    return 0 if right == len(results) else 2 if any(result.state == BROKEN for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""How the suite chooses and orders tests: a session of a few made-up tests, with the suite's own plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import suite

TESTS = {
    "test_quick.py": "def test_quick(): pass",
    "test_slow.py": "import pytest\n@pytest.mark.slow\ndef test_slow(): pass",
    "test_alone.py": "import pytest\n@pytest.mark.alone\n@pytest.mark.slow\ndef test_alone(): pass",
    "test_long.py": "import pytest\n@pytest.mark.slow\n@pytest.mark.long\ndef test_long(): pass",
    "test_averaging.py": "import pytest\n@pytest.mark.slow\ndef test_first(): pass",
}
ROOT = Path(__file__).resolve().parents[2]


def session(folder: Path, *arguments: str) -> list[str]:
    """The tests that ran, in order."""
    for name, text in TESTS.items():
        (folder / name).write_text(text + "\n")
    paths = os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-v", "-p", "suite", "-c", str(ROOT / "setup.cfg"), "--rootdir", "."]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name} | {"PYTHONPATH": paths}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments, "."],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return re.findall(r"::test_(\w+) PASSED", done.stdout) or re.findall(r"PASSED \S+::test_(\w+)", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        ((), ["first", "slow", "quick"]),
        (("--alone",), ["alone"]),
        (("-m", "quick"), ["quick"]),
        (("-m", "long"), ["long"]),
        (("--alone", "-m", "quick"), []),
        (("--whole",), ["first", "alone", "slow", "quick"]),
    ],
)
def test_which_tests_run_and_in_which_order(tmp_path, arguments, ran):
    assert session(tmp_path, *arguments) == ran


def test_two_workers_run_what_one_would(tmp_path):
    assert sorted(session(tmp_path, "-n", "2")) == ["first", "quick", "slow"]


def test_every_part_has_a_test():
    """A file that is renamed would lose its place without a word."""
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    for part in suite.PARTS:
        files = part.partition(r"\.py")[0]
        assert any(re.search(files, str(path)) for path in tests), part


def test_no_two_files_have_one_name():
    """pytest imports them as modules of one name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_tests_that_share_an_engine_go_to_one_worker():
    shape = "[chain 3x1@4-batch 8]"
    files = ("test_tap.py::test_a", "test_switching.py::test_b", "test_greedy_lossless.py::test_c")
    assert len({suite.part_of(f"tests/integration/{file}{shape}") for file in files}) == 1
    other = suite.part_of("tests/integration/test_tap.py::test_a[tree 3x2@6]")
    assert other != suite.part_of("tests/integration/test_tap.py::test_a[chain 3x1@4]")
    assert suite.part_of("tests/unit/test_x.py::test_y") == "tests/unit/test_x.py"

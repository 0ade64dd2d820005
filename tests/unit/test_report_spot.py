"""Spot training's table and plot: that the figures are the two logs', and that a log without them is refused."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tlt_verl.report.spot import compare, read_run, summary, table

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_spot.py"
ACCEPT_TRAINED, ACCEPT_FROZEN = (1.0, 2.0, 3.5, 4.25), (1.0, 1.125, 1.0, 1.25)
TRAINED_S = {"replica 0": (0, 1, 3, 3.5), "replica 1": (0, 0, 1, 2)}  # of 4 s idle in each step; yielding 0.25 s of it


def metric_line(step: int, accept_len: float, more: str = "") -> str:
    head = "\x1b[36m(TaskRunnerV1 pid=9)\x1b[0m "
    return f"{head}step:{step} - training/global_step:{step} - tlt/accept_len:{accept_len}{more}\n"


def events(lane: str, step: int, trained_s: float) -> list[str]:
    """Ten seconds of one lane: 6 s of generating, then 4 s idle, of which it trains `trained_s` and yields 0.25 s.

    As in a run, they carry the step of the weights with which it generates.
    """
    start_s = 1000 + 10 * step
    states = [(0, "generating"), (6, "idle")]
    if trained_s:
        states = [(0, "generating"), (6, "training"), (6 + trained_s, "yielding"), (6.25 + trained_s, "idle")]
    records = [{"t": start_s + at_s, "lane": lane, "state": state, "step": step - 1} for at_s, state in states]
    return [f"(TLTHttpServer pid=1) tlt-event {json.dumps(record)}\n" for record in records]


def trained_log() -> str:
    lines = ["step:0 - val-core/arithmetic/reward/mean@1:0.5 - tlt/accept_len:9.0\n"]
    for step in range(1, 5):
        for lane in ("replica 1", "replica 0"):
            lines += events(lane, step, TRAINED_S[lane][step - 1])
        drafter = f" - tlt/drafter/version:{step - 1} - tlt/drafter/loss:{1 / step} - tlt/spot/yield_ms_max:12.5"
        lines.append(metric_line(step, ACCEPT_TRAINED[step - 1], drafter))
    return "".join([*lines, *events("replica 0", 5, 0)[:1]])


def frozen_log(steps=(1, 2, 3, 4)) -> str:
    return "".join(metric_line(step, ACCEPT_FROZEN[step - 1]) for step in steps)


@pytest.fixture
def logs(tmp_path) -> tuple[Path, Path]:
    trained, frozen = tmp_path / "trained.log", tmp_path / "frozen.log"
    trained.write_text(trained_log())
    frozen.write_text(frozen_log())
    return trained, frozen


def words(text: str) -> str:
    return " ".join(text.split())


def figures(logs):
    return compare(read_run(logs[0]), read_run(logs[1]))


def test_each_step_has_both_runs_accept_length_and_each_replicas_seconds(logs):
    steps = figures(logs)
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert tuple(step.accept_trained for step in steps) == ACCEPT_TRAINED
    assert tuple(step.accept_frozen for step in steps) == ACCEPT_FROZEN
    assert steps[0].replicas["replica 0"] == {"generating": 6, "idle": 4}
    assert steps[2].replicas["replica 0"] == {"generating": 6, "training": 3, "yielding": 0.25, "idle": 0.75}
    assert list(steps[2].replicas) == ["replica 0", "replica 1"]


def test_the_table_has_a_row_a_step(logs):
    groups, heads, *rows = table(figures(logs)).splitlines()
    assert words(groups) == "accept length replica 0 replica 1"
    replica = "idle s trained s harvest "
    assert words(heads) == f"step trained frozen {replica * 2}version loss yield ms"
    assert words(rows[0]) == "1 1.00 1.00 4.00 0.00 0.0% 4.00 0.00 0.0% 0 1.000 12.5"
    assert words(rows[2]) == "3 3.50 1.00 4.00 3.00 75.0% 4.00 1.00 25.0% 2 0.333 12.5"
    assert len(rows) == 4
    assert {len(row) for row in rows} == {len(heads)}


def test_the_summary_leaves_the_first_two_steps_out_of_the_harvest(logs):
    assert summary(figures(logs)).splitlines() == [
        "accept length, drafter trained: 1.00 at step 1, 4.25 at step 4",
        "accept length, drafter frozen: 1.00 at step 1, 1.25 at step 4",
        "harvest after the first 2 steps: 59.4% (9.5 s of 16.0 s idle); the least is 25.0%, replica 1 in step 3",
    ]
    assert summary(figures(logs)[:2]).endswith("harvest after the first 2 steps: no replica was idle")


def test_what_one_log_lacks_is_a_dash_and_is_said(logs):
    logs[1].write_text(frozen_log(steps=(1, 3)))
    steps = figures(logs)
    assert steps[1].accept_frozen is None
    assert table(steps).splitlines()[3].split()[:3] == ["2", "2.00", "-"]
    assert read_run(logs[1]).complaint() == "no metric line of step 2"
    assert read_run(logs[0]).complaint() == ""
    logs[0].write_text(trained_log() + "tlt-event {\n")
    assert "1 tlt-event lines could not be read" in read_run(logs[0]).complaint()


def test_a_run_in_which_nothing_is_drafted_has_accept_length_one(logs):
    logs[1].write_text("".join(f"step:{n} - training/global_step:{n} - tlt/draft_share/off:1.0\n" for n in range(1, 5)))
    assert [step.accept_frozen for step in figures(logs)] == [1.0] * 4
    assert "drafter frozen: 1.00 at step 1, 1.00 at step 4" in summary(figures(logs))
    logs[1].write_text(metric_line(1, 1.0) + "step:2 - training/global_step:2 - tlt/draft_share/off:0.25\n")
    assert figures(logs)[1].accept_frozen is None


def test_a_step_without_events_has_its_metrics_all_the_same(logs):
    logs[0].write_text(trained_log() + metric_line(9, 4.5))
    assert words(table(figures(logs)).splitlines()[-1]) == "9 4.50 - - - - - - - - - -"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "there is no such log"),
        ("Traceback\n", "no metric line of a training step"),
        ("step:0 - val-core/arithmetic/reward/mean@1:0.5\n", "no metric line of a training step"),
        ("step:1 - training/global_step:1 - a:2\n", "no step has tlt/accept_len"),
    ],
)
def test_a_log_without_metrics_is_refused_by_name(tmp_path, text, why):
    path = tmp_path / "train.log"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=why) as error:
        read_run(path)
    assert str(path) in str(error.value)


def test_a_trained_run_without_events_is_refused_by_name(logs):
    trained, frozen = map(read_run, logs)
    with pytest.raises(ValueError, match=r"frozen\.log: no tlt-event lines"):
        compare(frozen, trained)


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_script_draws_both_runs_and_prints_the_table(logs, tmp_path):
    out = tmp_path / "spot.svg"
    result = run_script(*logs, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{table(figures(logs))}\n{summary(figures(logs))}\n"
    assert result.stderr == ""
    assert ElementTree.parse(out).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    drawn = out.read_text()
    for text in ("accept length", "drafter trained", "drafter frozen", "left idle", "yielding", "harvest, %", "step"):
        assert f"<!-- {text} -->" in drawn


def test_the_script_refuses_a_log_by_name(logs, tmp_path):
    out = tmp_path / "spot.svg"
    result = run_script(logs[0], tmp_path / "absent.log", "--out", out)
    assert result.returncode == 1
    assert result.stderr == f"{tmp_path / 'absent.log'}: there is no such log\n"
    assert run_script(logs[1], logs[0], "--out", out).stderr.startswith(f"{logs[1]}: no tlt-event lines")
    assert not out.exists()

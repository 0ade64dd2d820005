"""The log's reader and the live view: that a figure on the screen is the log's, and that nothing of the log is lost."""

import io

import pytest

from tlt_verl.report.console import COLUMNS, closing_table, generated_tokens, parse_step, plain, step_row
from tlt_verl.report.live import Watcher, watch
from tlt_verl.report.logprobs import table

STEP = (
    "\x1b[36m(TaskRunnerV1 pid=11)\x1b[0m step:3 - critic/score/mean:0.25 - response_length/mean:30.0 - "
    "training/global_step:3 - prompt_length/mean:10.0 - perf/total_num_tokens:400 - timing_s/gen:6.0 - "
    "timing_s/step:9.5 - num_turns/mean:np.float64(2.0) - tlt/accept_len:1.5 - odd:text - actor/loss:-1e-05\n"
)


def test_a_step_line_is_parsed_through_colours_ray_prefix_and_numpy_reprs():
    number, metrics = parse_step(STEP)
    assert number == 3
    assert metrics["critic/score/mean"] == 0.25
    assert metrics["num_turns/mean"] == 2.0
    assert metrics["actor/loss"] == -1e-05
    assert "odd" not in metrics


@pytest.mark.parametrize("line", ["", "step: 3", "global step:3 - a:1", "Training Progress: 0%"])
def test_other_lines_are_not_steps(line):
    assert parse_step(line) is None


def test_plain_keeps_text_in_parentheses_that_is_no_prefix():
    assert plain("(a note) stays\n") == "(a note) stays"


def test_tokens_per_s_counts_responses_only():
    _, metrics = parse_step(STEP)
    assert generated_tokens(metrics) == pytest.approx(300)
    speed = next(column for column in COLUMNS if column.head == "tokens/s")
    assert speed.value(metrics) == pytest.approx(50)


def test_a_missing_figure_is_a_dash_not_a_zero():
    _, metrics = parse_step(STEP)
    metrics.pop("tlt/accept_len")
    assert " - " in step_row(3, metrics) + " "
    assert "0.00" not in step_row(3, metrics)[40:52]


def test_closing_table_averages_each_column_over_the_steps_that_have_it():
    _, first = parse_step(STEP)
    second = {**first, "critic/score/mean": 0.75}
    second.pop("tlt/accept_len")
    mean = closing_table([(1, first), (2, second)]).splitlines()[-1]
    assert mean.split()[0] == "mean"
    assert "0.500" in mean
    assert "1.50" in mean


def test_the_log_gets_every_line_and_the_screen_one_row_a_step():
    log, shown = io.StringIO(), []
    lines = [
        "noise\n",
        "x Started a local Ray instance.\n",
        STEP,
        STEP.replace("step:3", "step:4"),
        "end without newline",
    ]
    watch(lines, Watcher(log, shown.append))
    assert log.getvalue() == "".join(lines)
    rows = [text for text in shown if text.strip().startswith(("3 ", "4 "))]
    assert len(rows) == 2
    assert "2 steps" in shown[-1]


def test_a_quiet_run_is_said_to_be_alive_and_no_more_often_than_that():
    now = [0.0]
    shown: list[str] = []
    watcher = Watcher(io.StringIO(), shown.append, clock=lambda: now[0])
    for second in range(1, 50):
        now[0] = float(second)
        watcher.heartbeat()
    assert [text.split(",")[0].strip() for text in shown] == ["... starting", "... starting"]


def test_a_stage_is_never_followed_by_an_earlier_one():
    """Ray prints the lines of two processes in any order."""
    now = [0.0]
    shown: list[str] = []
    watcher = Watcher(io.StringIO(), shown.append, clock=lambda: now[0])
    watcher.line("Training Progress:   0%|          | 0/4\n")
    watcher.line("(TLTHttpServer pid=1) server: rollout_mode=hybrid\n")
    now[0] = 30.0
    watcher.heartbeat()
    assert shown == ["  training, 0 s", "  ... training, 30 s"]


def test_a_validation_before_training_is_no_step():
    shown: list[str] = []
    watcher = Watcher(io.StringIO(), shown.append)
    watcher.line("step:0 - val-core/arithmetic/addition/reward/mean@1:0.5\n")
    assert not watcher.steps
    assert shown == ["  validation at step 0: reward 0.500"]


def test_no_step_is_said_and_fails():
    shown: list[str] = []
    watcher = Watcher(io.StringIO(), shown.append)
    watcher.line("Traceback\n")
    watcher.close()
    assert shown == ["no step was completed"]
    assert not watcher.steps


def test_logprob_table_shows_the_worst_step(tmp_path):
    keys = "training/global_step:1 - training/rollout_probs_diff_max:{} - training/rollout_probs_diff_mean:0.001 - "
    keys += "training/rollout_actor_probs_pearson_corr:{}\n"
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.log").write_text("step:1 - " + keys.format(0.5, 0.99) + "step:2 - " + keys.format(0.1, 0.999))
    worst = table([run]).splitlines()[-1]
    assert "5.00e-01" in worst
    assert "0.990000" in worst

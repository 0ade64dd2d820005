"""The report's figures: speed-ups, phases, means and errors, and the table that has them."""

import math
from pathlib import Path

import pytest
from report_logs import BASE_GEN_S, BASE_STEP_S, FAST_GEN_S, FAST_STEP_S, baseline, fast, metrics

from tlt_verl.report.estimates import difference, estimate, statistic_keys
from tlt_verl.report.figures import generation_speed_up, middle, phase_seconds, step_speed_up, tokens_speed_up
from tlt_verl.report.runs import Run
from tlt_verl.report.summary import cells, markdown

BASE, FAST = Run("base", Path("base"), baseline()), Run("fast", Path("fast"), fast())


def row(runs, place):
    heads, *rows = cells(runs, runs[0])
    return dict(zip(heads, rows[place], strict=True))


def test_speed_ups_are_the_baselines_seconds_over_the_runs_at_the_same_step():
    expected = {step: BASE_GEN_S[step - 1] / FAST_GEN_S[step - 1] for step in range(1, 7)}
    assert generation_speed_up(FAST, BASE) == expected == {1: 1, 2: 2, 3: 3, 4: 2.5, 5: 3, 6: 4}
    assert tokens_speed_up(FAST, BASE) == pytest.approx(expected), "responses have the same length here"
    assert step_speed_up(FAST, BASE)[5] == BASE_STEP_S[4] / FAST_STEP_S[4] == 1.5


def test_speed_ups_are_medians_over_all_and_over_the_last_five_steps():
    found = row([BASE, FAST], 1)
    assert found["gen speed-up"] == "2.75"  # of 1 2 3 2.5 3 4
    assert found["gen, last 5"] == "3.00"  # of 2 3 2.5 3 4
    assert found["step speed-up"] == "1.44"  # of 1 1.25 1.5 1.375 1.5 1.6
    assert found["step, last 5"] == "1.50"
    assert row([BASE, FAST], 0)["gen speed-up"] == "1.00"


def test_only_steps_that_both_have_are_compared():
    late = Run("late", Path("late"), {step: metrics(step, 6.0, 12.0) for step in (5, 6, 7)})
    assert generation_speed_up(late, BASE) == {5: 2.0, 6: 2.0}
    apart = Run("apart", Path("apart"), {9: metrics(9, 6.0, 12.0)})
    assert generation_speed_up(apart, BASE) == {}
    assert row([BASE, apart], 1)["gen speed-up"] == "-"


def test_the_table_has_what_the_log_has_and_dashes_for_the_rest():
    found = row([BASE, FAST], 1)
    assert (found["reward, first"], found["reward, last"], found["steps"]) == ("0.100", "0.600", "6")
    assert (found["length"], found["accept len"], found["gen s"], found["step s"]) == ("30.5", "2.75", "4.0", "16.0")
    assert found["tokens/s"] == "61.0"  # of 248/8 240/4 248/3 240/4 248/4 240/3: 31 60 82.7 60 62 80
    assert row([BASE, FAST], 0)["accept len"] == "-"
    bare = Run("bare", Path("bare"), {1: {"training/global_step": 1.0}})
    assert row([bare], 0) == dict.fromkeys(cells([bare], bare)[0], "-") | {"run": "bare", "steps": "1"}


def test_a_single_run_has_no_speed_ups():
    assert not any("speed-up" in head for head in cells([FAST], FAST)[0])
    assert "Speed-ups" not in markdown([FAST], FAST)


def test_markdown_is_one_line_a_run_also_with_a_bar_in_its_name():
    odd = Run("a|b", Path("x"), baseline())
    head, ruler, first, second, empty, words = markdown([odd, FAST], odd).rstrip("\n").split("\n")
    assert first.startswith("| a\\|b |")
    assert {len(line) for line in (head, ruler, second)} == {len(first)}
    assert empty == ""
    assert "Speed-ups are a|b's seconds over the run's" in words
    assert set(ruler) <= set("|:- ")


def test_phases_add_up_to_the_step_and_the_rest_is_other():
    seconds = phase_seconds(metrics(1, 8.0, 20.0))
    assert seconds["generation"] == 8.0
    assert seconds["old log-probs"] == 2.0
    assert seconds["weight sync"] == 1.0
    assert seconds["critic"] == 0.0
    assert seconds["other"] == 20.0 - 8.0 - 2.0 - 0.5 - 6.0 - 1.0
    assert sum(seconds.values()) == 20.0
    assert phase_seconds({"timing_s/gen": 3.0, "timing_s/step": 2.0})["other"] == 0.0, "timers that overlap"
    assert phase_seconds({"timing_s/gen": 3.0})["other"] == 0.0


def test_medians_of_few_steps():
    assert middle({}) is None
    assert middle({3: 1.0, 1: 5.0, 2: 3.0}, last=2) == 2.0
    assert middle({1: 4.0}, last=5) == 4.0


def test_standard_errors_are_of_the_mean():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.error == pytest.approx(math.sqrt(5 / 3 / 4))
    assert estimate([7.0]).error is None
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_a_difference_is_in_units_of_its_standard_error():
    first, second = {1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.5, 2: 2.7, 3: 3.6}
    found = difference(first, second)
    assert found.mean == pytest.approx(0.6)
    errors = math.hypot(estimate(list(first.values())).error, estimate(list(second.values())).error)
    assert found.in_errors == pytest.approx(0.6 / errors)
    assert found.paired_mean == pytest.approx(0.6)
    assert found.in_paired_errors == pytest.approx(0.6 / (0.1 / math.sqrt(3)))


def test_a_difference_without_an_error_is_not_measured_in_errors():
    assert difference({}, {1: 1.0}) is None
    constant = difference({1: 1.0, 2: 1.0}, {1: 2.0, 2: 2.0})
    assert (constant.mean, constant.in_errors, constant.in_paired_errors) == (1.0, None, None)
    apart = difference({1: 1.0, 2: 2.0}, {3: 1.0, 4: 2.0})
    assert (apart.in_errors, apart.paired_mean, apart.in_paired_errors) == (0.0, None, None)


def test_statistics_are_of_what_tells_how_a_run_learns():
    more = {
        "rollout_corr/kl": 0.1,
        "actor/kl_loss": 0.0,
        "actor/lr": 1.0,
        "critic/score/max": 1.0,
        "actor/entropy": 0.1,
    }
    run = Run("run", Path("run"), {1: metrics(1, 1.0, 2.0, more)})
    assert statistic_keys([run, BASE]) == [
        "critic/score/mean",
        "response_length/mean",
        "actor/entropy",
        "actor/kl_loss",
        "actor/ppo_kl",
        "rollout_corr/kl",
        "training/rollout_probs_diff_mean",
    ]

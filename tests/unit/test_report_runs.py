"""How the report reads runs: that both of verl's loggers give the same figures, and what is said of a broken log."""

import math
import time

import pytest
from report_logs import BASE_GEN_S, baseline, console, console_line, fast, metrics, write_events, write_log

from tlt_verl.report.runs import ReportError, read_run, read_runs
from tlt_verl.report.summary import markdown

EVENT = 'tlt-event {"t": %d, "lane": "replica 0", "state": "idle", "step": 1}\n'


def test_a_log_and_a_folder_that_has_it_are_the_same_run(tmp_path):
    folder = write_log(tmp_path / "base", console(baseline()))
    of_folder, of_file = read_run("a", folder), read_run("a", folder / "train.log")
    assert of_folder.steps == of_file.steps == baseline()
    assert not of_folder.notes
    assert of_folder.series("timing_s/gen") == dict(enumerate(BASE_GEN_S, 1))


def test_console_and_tensorboard_of_the_same_figures_give_the_same_table(tmp_path):
    logs = [write_log(tmp_path / "c" / name, console(run())) for name, run in (("base", baseline), ("fast", fast))]
    events = [write_events(tmp_path / "t" / name, run()) for name, run in (("base", baseline), ("fast", fast))]
    from_logs, from_events = read_runs(list(map(str, logs))), read_runs(list(map(str, events)))
    assert markdown(from_logs, from_logs[0]) == markdown(from_events, from_events[0])
    assert [run.steps.keys() for run in from_events] == [run.steps.keys() for run in from_logs]
    for logged, written in zip(from_logs, from_events, strict=True):
        for step, figures in logged.steps.items():
            assert written.steps[step] == pytest.approx(figures, rel=1e-6)
    assert not any(run.notes for run in from_events)


def test_a_validation_is_no_step_and_is_kept(tmp_path):
    key = "val-core/arithmetic/reward/mean@1"
    lines = console_line(0, {key: 0.125}) + console_line(1, metrics(1, 4.0, 9.0)) + console_line(2, {key: 0.5})
    run = read_run("run", write_log(tmp_path / "run", lines))
    assert list(run.steps) == [1]
    assert run.validation == {0: 0.125, 2: 0.5}
    steps = {0: {key: 0.125}, 1: metrics(1, 4.0, 9.0), 2: {key: 0.5}}
    assert read_run("run", write_events(tmp_path / "tb", steps)).validation == run.validation


def test_runs_are_named_by_argument_folder_or_file(tmp_path):
    first, second = write_log(tmp_path / "one", console(baseline())), write_log(tmp_path / "lr=2", console(fast()))
    names = [run.name for run in read_runs([str(first), str(second), f"mine={first}/train.log"])]
    assert names == ["one", "lr=2", "mine"]
    write_log(tmp_path, console(baseline()), "base.log")
    write_log(tmp_path, console(fast()), "fast.log")
    assert [run.name for run in read_runs([f"{tmp_path}/base.log", f"{tmp_path}/fast.log"])] == ["base", "fast"]
    with pytest.raises(ReportError, match=r"another run is called 'one', too.*NAME="):
        read_runs([str(first), f"one={second}"])
    odd = write_log(tmp_path / "a\x07b", console(baseline()))
    assert read_runs([str(odd)])[0].name == "a?b"


def test_a_resumed_log_takes_the_later_value_and_says_so(tmp_path):
    earlier = {step: metrics(step, 9.0, 20.0) for step in (1, 2, 3, 4, 5)}
    later = {step: metrics(step, 5.0, 20.0) for step in (3, 4)}
    run = read_run("run", write_log(tmp_path / "run", console(earlier) + EVENT % 1 + console(later) + EVENT % 2))
    assert run.series("timing_s/gen") == {1: 9.0, 2: 9.0, 3: 5.0, 4: 5.0, 5: 9.0}
    assert run.notes[0] == "steps 3-4 were logged more than once (a resumed run): the later values are taken"
    assert run.notes[1] == "step 5 was logged only before the run was resumed at step 3"
    assert run.notes[2].startswith("no timeline is drawn")
    assert not run.events


def test_event_files_of_a_resumed_run_are_taken_in_the_order_of_their_beginning(tmp_path):
    earlier = {step: metrics(step, 9.0, 20.0, {"only/before": 1.0}) for step in (1, 2, 3)}
    write_events(tmp_path / "run", earlier, ".z")
    time.sleep(0.01)
    write_events(tmp_path / "run", {3: metrics(3, 5.0, 20.0)}, ".a")
    run = read_run("run", tmp_path / "run")
    assert run.series("timing_s/gen") == {1: 9.0, 2: 9.0, 3: 5.0}
    assert "only/before" not in run.steps[3], "a step is of one attempt"
    assert run.notes == ("step 3 was logged more than once (a resumed run): the later values are taken",)


def test_missing_steps_are_named(tmp_path):
    some = {step: figures for step, figures in baseline().items() if step not in (1, 3, 4)}
    run = read_run("run", write_log(tmp_path / "run", console(some)))
    assert len(run.notes) == 1
    assert run.notes[0].startswith("no metrics of step 1, 3-4 (")
    assert "put both into one file" in run.notes[0]


def test_events_are_read_and_complaints_about_them_kept(tmp_path):
    run = read_run("run", write_log(tmp_path / "run", EVENT % 5 + console(baseline()) + "tlt-event {\n"))
    assert [event.t_s for event in run.events] == [5.0]
    assert run.notes == ("1 tlt-event lines could not be read: line 9 (cut off, or mixed with other output)",)


def test_figures_that_are_not_finite_are_left_out(tmp_path):
    odd = {
        1: metrics(1, 4.0, 9.0, {"training/rollout_actor_probs_pearson_corr": math.nan}),
        2: metrics(2, 4.0, math.inf),
    }
    run = read_run("run", write_log(tmp_path / "run", console(odd)))
    assert run.series("training/rollout_actor_probs_pearson_corr") == {}
    assert run.series("timing_s/step") == {1: 9.0}


def test_what_is_not_there_is_named_with_the_cure(tmp_path):
    for path in (tmp_path / "absent", tmp_path / "absent" / "train.log"):
        with pytest.raises(ReportError, match=r"there is no such file or folder; a report takes a log") as error:
            read_run("run", path)
        assert str(error.value).startswith(f"{path}: ")


def test_a_folder_without_a_run_says_where_runs_are(tmp_path):
    with pytest.raises(ReportError, match=r"no run in this folder; a report takes"):
        read_run("run", tmp_path)
    write_log(tmp_path / "b", console(baseline()))
    write_events(tmp_path / "a", baseline())
    with pytest.raises(ReportError, match=rf"there are runs in {tmp_path}/a, {tmp_path}/b$"):
        read_run("run", tmp_path)


def test_of_several_logs_none_is_guessed(tmp_path):
    write_log(tmp_path, console(baseline()), "one.log")
    assert list(read_run("run", tmp_path).steps) == [1, 2, 3, 4, 5, 6]
    write_log(tmp_path, console(baseline()), "two.log")
    with pytest.raises(ReportError, match=r"which of its logs\? Give one of one\.log, two\.log"):
        read_run("run", tmp_path)


@pytest.mark.parametrize("text", ["", "Traceback\n", console_line(0, {"val-core/a/reward/mean@1": 0.5})])
def test_a_log_without_a_training_step_says_what_to_look_for(tmp_path, text):
    folder = write_log(tmp_path / "run", text)
    with pytest.raises(ReportError, match=r"no metric line of a training step .* trainer\.logger") as error:
        read_run("run", folder)
    assert str(error.value).startswith(f"{folder / 'train.log'}: ")


def test_event_files_without_scalars_are_named(tmp_path):
    with pytest.raises(ReportError, match=r"have no scalars; verl writes them with tensorboard in trainer\.logger"):
        read_run("run", write_events(tmp_path / "empty", {}))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "events.out.tfevents.1.host").touch()
    with pytest.raises(ReportError, match=r"nothing: its TensorBoard event files have no scalars"):
        read_run("run", tmp_path / "nothing")
    with pytest.raises(ReportError, match=r"have no training step \(training/global_step\)"):
        read_run("run", write_events(tmp_path / "other", {1: {"loss": 1.0}}))


def test_event_files_that_end_within_a_record_are_read_up_to_it(tmp_path):
    (file,) = write_events(tmp_path / "run", baseline()).iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    run = read_run("run", file)
    assert list(run.steps) == [1, 2, 3, 4, 5, 6]
    assert "timing_s/update_weights" not in run.steps[6]
    file.write_bytes(b"no event file at all, but some text that is long enough for a header")
    with pytest.raises(ReportError, match="have no scalars"):
        read_run("run", file)

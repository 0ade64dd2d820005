"""The timeline: that spans, steps and harvest are the log's, and that a line which cannot be read is said."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tlt_verl.report.timeline import Event, Span, Timeline, harvest, overlap_s, ranges, read_events, seconds_table

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "plot_timeline.py"

# Step 3 lasts from 100 to 115, step 4 from 115 to the log's end at 120.
REPLICA_0 = [
    (100, "generating", 3),
    (106, "idle", 3),
    (106.5, "training", 3),
    (109.5, "yielding", 3),
    (109.75, "policy", 3),
    (114, "sync", 3),
    (115, "generating", 4),
    (120, "idle", 4),
]
REPLICA_1 = [(90, "starting", None), (100.5, "generating", 3), (109.5, "policy", 3), (114, "sync", 3)]
REPLICA_1 += [(115.25, "generating", 4)]
POLICY = [(99, "waiting", None), (109.75, "update", 3), (114, "waiting", 3)]


def event_text(t, lane, state, step):
    return "tlt-event " + json.dumps({"t": t, "lane": lane, "state": state, "step": step})


def lane_texts(lane, events):
    return [event_text(t, lane, state, step) for t, state, step in events]


def log_text() -> str:
    """What three processes wrote through one pipe: out of order, coloured, two events in one line, other output."""
    first, second, policy = lane_texts("replica 0", REPLICA_0), lane_texts("replica 1", REPLICA_1), POLICY
    lines = ["Training Progress:   0%", *(f"(TLTHttpServer pid=12) {text}" for text in second)]
    lines.append(f"\x1b[36m(TLTHttpServer pid=11)\x1b[0m {first[0]}")
    lines += [f"\x1b[36m(TLTHttpServer pid=11, ip=10.0.0.1)\x1b[0m INFO {text}\x1b[0m" for text in first[3:]]
    lines += lane_texts("policy", policy)
    lines += [first[1] + first[2] + "(TLTHttpServer pid=12) more", "step:3 - training/global_step:3 - a:1"]
    return "\n".join(lines) + "\n"


def timeline() -> Timeline:
    reading = read_events(log_text().splitlines())
    assert not reading.complaint()
    return Timeline(reading.events)


def test_every_event_is_read_through_colours_prefixes_and_shared_lines():
    reading = read_events(log_text().splitlines())
    assert not reading.unread
    assert reading.swallowed == 0
    expected = [("replica 0", *event) for event in REPLICA_0] + [("replica 1", *event) for event in REPLICA_1]
    expected += [("policy", *event) for event in POLICY]
    assert {(e.lane, e.t_s, e.state, e.step) for e in reading.events} == set(expected)
    assert len(reading.events) == len(expected)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('tlt-event {"t": 112.0, "lane": "replica 1", "sta', "cut off"),
        ("(TLTHttpServer pid=12) tlt-event", "cut off"),
        ("tlt-event 5", "cut off"),
        ('tlt-event {"t": 1, "lane": "repli(Worker pid=3) loaded\x1b[0m', "cut off"),
        (event_text(1, "replica 1", "resting", 1), "state is 'resting'"),
        (event_text(1, "replica 1", "update", 1), "state is 'update'"),
        (event_text(1, "policy", "training", 1), "state is 'training'"),
        (event_text(1, "replica 1 ", "idle", 1), "lane is 'replica 1 '"),
        (event_text("1", "replica 1", "idle", 1), "t is '1'"),
        (event_text(float("nan"), "replica 1", "idle", 1), "t is nan"),
        (event_text(True, "replica 1", "idle", 1), "t is True"),
        (event_text(1, "replica 1", "idle", "3"), "step is '3'"),
        ('tlt-event {"t": 1, "state": "idle", "step": 3}', "lane is None"),
    ],
)
def test_a_line_that_cannot_be_read_is_counted_and_said(line, why):
    good = event_text(2, "replica 1", "idle", 1)
    reading = read_events(["noise\n", line + "\n", good + "\n"])
    assert reading.events == [Event(2.0, "replica 1", "idle", 1)]
    assert [number for number, _ in reading.unread] == [2]
    assert "1 tlt-event lines could not be read: line 2 (" in reading.complaint()
    assert why in reading.complaint()


def test_a_torn_event_does_not_take_the_whole_one_behind_it_along():
    reading = read_events(['tlt-event {"t": 1, "lane": "re' + event_text(2, "replica 1", "idle", 1)])
    assert [event.t_s for event in reading.events] == [2.0]
    assert len(reading.unread) == 1


def test_many_unread_lines_are_all_counted_and_some_named():
    complaint = read_events(["tlt-event {"] * 9).complaint()
    assert complaint.startswith("9 tlt-event lines could not be read: line 1 (")
    assert complaint.endswith("and 4 more")


def test_events_that_ray_left_out_as_repetitions_are_counted():
    line = "\x1b[36m(TLTHttpServer pid=11)\x1b[0m " + event_text(1, "replica 1", "idle", 1)
    reading = read_events([line + "\x1b[32m [repeated 3x across cluster]\x1b[0m"])
    assert len(reading.events) == 1
    assert reading.complaint() == "2 tlt-event lines were left out by Ray; run with RAY_DEDUP_LOGS=0"


def test_a_lane_is_in_a_state_until_its_next_event_and_in_the_last_until_the_log_ends():
    assert timeline().lanes == ["replica 0", "replica 1", "policy"]
    assert timeline().spans("replica 1") == [
        Span(90, 100.5, "starting"),
        Span(100.5, 109.5, "generating"),
        Span(109.5, 114, "policy"),
        Span(114, 115.25, "sync"),
        Span(115.25, 120, "generating"),
    ]


def test_lanes_are_in_the_order_of_their_numbers():
    events = [Event(0.0, lane, "idle", 1) for lane in ("replica 10", "replica 2")] + [Event(1.0, "policy", "update", 1)]
    assert Timeline(events).lanes == ["replica 2", "replica 10", "policy"]


def test_steps_follow_one_another_without_gap_or_overlap():
    assert timeline().steps == [3, 4]
    assert timeline().step_window(3) == (100, 115)
    assert timeline().step_window(4) == (115, 120)
    assert timeline().is_last(4)
    assert not timeline().is_last(3)


def test_a_lane_that_learns_late_of_a_step_does_not_open_the_old_one_again():
    events = [
        Event(0.0, "replica 0", "idle", 1),
        Event(5.0, "replica 0", "idle", 2),
        Event(7.0, "replica 1", "idle", 1),
    ]
    late = Timeline([*events, Event(9.0, "replica 1", "idle", 3), Event(10.0, "replica 1", "idle", 3)])
    assert [late.step_window(step) for step in late.steps] == [(0, 5), (5, 9), (9, 10)]
    never_opened = Timeline([*events[1:], Event(10.0, "replica 0", "idle", 2)])
    assert never_opened.steps == [2]


def test_a_step_that_is_not_there_is_an_error_that_names_those_which_are():
    with pytest.raises(ValueError, match="no step 9: the events have steps 3-4"):
        timeline().step_window(9)
    with pytest.raises(ValueError, match="no step 1: no event names a step"):
        Timeline([Event(0.0, "replica 0", "idle", None), Event(1.0, "replica 0", "idle", None)]).step_window(1)
    with pytest.raises(ValueError, match="no events"):
        Timeline([])


def test_seconds_of_a_step_add_up_to_its_length():
    seconds = timeline().seconds(3)
    assert seconds == {
        "replica 0": {"generating": 6, "idle": 0.5, "training": 3, "yielding": 0.25, "policy": 4.25, "sync": 1},
        "replica 1": {"starting": 0.5, "generating": 9, "policy": 4.5, "sync": 1},
        "policy": {"waiting": 10.75, "update": 4.25},
    }
    assert [sum(of_lane.values()) for of_lane in seconds.values()] == [15, 15, 15]


def test_harvest_is_training_over_all_idle_time_and_none_where_nothing_was_idle():
    assert timeline().harvest(3) == {"replica 0": 0.8, "replica 1": None}
    assert harvest({"idle": 2.0}) == 0.0
    assert harvest({"training": 2.0, "generating": 9.0}) == 1.0


def test_the_table_has_a_row_a_lane_and_says_what_is_unknown():
    rows = [" ".join(line.split()) for line in seconds_table(timeline(), 3).splitlines()]
    head = "lane generating idle training yielding policy sync starting update waiting unknown total harvest"
    assert rows[0] == head
    assert rows[1] == "replica 0 6.000 0.500 3.000 0.250 4.250 1.000 - - - - 15.000 80.0%"
    assert rows[3] == "policy - - - - - - - 4.250 10.750 - 15.000 -"
    late = Timeline(
        [Event(0.0, "replica 0", "idle", 1), Event(3.0, "replica 1", "idle", 1), Event(4.0, "policy", "update", 1)]
    )
    assert " ".join(seconds_table(late, 1).splitlines()[2].split()) == "replica 1 1.000 3.000 4.000 0.0%"


def test_numbers_in_short():
    assert ranges([1, 2, 3, 4, 6]) == "1-4, 6"
    assert ranges([]) == ""


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_script_draws_the_step_and_prints_its_seconds(tmp_path):
    log, out = tmp_path / "train.log", tmp_path / "step.svg"
    log.write_text(log_text() + 'tlt-event {"t": 1\n')
    result = run_script(log, "--step", 3, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "step 3, 15.0 s\n" in result.stdout
    assert seconds_table(timeline(), 3) in result.stdout
    assert "1 tlt-event lines could not be read" in result.stderr
    assert ElementTree.parse(out).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    drawn = out.read_text()
    for text in ("step 3, 15.0 s", "seconds since the step's start", "replica 1", "policy update", "yielding"):
        assert f"<!-- {text} -->" in drawn
    for colour in ("#0072b2", "#009e73", "#e69f00", "#cc79a7"):
        assert colour in drawn


def test_the_script_says_what_is_wrong_with_a_log(tmp_path):
    log, out = tmp_path / "train.log", tmp_path / "step.svg"
    assert "train.log: there is no such log" in run_script(log, "--step", 3, "--out", out).stderr
    log.write_text("step:3 - training/global_step:3 - a:1\n")
    assert "train.log: no tlt-event lines" in run_script(log, "--step", 3, "--out", out).stderr
    log.write_text(log_text())
    result = run_script(log, "--step", 7, "--out", out)
    assert result.returncode == 1
    assert result.stderr.strip() == f"{log}: no step 7: the events have steps 3-4"
    assert not out.exists()


def test_the_time_in_which_one_lane_trains_and_the_other_updates():
    updates = [Span(0, 4, "update"), Span(10, 12, "update")]
    training = [Span(1, 2, "training"), Span(3, 6, "training"), Span(9, 13, "training")]
    assert overlap_s(updates, training) == overlap_s(training, updates) == 1 + 1 + 2
    assert overlap_s(updates, []) == overlap_s([], training) == 0


def test_the_policys_lane_is_read_from_what_the_trainer_prints(capsys):
    """A step of the timeline is that of the weights that the replicas have: the policy makes those of the next one."""
    from omegaconf import OmegaConf

    from tlt_verl.config import PREFIX
    from tlt_verl.rollout.policy_events import say_policy

    config = OmegaConf.create()
    OmegaConf.update(config, f"{PREFIX}.spot.enable", False, force_add=True)
    say_policy(config, "update", 4)
    assert not capsys.readouterr().out, "a run that trains no drafter has no timeline"
    OmegaConf.update(config, f"{PREFIX}.spot.enable", True, force_add=True)
    for state in ("log_probs", "update", "waiting"):
        say_policy(config, state, 4)
    reading = read_events(capsys.readouterr().out.splitlines())
    assert not reading.complaint()
    assert [(event.lane, event.state, event.step) for event in reading.events] == [
        ("policy", "log_probs", 3),
        ("policy", "update", 3),
        ("policy", "waiting", 3),
    ]

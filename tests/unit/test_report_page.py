"""The report's page and command: whole, the same for the same runs, and nothing in it is fetched."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_logs import baseline, console, fast, write_log

from tlt_verl.cli import main
from tlt_verl.report.page import page
from tlt_verl.report.runs import read_runs

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
NAMESPACES = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}


def event(t_s: float, lane: str, state: str, step: int) -> str:
    return f'tlt-event {{"t": {t_s}, "lane": "{lane}", "state": "{state}", "step": {step}}}\n'


def events() -> str:
    """Two whole steps of a replica and of the policy, and the beginning of a third."""
    lines = [event(10 * step, "replica 0", "generating", step) for step in (1, 2, 3)]
    for step in (1, 2):
        lines += [event(10 * step + 4, "replica 0", "training", step), event(10 * step + 6, "policy", "update", step)]
    return "".join([*lines, event(34, "replica 0", "idle", 3)])


@pytest.fixture
def folders(tmp_path) -> list[str]:
    base = write_log(tmp_path / "base", console(baseline()))
    return [str(base), str(write_log(tmp_path / "fast", console(fast()) + events()))]


def made(arguments) -> str:
    runs = read_runs(arguments)
    return page(runs, runs[0])


def tree(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


def text(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def drawn_texts(html: str, place: int) -> set[str]:
    """What is written in the so manieth drawing."""
    return {text(element) for element in tree(html).findall(".//figure")[place].iter(f"{SVG}text")}


def titles(html: str) -> list[str]:
    return [text(element) for element in tree(html).iterfind(".//figcaption/b")]


def test_the_page_is_well_formed_and_has_every_section(folders):
    html = made(folders)
    assert html.startswith("<!DOCTYPE html>\n")
    sections = ["Learning", "Speed", "Where the time goes", "Statistics", "Spot training", "Strategies", "Timeline"]
    assert [text(head) for head in tree(html).iterfind(".//h2")] == sections
    figures = tree(html).findall(".//figure")
    assert len(figures) == len(titles(html)) > 10
    assert all(figure.find(f"{SVG}svg") is not None for figure in figures)


def test_each_drawing_has_its_lines_and_words(folders):
    html = made(folders)
    assert titles(html) == [
        "Reward",
        "Response length",
        "Generation",
        "Step",
        "Tokens per second",
        "Accept length",
        "Speed-up",
        "Step time by phase",
        "Idle time",
        "Harvest",
        "Drafter's version",
        "Drafter's loss",
        "Who drafts",
        "The tuner's choices",
        "tlt/tuner/lost_s",
        "Timeline of fast",
    ]
    legends = [[text(label) for label in figure.iterfind(".//span")] for figure in tree(html).iterfind(".//figure")]
    assert legends[0] == ["base", "fast"]
    assert legends[5] == legends[6] == ["fast"]
    assert legends[7] == ["generation", "old log-probs", "advantages", "policy update", "weight sync", "other"]
    assert legends[13] == ["eagle:7x1@8", "ngram:7x1@8", "off"]
    assert drawn_texts(html, 13) >= {"fast, batch size 5-8", "fast, batch size 17-32"}
    assert legends[15] == ["generating", "training the drafter", "policy update"]
    assert "while the weights of step 2 served, 10.0 s." in text(tree(html).findall(".//figcaption")[15])


def test_nothing_is_fetched_and_nothing_runs(folders):
    html = made(folders)
    assert set(re.findall(r"https?://[^\"'<> )]*", html)) == NAMESPACES, "names, which a browser does not load"
    for element in tree(html).iter():
        assert element.tag.rpartition("}")[2] not in (
            "script",
            "link",
            "img",
            "image",
            "iframe",
            "object",
            "foreignObject",
        )
        for name, value in element.attrib.items():
            assert not name.startswith("on")
            assert name.rpartition("}")[2] not in ("href", "src") or value.startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html


def test_ids_are_the_pages_own_and_every_reference_has_one(folders):
    html = made(folders)
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r"url\(#([^)]*)\)", html)) | set(re.findall(r'xlink:href="#([^"]*)"', html))
    assert referred
    assert referred <= set(ids)


def test_the_page_is_the_same_byte_for_byte_in_another_process(folders, tmp_path):
    written = []
    for seed in ("1", "2"):
        out = tmp_path / f"{seed}.html"
        environment = os.environ | {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed * 9, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tlt_verl.cli", "report", *folders, "--out", str(out)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        written.append(out.read_bytes())
    assert written[0] == written[1] == made(folders).encode()


def test_statistics_compare_with_the_baseline(folders):
    rows = [[text(cell) for cell in row] for row in tree(made(folders)).findall(".//table")[1]]
    assert rows[0] == ["", "base", "fast", "fast - base", "in errors", "by step", "in errors"]
    assert rows[1] == ["critic/score/mean", "0.350 ± 0.076", "0.350 ± 0.076", "0", "+0.0", "0", "-"]
    assert [row[0] for row in rows[2:]] == [
        "response_length/mean",
        "actor/ppo_kl",
        "training/rollout_probs_diff_mean",
    ]


def test_a_difference_beyond_three_errors_is_marked(tmp_path):
    changed = {step: figures | {"critic/score/mean": 5 + step / 9} for step, figures in baseline().items()}
    arguments = [str(write_log(tmp_path / "a", console(baseline()))), str(write_log(tmp_path / "b", console(changed)))]
    marked = [cell for cell in tree(made(arguments)).iterfind(".//td") if cell.get("class") == "far"]
    assert [text(cell)[0] for cell in marked] == ["+", "+"]


def test_a_run_without_drafting_has_only_what_it_has(tmp_path):
    html = made([str(write_log(tmp_path / "plain", console(baseline())))])
    assert titles(html)[-1] == "Step time by phase"
    assert "Speed-up" not in titles(html)
    assert not {"Spot training", "Strategies", "Timeline"} & {text(head) for head in tree(html).iterfind(".//h2")}


def test_one_step_is_enough_and_gaps_are_no_error(tmp_path):
    one = {1: baseline()[1]}
    some = {step: figures for step, figures in fast().items() if step not in (2, 5)}
    arguments = [str(write_log(tmp_path / "one", console(one))), str(write_log(tmp_path / "some", console(some)))]
    html = made(arguments)
    assert "some: no metrics of step 2, 5 (" in text(tree(html))


def test_names_are_text_whatever_is_in_them(tmp_path):
    odd = "<b>&$x_1$\"' _|"
    folder = write_log(tmp_path / "run", console(fast()) + events())
    html = made([f"{odd}={folder}", f"_hidden={folder}"])
    assert text(tree(html).find(".//h1")) == f"{odd}, _hidden"
    assert [text(label) for label in tree(html).find(".//figure").iterfind(".//span")] == [odd, "_hidden"]
    assert odd in [text(element) for element in tree(html).iter(f"{SVG}text")]


def test_a_step_of_too_many_spans_is_not_drawn_but_said(tmp_path):
    many = [event(1 + at / 1000, "replica 0", ("idle", "training")[at % 2], 1) for at in range(2500)]
    log = console(fast()) + "".join(many) + event(9, "replica 0", "idle", 2) + event(10, "replica 0", "idle", 2)
    figure = tree(made([str(write_log(tmp_path / "run", log))])).findall(".//figure")[-1]
    assert "too many for a page; scripts/plot_timeline.py draws it" in text(figure)
    assert figure.find(f"{SVG}svg") is None


def test_the_command_prints_and_writes_the_table(folders, tmp_path, capsys):
    out, table = tmp_path / "new" / "r.html", tmp_path / "r.md"
    assert main(["report", *folders, "--out", str(out), "--markdown", str(table), "--baseline", "fast"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{table.read_text()}\nwritten: {out}\n"
    assert printed.err == ""
    assert "Speed-ups are fast's seconds over the run's" in printed.out
    assert "<figcaption><b>Speed-up</b> Over fast," in out.read_text()


def test_the_command_says_what_is_wrong(folders, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert main(["report", folders[0], str(tmp_path / "absent"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"tlt-verl report: {tmp_path}/absent: there is no such file or folder")
    assert main(["report", *folders, "--baseline", "slow", "--out", str(out)]) == 2
    assert "--baseline slow: there is no such run; takes base, fast" in capsys.readouterr().err
    assert not out.exists()
    assert main(["report", *folders, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be written: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "run"), [("matplotlib", "log"), ("tensorboard", "events")])
def test_a_package_that_is_missing_is_named(folders, tmp_path, package, run):
    """In a process in which it cannot be found, as where it is not installed."""
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events.out.tfevents.1.host").touch()
    given = {"log": folders[0], "events": str(tmp_path / "tb")}[run]
    code = (
        f"import sys; sys.modules[{package!r}] = None; from tlt_verl.cli import main\n"
        f"sys.exit(main(['report', {given!r}, '--out', {str(tmp_path / 'r.html')!r}]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2, result.stderr
    assert f"need the package {package}" in result.stderr.replace("needs", "need")
    assert "pip install tlt-verl[report]" in result.stderr
    assert ("| base" in result.stdout) == (run == "log"), "the table does not need matplotlib"


def test_reading_imports_nothing_that_draws_or_computes():
    code = "import sys, tlt_verl.report.command as c; print({'matplotlib', 'torch', 'tensorboard'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout == "set()\n"

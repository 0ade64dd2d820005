"""One HTML page with everything in it: tables, drawings, words. Nothing is fetched, and nothing in it runs.

Knows how plots, cells and statistics become HTML (well-formed XML as well); knows nothing of how they are made. The
same runs give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from tlt_verl.report.canvas import Style
from tlt_verl.report.choices import draft_shares, strategies, tuner_figures
from tlt_verl.report.estimates import difference, estimate, statistic_keys
from tlt_verl.report.figures import figure
from tlt_verl.report.lanes import timelines
from tlt_verl.report.plots import Plot, Plots
from tlt_verl.report.runs import Run
from tlt_verl.report.summary import cells, explanation

FAR_ERRORS = 3.0
_MOST_DIGITS = 7

_STYLE = """
body { font: 15px/1.45 sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin: 2em 0 .6em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #e5e5e5; }
th:first-child, td:first-child { text-align: left; } td.far { font-weight: bold; background: #fdf0e0; }
.scroll { overflow-x: auto; } p, figcaption { color: #555; font-size: 13px; } p { max-width: 52em; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2em; } .wide { grid-column: 1 / -1; }
figure { margin: 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto; }
figcaption b { color: #222; font-size: 14px; } .legend { margin-right: 1em; white-space: nowrap; }
.legend i { display: inline-block; width: 1.6em; margin-right: .3em; vertical-align: middle; }
"""


def page(runs: Sequence[Run], baseline: Run) -> str:
    """The page of some runs.

    Args:
        baseline: the one of them that the others are compared with.
    """
    plots = Plots(runs, baseline)
    names = ", ".join(run.name for run in runs)
    sections = [
        _section("Learning", _figures(plots.learning())),
        _section("Speed", _figures(plots.speed())),
        _section("Where the time goes", _figures(plots.phases())),
        _section("Statistics", _statistics(runs, baseline)),
        _section("Spot training", _figures(plots.spot())),
        _section("Strategies", _figures(_choices(runs, plots))),
        _section("Timeline", _figures(timelines(runs))),
    ]
    head = f'<meta charset="utf-8" />\n<title>{_text(names)}</title>\n<style>{_STYLE}</style>'
    body = f"<h1>{_text(names)}</h1>\n{_summary(runs, baseline)}{''.join(sections)}"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'


def _choices(runs: Sequence[Run], plots: Plots) -> list[Plot]:
    found = [*draft_shares(runs), *strategies(runs)]
    for key in tuner_figures(runs):
        found += plots.lines(key, "", figure(key), "As the tuner logged it.")
    return found


def _text(text: str) -> str:
    """Text as HTML; what no page may have, such as control characters out of a torn log, is replaced."""
    return escape("".join(character if character.isprintable() else "?" for character in text))


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}" if content else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of heads, which are text, and of cells, which are HTML already."""
    lines = ["".join(_cell(head, "th") for head in heads), *("".join(row) for row in rows)]
    return '<div class="scroll"><table>\n' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>\n"


def _cell(text: str, tag: str = "td", more: str = "") -> str:
    return f"<{tag}{more}>{_text(text)}</{tag}>"


def _summary(runs: Sequence[Run], baseline: Run) -> str:
    heads, *rows = cells(runs, baseline)
    table = _table(heads, [[_cell(cell) for cell in row] for row in rows])
    notes = "".join(f"<li>{_text(f'{run.name}: {note}')}</li>\n" for run in runs for note in run.notes)
    listed = f"<p>What was found in reading the runs:</p>\n<ul>\n{notes}</ul>\n" if notes else ""
    return f"{table}<p>{_text(explanation(runs, baseline))}</p>\n{listed}"


def _figures(plots: Sequence[Plot]) -> str:
    return f'<div class="plots">\n{"".join(map(_figure, plots))}</div>\n' if plots else ""


def _figure(plot: Plot) -> str:
    legend = "".join(f'<span class="legend">{_swatch(look)}{_text(label)}</span> ' for label, look in plot.legend)
    words = f"<figcaption><b>{_text(plot.title)}</b> {_text(plot.caption)}<br />{legend}</figcaption>"
    opening = '<figure class="wide">' if plot.wide else "<figure>"
    return f"{opening}{words}\n{plot.svg}</figure>\n"


def _swatch(look: Style) -> str:
    return f'<i style="border-top: 3px {look.dash} {look.colour}"></i>'


def _statistics(runs: Sequence[Run], baseline: Run) -> str:
    """A row a metric: each run's mean and standard error, and how far it is from the baseline's."""
    keys = statistic_keys(runs)
    if not keys:
        return ""
    others = [run for run in runs if run is not baseline]
    heads = ["", *(run.name for run in runs)]
    heads += [head for run in others for head in (f"{run.name} - {baseline.name}", "in errors", "by step", "in errors")]
    rows = [
        [_cell(key), *(_estimate(run, key) for run in runs), *(_distance(baseline, run, key) for run in others)]
        for key in keys
    ]
    return _table(heads, rows) + f"<p>{_text(_words(bool(others)))}</p>\n"


def _words(compared: bool) -> str:
    text = "Mean over the steps, plus or minus its standard error, with steps taken for independent samples."
    if compared:
        text += (
            " A difference is given twice, each time also in its standard errors: of the means, and step by step over"
            " the steps that both runs have. The latter leaves out what both share (the prompts, the trend), so it sees"
            " smaller ones; it is meant for runs over the same prompts."
            f" Beyond {FAR_ERRORS:.0f} errors it is marked; with few steps, or in many figures, some are by chance."
        )
    return text


def _estimate(run: Run, key: str) -> str:
    values = list(run.series(key).values())
    if not values:
        return _cell("-")
    found = estimate(values)
    if not found.error:
        return _cell(f"{found.mean:.4g}" + ("" if found.error is None else " ± 0"))
    digits = max(0, 1 - math.floor(math.log10(found.error)))  # so many that the error shows two
    mean = f"{found.mean:.{digits}f}" if digits <= _MOST_DIGITS else f"{found.mean:.3g}"
    return _cell(f"{mean} ± {found.error:.2g}")


def _distance(baseline: Run, run: Run, key: str) -> str:
    found = difference(baseline.series(key), run.series(key))
    if found is None:
        return _cell("-") * 4
    means = zip((found.mean, found.paired_mean), (found.in_errors, found.in_paired_errors), strict=True)
    return "".join(_number(mean, ".3g") + _number(errors, "+.1f", mark=True) for mean, errors in means)


def _number(value: float | None, form: str, mark: bool = False) -> str:
    far = ' class="far"' if mark and value is not None and abs(value) >= FAR_ERRORS else ""
    return _cell("-" if value is None else format(value, form), more=far)

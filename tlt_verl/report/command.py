"""`tlt-verl report`: reads runs, prints their table, writes the page. Knows the files; each part knows its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_verl.report.runs import ReportError, Run, read_runs
from tlt_verl.report.summary import markdown


def main(arguments: Sequence[str], out: Path, markdown_out: Path | None = None, baseline: str | None = None) -> int:
    """Report on runs; returns the exit status, 2 with a message where there is nothing to report or to draw with.

    The table is printed, and written, before anything is drawn.

    Args:
        arguments: `PATH` or `NAME=PATH`, one a run.
        out: the HTML page.
        markdown_out: file for the table, too.
        baseline: the run that the others are compared with, by its name; None: the first.
    """
    try:
        _report(arguments, out, markdown_out, baseline)
    except ReportError as error:
        print(f"tlt-verl report: {error}", file=sys.stderr)
        return 2
    return 0


def _report(arguments: Sequence[str], out: Path, markdown_out: Path | None, baseline: str | None) -> None:
    runs = read_runs(arguments)
    compared_with = _baseline(runs, baseline)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}", file=sys.stderr)
    table = markdown(runs, compared_with)
    print(table, end="", flush=True)
    if markdown_out is not None:
        _write(markdown_out, table)
    _write(out, _page(runs, compared_with))
    print(f"\nwritten: {out}")


def _baseline(runs: Sequence[Run], name: str | None) -> Run:
    named = [run for run in runs if name is None or run.name == name]
    if not named:
        raise ReportError(f"--baseline {name}: there is no such run; takes {', '.join(run.name for run in runs)}")
    return named[0]


def _page(runs: Sequence[Run], baseline: Run) -> str:
    try:
        from tlt_verl.report.page import page
    except ImportError as error:
        cure = "pip install tlt-verl[report]; the table needs nothing and was made"
        raise ReportError(f"no page: drawing needs the package {error.name}: {cure}") from error
    return page(runs, baseline)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ReportError(f"{path}: cannot be written: {error.strerror}") from error

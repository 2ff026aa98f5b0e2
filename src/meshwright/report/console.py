"""The report for the terminal: the few tables one looks at right after a run."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from meshwright.report.headline import sentence, state, title
from meshwright.report.run import Run, load_run, whole_epochs
from meshwright.report.timing import breakdown, waiting
from meshwright.report.units import bytes_text, dice_text, percent_text, ratio_text, seconds_text


def summary(run_dir: str | Path, console: Console | None = None) -> None:
    """Print held-out Dice, where a step's time goes, memory and bytes per rank beside the ideal, the page's path.

    Raises `DataError` for a run directory that is missing, incomplete or damaged.
    """
    run = load_run(run_dir)
    out = console or Console()
    out.print(f"[bold]{escape(title(run))}[/bold]")
    out.print(escape(sentence(run)))
    for line in (state(run), *run.notes):
        if line:
            out.print(f"[yellow]{escape(line)}[/yellow]")
    for table in (_dice(run), _time(run), _memory(run), _reading(run)):
        if table.row_count:
            out.print(table)
    page = run.path / "report.html"
    if page.is_file():
        out.print(f"Page: {escape(str(page))}", soft_wrap=True)


def _table(title_: str, *columns: str) -> Table:
    table = Table(title=title_, title_justify="left", title_style="bold", header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=bool(index))
    return table


def _dice(run: Run) -> Table:
    table = _table("Held-out Dice", "class", "Dice")
    for name, value in zip(run.classes, run.dice, strict=True):
        table.add_row(escape(name), dice_text(value))
    return table


def _time(run: Run) -> Table:
    table = _table("Time per step", "work", "median", "of all time")
    for share in breakdown(run.steps):
        table.add_row(share.name, seconds_text(share.median_s), percent_text(share.share, 1))
        if share.name == "data" and (waited := waiting(run.steps)) is not None:
            table.add_row(waited[0], seconds_text(waited[1]), "in data")
    if run.steps:
        table.add_row("whole step", seconds_text(median(step.step_s for step in run.steps)), "100 %")
        table.add_row("sent by rank 0", bytes_text(median(step.sent_bytes for step in run.steps)), "")
    return table


def _memory(run: Run) -> Table:
    table = _table("Memory", "rank", "peak", "state", "above state", "data kept", "ideal", "of ideal")
    for r in run.ranks:
        sizes = (r.peak_bytes, r.state_bytes, max(0, r.peak_bytes - r.state_bytes), r.part_bytes, r.ideal_bytes)
        table.add_row(str(r.rank), *map(bytes_text, sizes), ratio_text(r.part_bytes, r.ideal_bytes))
    return table


def _reading(run: Run) -> Table:
    if run.reading:
        table = _table("Reading", "epoch", "rank", "read", "ideal", "of ideal", "shared copy")
        for row in (*run.reading, *whole_epochs(run.reading)):
            sizes = (bytes_text(row.read_bytes), bytes_text(row.ideal_read_bytes))
            ratio, shared = ratio_text(row.read_bytes, row.ideal_read_bytes), bytes_text(row.shared_bytes)
            table.add_row(str(row.epoch), str(row.rank) if row.rank >= 0 else "all", *sizes, ratio, shared)
        return table
    table = _table("Reading", "rank", "read", "ideal", "of ideal")
    for r in run.ranks:
        ratio = ratio_text(r.read_bytes, r.ideal_read_bytes)
        table.add_row(str(r.rank), bytes_text(r.read_bytes), bytes_text(r.ideal_read_bytes), ratio)
    return table

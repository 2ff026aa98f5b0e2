"""The top of the page: what was trained, how well, on what, and whether the run came to its end."""

from __future__ import annotations

from html import escape

from meshwright.report.run import Run
from meshwright.report.units import bytes_text, dice_text, seconds_text

_DOT = '<i class="key dot"></i>'


def title(run: Run) -> str:
    """One line: Dice of the classes that matter (all but class 0, the background)."""
    scores = [f"{name} {dice_text(value)}" for name, value in list(zip(run.classes, run.dice, strict=True))[1:]]
    return f"Held-out Dice: {', '.join(scores)}" if scores else "Not validated yet"


def headline(run: Run) -> str:
    """The `<header>`: title, one sentence, a warning for an unfinished run, the key figures."""
    return (
        f'<header><p class="eyebrow">Meshwright · training run {escape(run.path.resolve().name)}</p>'
        f'<h1>{escape(title(run))}</h1><p class="lede">{escape(sentence(run))}</p>{_state(run)}{_tiles(run)}'
    )


def sentence(run: Run) -> str:
    """What the run did, in words."""
    ranks = f"{run.plan.ranks} rank" + ("s" if run.plan.ranks > 1 else "")
    last = run.steps[-1].step if run.steps else 0
    if run.summary is None:
        return f"{last:,} steps so far on {ranks} ({run.plan})."
    end = run.summary
    at = f" at {end.resolution_mm:g} mm" if end.resolution_mm is not None else ""
    fold = f", fold {end.fold}" if end.fold is not None else ""
    return (
        f"{len(run.classes)}-class segmentation{at}{fold} on {ranks} ({run.plan}; {end.threads_per_rank} "
        f"thread{'s' if end.threads_per_rank > 1 else ''} each): {end.steps:,} steps of a network of "
        f"{end.parameters:,} parameters in {end.precision}, {seconds_text(end.train_s)} of training."
    )


def state(run: Run) -> str | None:
    """What is wrong or missing about this run; None for one that finished."""
    if run.finished:
        return None
    if run.summary is not None:
        return f"The run stopped before its end, after {run.summary.steps:,} steps; the figures are those it left."
    last = f"step {run.steps[-1].step:,}" if run.steps else "no step"
    return (
        f"This run has no summary: it is still going, or it was killed. The last logged is {last}. "
        "Files that are written at the end are missing, and so are their parts of this page."
    )


def _state(run: Run) -> str:
    lines = [line for line in (state(run), *run.notes) if line]
    return f'<p class="state" role="status">{"<br>".join(map(escape, lines))}</p>' if lines else ""


def _tiles(run: Run) -> str:
    tiles = [
        (f"Dice, {name}", f"c-class{index % 6}", dice_text(value), "held-out part")
        for index, (name, value) in enumerate(zip(run.classes, run.dice, strict=True))
    ]
    tiles.append(("Ranks", "", str(run.plan.ranks), str(run.plan)))
    if run.summary is not None:
        tiles.append(("Time", "", seconds_text(run.summary.total_s), f"training {seconds_text(run.summary.train_s)}"))
    if run.ranks:
        peak = max(record.peak_bytes for record in run.ranks)
        tiles.append(("Peak memory", "", bytes_text(peak), "the largest rank"))
    cells = "".join(
        f'<div><dt class="{colour}">{_DOT if colour else ""}{escape(name)}</dt>'
        f"<dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, colour, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'

"""What the run cost: time and bytes per step, memory and reading per rank, bytes per layer."""

from __future__ import annotations

from html import escape
from statistics import median

from meshwright.report.chart import Series, legend, stacked
from meshwright.report.run import Run, whole_epochs
from meshwright.report.sections import panel, section
from meshwright.report.tables import Cell, Column, Html, bar, folded, table
from meshwright.report.timing import breakdown, percentile, waiting
from meshwright.report.units import byte_unit, bytes_text, percent_text, ratio_text, seconds_text


def time_per_step(run: Run) -> str:
    """Stacked bars per step beside the table of medians."""
    shares = breakdown(run.steps)
    if not shares:
        return section("time", "Time per step", '<p class="none">No step was logged yet.</p>')
    steps = [step.step for step in run.steps]
    whole = [step.step_s for step in run.steps]
    scale, unit = (1e3, "ms") if median(whole) < 1 else (1.0, "s")
    parts = [Series(s.name, s.colour, steps, [value * scale for value in s.values_s]) for s in shares]
    rows: list[list[Cell]] = [
        [
            s.name,
            bar([(s.share, s.colour)], 1.0),
            seconds_text(s.median_s),
            seconds_text(s.p90_s),
            percent_text(s.share, 1),
        ]
        for s in shares
    ]
    if (waited := waiting(run.steps)) is not None:
        behind = [s.name for s in shares].index("data") + 1
        rows.insert(behind, [waited[0], "", seconds_text(waited[1]), "", "in data"])
    rows.append(["whole step", "", seconds_text(median(whole)), seconds_text(percentile(whole, 0.9)), "100 %"])
    columns = [
        Column("Work", "text"),
        Column("Share", "bar"),
        Column("Median"),
        Column("90th percentile"),
        Column("Of all time"),
    ]
    chart = stacked("Seconds of every step by kind of work", steps, parts, y_label=f"{unit} per step", unit=unit)
    rate = median(step.samples_per_s for step in run.steps)
    return section(
        "time",
        "Time per step",
        f"<p>The median step takes {seconds_text(median(whole))}, {rate:.3g} samples/s, as measured by rank 0.</p>",
        '<div class="pair">',
        panel("Every step", chart, [(s.name, s.colour, "box") for s in shares]),
        table("Medians", columns, rows),
        "</div>",
    )


def traffic(run: Run) -> str:
    """Bytes per step, windows and statistics apart from gradients."""
    if not run.steps:
        return section("bytes", "Bytes per step", '<p class="none">No step was logged yet.</p>')
    if not any(step.sent_bytes for step in run.steps):
        return section("bytes", "Bytes per step", '<p class="none">Rank 0 sent nothing.</p>')
    steps = [step.step for step in run.steps]
    gradients = [float(step.reduced_bytes) for step in run.steps]
    windows = [float(step.sent_bytes - step.reduced_bytes) for step in run.steps]
    sent = [float(step.sent_bytes) for step in run.steps]
    divisor, unit = byte_unit(median(sent))
    named = (("windows and statistics", "exchange", windows), ("gradients", "reduction", gradients))
    parts = [Series(name, colour, steps, [value / divisor for value in values]) for name, colour, values in named]
    rows: list[list[Cell]] = [
        [name, bytes_text(median(values)), bytes_text(sum(values))] for name, _, values in (*named, ("all", "", sent))
    ]
    rows.append(
        ["messages", f"{median(s.messages for s in run.steps):,.0f}", f"{sum(s.messages for s in run.steps):,}"]
    )
    chart = stacked("Bytes sent in every step", steps, parts, y_label=f"{unit} per step", unit=unit, height=200.0)
    return section(
        "bytes",
        "Bytes per step",
        "<p>What rank 0 sends to the others in one step.</p>",
        '<div class="pair">',
        panel("Every step", chart, [(name, colour, "box") for name, colour, _ in named]),
        table("Sent by rank 0", [Column("Kind", "text"), Column("Median step"), Column("Whole run")], rows),
        "</div>",
    )


def memory(run: Run) -> str:
    """Per rank: peak and state, then the data kept and read beside the ideal."""
    if not run.ranks:
        return section("memory", "Memory and reading", '<p class="none">The run has not written its memory yet.</p>')
    largest, peak = max(((r.rank, r.peak_bytes) for r in run.ranks), key=lambda entry: entry[1])
    kept = max(max(record.part_bytes, record.ideal_bytes) for record in run.ranks)
    read = max(max(record.read_bytes, record.ideal_read_bytes) for record in run.ranks)
    memory_rows: list[list[Cell]] = []
    data_rows: list[list[Cell]] = []
    for r in run.ranks:
        above = max(0, r.peak_bytes - r.state_bytes)
        state = min(r.state_bytes, r.peak_bytes)
        texts = [bytes_text(n) for n in (r.peak_bytes, r.state_bytes, above, r.part_bytes, r.ideal_bytes)]
        memory_rows.append([str(r.rank), bar([(state, "state"), (above, "peak")], peak), *texts])
        data_rows.append(
            [
                str(r.rank),
                bar([(r.part_bytes, "data")], kept, r.ideal_bytes),
                bytes_text(r.part_bytes),
                bytes_text(r.ideal_bytes),
                ratio_text(r.part_bytes, r.ideal_bytes),
                bar([(r.read_bytes, "data")], read, r.ideal_read_bytes),
                bytes_text(r.read_bytes),
                bytes_text(r.ideal_read_bytes),
                ratio_text(r.read_bytes, r.ideal_read_bytes),
            ]
        )
    columns = [Column("Rank", "text"), Column("Memory", "bar"), Column("Peak"), Column("State")]
    columns += [Column("Peak above state"), Column("Data kept"), Column("Ideal data")]
    sizes = [Column("Bytes"), Column("Ideal"), Column("of ideal")]
    data = [Column("Rank", "text"), Column("Kept in memory", "bar"), *sizes, Column("Read from file", "bar"), *sizes]
    return section(
        "memory",
        "Memory and reading",
        f"<p>The largest peak is {bytes_text(peak)}, of rank {largest}. "
        "State is what is resident once the model is built; above it lie activations, gradients and the optimiser. "
        "The ideal rank keeps and reads exactly its own part of image and labels.</p>",
        legend([("state", "state", "box"), ("above state", "peak", "box")]),
        folded("Peak memory per rank", columns, memory_rows),
        legend([("measured", "data", "box"), ("ideal", "other", "tick")]),
        folded("Data per rank beside the ideal", data, data_rows),
        _epochs(run),
    )


def _epochs(run: Run) -> str:
    """Bytes read ÷ ideal, per epoch and rank, and over all ranks; epochs that read nothing have no row."""
    rows = sorted((*run.reading, *whole_epochs(run.reading)), key=lambda row: (row.epoch, row.rank))
    if not rows:
        return ""
    columns = [Column("Epoch", "text"), Column("Rank"), Column("Read from files"), Column("Ideal"), Column("of ideal")]
    cells: list[list[Cell]] = [
        [
            str(row.epoch),
            str(row.rank) if row.rank >= 0 else "all",
            bytes_text(row.read_bytes),
            bytes_text(row.ideal_read_bytes),
            ratio_text(row.read_bytes, row.ideal_read_bytes),
            bytes_text(row.shared_bytes),
        ]
        for row in rows
    ]
    return folded("Training data read in each epoch", [*columns, Column("From the host's decoded copy")], cells)


def layers(run: Run) -> str:
    """Bytes per layer, largest first; what had to be gathered stands out."""
    sent = [row for row in run.layers if row.exchanged_bytes or row.gathered_bytes]
    if not sent:
        return section("layers", "Layers", '<p class="none">No layer sent anything, or none is written yet.</p>')
    rows = sorted(sent, key=lambda r: (-(r.exchanged_bytes + r.gathered_bytes), r.layer, r.op))
    top = rows[0].exchanged_bytes + rows[0].gathered_bytes
    gathered = sum(row.gathered_bytes for row in rows)
    columns = [Column("Layer", "text"), Column("Operation", "text"), Column("Bytes", "bar"), Column("Exchanged")]
    columns += [Column("Gathered"), Column("Messages")]
    cells: list[list[Cell]] = [
        [
            Html(escape(row.layer or "(model)") + ('<span class="tag">gathered</span>' if row.gathered_bytes else "")),
            row.op,
            bar([(row.exchanged_bytes, "exchange"), (row.gathered_bytes, "wrong")], top),
            bytes_text(row.exchanged_bytes),
            bytes_text(row.gathered_bytes) if row.gathered_bytes else "—",
            f"{row.messages:,}",
        ]
        for row in rows
    ]
    marked = [row.gathered_bytes > 0 for row in rows]
    verdict = (
        f"{sum(marked)} of {len(rows)} operations below had no local rule and were gathered: {bytes_text(gathered)}."
        if gathered
        else "Nothing was gathered: every operation that needed its neighbours exchanged windows only."
    )
    shown = folded("Bytes sent per layer, largest first", columns, cells, marked)
    return section("layers", "Layers", f"<p>{verdict}</p>", shown)

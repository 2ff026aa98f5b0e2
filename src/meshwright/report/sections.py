"""How well the run learned: curves, and the held-out part in pictures."""

from __future__ import annotations

from html import escape

from meshwright.report.chart import Series, curves, legend
from meshwright.report.run import Run
from meshwright.report.volume import gallery


def section(name: str, title: str, *body: str) -> str:
    """A part of the page with its anchor and heading."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(body)}</section>'


def panel(title: str, chart: str, entries: list[tuple[str, str, str]]) -> str:
    """A chart under its title and legend."""
    return f'<figure class="panel"><figcaption>{escape(title)} {legend(entries)}</figcaption>{chart}</figure>'


def learning(run: Run) -> str:
    """Loss and Dice over the steps, then learning rate and gradient norm."""
    steps = [float(step.step) for step in run.steps]
    checks = [float(check.step) for check in run.validation]
    loss = [
        Series("training loss", "loss", steps, [step.loss for step in run.steps]),
        Series("held-out loss", "held", checks, [check.loss for check in run.validation], "points"),
    ]
    dice = []
    for index, name in enumerate(run.classes):
        colour = f"class{index % 6}"
        dice.append(Series(f"{name}, training", colour, steps, [step.dice[index] for step in run.steps]))
        held = [check.dice[index] for check in run.validation]
        dice.append(Series(f"{name}, held out", colour, checks, held, "points"))
    rate = [Series("learning rate", "lr", steps, [step.lr for step in run.steps])]
    norm = [Series("gradient norm", "norm", steps, [step.grad_norm for step in run.steps])]
    marks = [("training", "other", "line"), ("held out", "other", "dot")]
    names = [(name, f"class{index % 6}", "box") for index, name in enumerate(run.classes)]
    return section(
        "learning",
        "Learning",
        '<p class="hint">Faint: every step. Strong: centred mean. Dots: the held-out part after that step.</p>',
        '<div class="pair">',
        panel(
            "Loss",
            curves("Loss over the step", loss, y_label="loss"),
            [("training", "loss", "line"), ("held out", "held", "dot")],
        ),
        panel("Dice", curves("Dice per class over the step", dice, y_label="Dice", y_range=(None, 1.0)), names + marks),
        panel(
            "Learning rate",
            curves("Learning rate over the step", rate, y_label="rate", y_range=(0.0, None), height=190),
            [],
        ),
        panel(
            "Gradient norm",
            curves("Gradient norm over the step", norm, y_label="norm", y_range=(0.0, None), height=190),
            [],
        ),
        "</div>",
    )


def held_out(run: Run) -> str:
    """Image, truth, prediction and errors from three directions."""
    if run.slices is None:
        return section("slices", "The held-out part", '<p class="none">The run has not written its slices yet.</p>')
    entries = [(name, f"class{index % 6}", "box") for index, name in enumerate(run.classes)][1:]
    mm = " × ".join(f"{step:g}" for step in run.slices.spacing_mm)
    size = " × ".join(map(str, run.slices.shape))
    cuts = "Dashed: where the volume is cut between ranks." if run.plan.ranks > 1 else "One rank held the whole volume."
    text = f"Planes through {size} voxels (D × H × W) of {mm} mm that no training step has seen. {cuts}"
    keys = legend([*entries, ("wrong class", "error", "box")])
    return section("slices", "The held-out part", f"<p>{escape(text)}</p>", keys, gallery(run.slices, run.plan))

"""A run directory is read whole or refused with the file, the line and the key."""

from __future__ import annotations

import json

import numpy as np
import pytest

from meshwright.errors import DataError
from meshwright.plan.plan import Plan
from meshwright.report.run import load_run


def rewrite(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_a_whole_run_is_read(make_run):
    run = load_run(make_run(Plan.uniform(depth=2, width=2), steps=40))
    assert run.finished
    assert run.plan == Plan.uniform(depth=2, width=2)
    assert [step.step for step in run.steps] == list(range(1, 41))
    assert [check.step for check in run.validation] == [20, 40]
    assert run.classes == ("other", "grey", "white")
    assert run.dice == (0.991, 0.938, 0.945)
    assert [record.interval for record in run.ranks][1] == ((0, 20), (0, 48), (18, 36))
    assert run.slices is not None
    assert run.slices.planes[2].truth.shape == (40, 24)
    assert run.slices.at == (20, 12, 18)


def test_a_run_without_summary_says_what_it_has(make_run):
    path = make_run(finished=False)
    with (path / "steps.jsonl").open("a") as log:
        log.write('{"step": 61, "lo')  # killed in the middle of a line
    run = load_run(path)
    assert not run.finished
    assert run.steps[-1].step == 60
    assert run.notes == ("The last line of steps.jsonl (line 61) is cut off and was left out.",)
    assert (run.ranks, run.layers, run.slices) == ((), (), None)
    assert run.classes == ("class 0", "class 1", "class 2")
    assert run.dice == run.validation[-1].dice


def test_a_resumed_run_does_not_show_the_files_of_its_earlier_end(make_run):
    path = make_run(Plan.uniform(depth=2))
    (path / "summary.json").unlink()  # as a resume does, here under another plan
    Plan.uniform(depth=4).save(path / "plan.yaml")
    run = load_run(path)
    assert (run.ranks, run.layers, run.slices) == ((), (), None)


def test_a_run_killed_before_its_first_step_is_a_run(make_run):
    path = make_run(finished=False)
    for name in ("steps.jsonl", "validation.jsonl", "machine.json"):
        (path / name).unlink()
    run = load_run(path)
    assert (run.steps, run.validation, run.machine, run.classes, run.dice) == ((), (), {}, (), ())


def test_steps_run_again_after_a_resume_count_once(make_run):
    path = make_run(steps=30)
    lines = (path / "steps.jsonl").read_text().splitlines()
    again = json.loads(lines[19]) | {"loss": 7.0}
    (path / "steps.jsonl").write_text("\n".join([*lines[:25], json.dumps(again), *lines[20:]]) + "\n")
    steps = load_run(path).steps
    assert [step.step for step in steps] == list(range(1, 31))
    assert steps[19].loss == 7.0


@pytest.mark.parametrize(
    "name", ["machine.json", "steps.jsonl", "validation.jsonl", "ranks.json", "layers.json", "slices.npz"]
)
def test_an_ended_run_must_be_complete(make_run, name):
    path = make_run()
    (path / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: missing, though the run has ended"):
        load_run(path)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"not a run directory \(no config\.yaml\)"):
        load_run(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "ranks.json", "layers.json", "machine.json", "slices.npz"])
def test_a_truncated_file_is_named(make_run, name):
    path = make_run()
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{name}: "):
        load_run(path)


def test_a_damaged_line_of_an_ended_run_is_named(make_run):
    path = make_run()
    with (path / "steps.jsonl").open("a") as log:
        log.write('{"step": 61, "lo')
    with pytest.raises(DataError, match=r"steps\.jsonl: line 61: not JSON"):
        load_run(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("dice"), r"summary\.json: missing 'dice'"),
        (lambda raw: raw.update(steps="many"), r"summary\.json: 'steps' is 'many'; expected int"),
        (lambda raw: raw.update(steps=True), r"summary\.json: 'steps' is True; expected int"),
        (lambda raw: raw.update(classes=["a", 3, "c"]), r"summary\.json: 'classes'\[1\] is 3; expected str"),
        (
            lambda raw: raw.update(classes=["a", "b"]),
            r"steps\.jsonl: step 1 has Dice of 3 classes, the run has 2: a, b",
        ),
    ],
)
def test_a_wrong_value_is_named(make_run, change, message):
    path = make_run()
    rewrite(path / "summary.json", change)
    with pytest.raises(DataError, match=message):
        load_run(path)


def test_ranks_of_another_plan_are_refused(make_run):
    path = make_run(Plan.uniform(depth=2))
    Plan.uniform(depth=4).save(path / "plan.yaml")
    with pytest.raises(DataError, match=r"has the ranks \[0, 1\], but plan\.yaml \(depth=4\) has the ranks 0 to 3"):
        load_run(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth_h": np.zeros((3, 3), np.uint8)}, r"truth_h is uint8 of shape \(3, 3\); .* asks for \(40, 36\)"),
        ({"truth_h": np.zeros((40, 36))}, r"truth_h is float64 .* whole numbers"),
        ({"shape": np.array([40, 24])}, r"shape must be three positive numbers"),
        ({"at": np.array([0, 24, 0])}, r"at must be three positions inside the volume of \(40, 24, 36\)"),
    ],
)
def test_slices_must_fit_their_volume(make_run, change, message):
    path = make_run()
    with np.load(path / "slices.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    np.savez(path / "slices.npz", **(arrays | change))
    with pytest.raises(DataError, match=message):
        load_run(path)


def test_a_single_array_is_no_set_of_slices(make_run):
    path = make_run()
    with (path / "slices.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="has no array 'shape'; it has none"):
        load_run(path)


def test_pickled_slices_are_refused(make_run):
    path = make_run()
    np.savez(path / "slices.npz", shape=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="not a readable"):
        load_run(path)

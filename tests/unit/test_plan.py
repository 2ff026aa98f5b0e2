"""Laws of the plan value: it survives YAML, says what is wrong with a bad one, and its intervals partition a tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright as mw
from meshwright.errors import MeshwrightError, PlanError
from meshwright.plan.plan import Axis

PLANS = st.builds(
    mw.Plan.uniform,
    data=st.integers(1, 3),
    depth=st.integers(1, 4),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
)


@settings(max_examples=50)
@given(PLANS)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, plan: mw.Plan) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.save(path)
    loaded = mw.Plan.load(path)
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert loaded.axes == plan.axes  # the order too: the outermost axis is the slowest


@given(PLANS)
def test_coordinates_number_the_ranks_outermost_slowest(plan: mw.Plan) -> None:
    positions = [plan.coordinates(rank) for rank in range(plan.ranks)]
    assert positions == sorted(set(positions))
    assert len(positions) == plan.ranks
    for position in positions:
        assert all(0 <= index < axis.size for index, axis in zip(position, plan.axes, strict=True))


@given(PLANS, st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(1, 5)] * 3))
def test_intervals_partition_the_tensor(plan: mw.Plan, shape: tuple[int, ...]) -> None:
    seen: dict[tuple[int, ...], int] = {}
    for rank in range(plan.ranks):
        spans = [range(shape[dim])[span] for dim, span in enumerate(mw.interval(shape, plan, rank))]
        cells = [()]
        for span in spans:
            cells = [(*cell, position) for cell in cells for position in span]
        for cell in cells:
            seen[cell] = seen.get(cell, 0) + 1
    total = 1
    for size in shape:
        total *= size
    assert len(seen) == total
    assert all(count == 1 for count in seen.values())


def test_interval_by_hand() -> None:
    plan = mw.Plan.uniform(data=2, depth=2)
    assert mw.interval((3, 4, 7, 8, 9), plan, 3) == (slice(2, 3), slice(0, 4), slice(4, 7), slice(0, 8), slice(0, 9))
    assert mw.interval((3, 7, 8, 9), plan, 3, layout="NDHW") == (slice(2, 3), slice(4, 7), slice(0, 8), slice(0, 9))


def test_spatial_roles_count_from_the_last_dim() -> None:
    plan = mw.Plan.uniform(depth=2, height=2, width=2)
    assert plan.dims(5) == (2, 3, 4)
    assert plan.dims(4) == (None, 2, 3)
    assert plan.dims(3) == (None, None, 2)
    assert plan.dims(2) == (None, None, None)
    assert plan.dims(3, "DHW") == (0, 1, 2)
    assert mw.Plan.uniform(data=2).dims(2) == (0,)


def test_uniform_leaves_out_axes_of_one() -> None:
    assert [axis.name for axis in mw.Plan.uniform(data=1, depth=2, height=1, width=3).axes] == ["depth", "width"]
    assert mw.Plan.uniform().ranks == 1
    assert mw.Plan.uniform(data=2, depth=3, width=2).ranks == 12
    assert str(mw.Plan.uniform(depth=2, height=2)) == "depth=2 × height=2"


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_a_size_is_a_whole_number(size: object) -> None:
    with pytest.raises(PlanError, match=f"'depth' has size {size!r}"):
        mw.Plan((Axis("depth", size, "depth"),))  # type: ignore[arg-type]


def test_a_plan_error_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="role 'deep'; known roles: sample, depth"):
        mw.Plan((Axis("a", 2, "deep"),))
    with pytest.raises(PlanError, match="share the role 'depth'"):
        mw.Plan((Axis("a", 2, "depth"), Axis("b", 2, "depth")))
    with pytest.raises(PlanError, match="share the name 'a'"):
        mw.Plan((Axis("a", 2, "depth"), Axis("a", 2, "height")))
    with pytest.raises(PlanError, match="rank 4 does not exist: the plan has ranks 0 to 3"):
        mw.interval((1, 1, 8, 8, 8), mw.Plan.uniform(depth=4), 4)
    with pytest.raises(PlanError, match="6-D tensor has no customary layout"):
        mw.interval((1,) * 6, mw.Plan.uniform(depth=2), 0)
    with pytest.raises(PlanError, match="'NCD' must name each of the 5 dims"):
        mw.interval((1,) * 5, mw.Plan.uniform(depth=2), 0, layout="NCD")
    assert issubclass(PlanError, ValueError)
    assert issubclass(PlanError, MeshwrightError)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("meshwright_plan: 1\naxes: {depth: {size: 2, role: deep}}", "role 'deep'"),
        ("meshwright_plan: 1\naxes: {depth: {size: 2}}", "exactly the keys 'size' and 'role'"),
        ("meshwright_plan: 1\naxes: {}", "'axes' maps each axis name"),
        ("meshwright_plan: 99\naxes: {depth: {size: 2, role: depth}}", "plan version 99"),
        ("axes: {depth: {size: 2, role: depth}}", "exactly the keys 'meshwright_plan' and 'axes'"),
        ("- 1", "exactly the keys"),
        ("a: [", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=says) as caught:
        mw.Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.yaml: no such plan file"):
        mw.Plan.load(tmp_path / "absent.yaml")

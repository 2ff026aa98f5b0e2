"""What a store hands out is what a direct read gives, on several ranks, and what it moves is what the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

import store_jobs
from meshwright.cluster.launch import launch
from meshwright.parallel.transport import VARIABLE
from store_jobs import memory_gained, serve, serve_augmented

SAME = ((5, 4, 6),) * 7
DIFFERENT = ((5, 4, 6), (3, 7, 2), (6, 1, 5), (1, 1, 1), (7, 6, 3))


@pytest.mark.parametrize(
    ("plan", "reading", "shapes", "size"),
    [
        ("n2", None, SAME, 2),
        ("n2", None, SAME, 3),
        ("n2", None, DIFFERENT, 1),
        ("d2", None, SAME, 2),
        ("d2", None, DIFFERENT, 1),
        ("d2", "n2", SAME, 2),
        ("n2", "d2", SAME, 3),
        ("d2", "n2", DIFFERENT, 1),
    ],
)
def test_two_ranks(plan: str, reading: str | None, shapes: tuple[tuple[int, int, int], ...], size: int) -> None:
    results = launch(serve, 2, (plan, reading, shapes, size), timeout_s=60)
    assert all(result["again"] == 0 for result in results), "read once"
    stays = reading is None and (plan == "d2" or size == 1)  # one group, or one that gets every batch
    assert (sum(result["sent"] for result in results) == 0) == stays


@pytest.mark.parametrize(
    ("plan", "reading", "shapes", "size", "halo"),
    [
        ("n4", None, SAME, 4, (0, 0, 0)),
        ("n4", None, SAME, 6, (0, 0, 0)),
        ("n2d2", None, SAME, 3, (0, 0, 0)),
        ("n2d2", None, DIFFERENT, 1, (0, 0, 0)),
        ("n2d2", None, SAME, 2, (1, 2, 0)),
        ("d4", "n4", SAME, 4, (0, 0, 0)),
        ("n2d2", "h2w2", SAME, 3, (1, 1, 1)),
        ("h2w2", "n2d2", DIFFERENT, 1, (0, 1, 0)),
        ("d4", None, DIFFERENT, 1, (2, 0, 0)),
    ],
)
def test_four_ranks(
    plan: str, reading: str | None, shapes: tuple[tuple[int, int, int], ...], size: int, halo: tuple[int, int, int]
) -> None:
    results = launch(serve, 4, (plan, reading, shapes, size, 3, store_jobs.MANY, None, halo), timeout_s=60)
    assert all(result["again"] == 0 for result in results)


def test_messages_of_the_backend_carry_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "messages")
    launch(serve, 4, ("n2d2", None, SAME, 3), timeout_s=60)


def test_a_small_budget_spills_and_serves_the_same(tmp_path: Path) -> None:
    """All ranks together hold less than the samples; what does not fit comes back from disk, not from the source."""
    shapes = ((16, 16, 16),) * 12
    results = launch(serve, 2, ("n2", None, shapes, 2, 3, 500_000, str(tmp_path)), timeout_s=60)
    assert all(result["again"] == 0 and result["from_disk"] > 0 for result in results), results
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_it_is_read_again() -> None:
    shapes = ((16, 16, 16),) * 12
    results = launch(serve, 2, ("d2", None, shapes, 2, 3, 300_000), timeout_s=60)
    assert all(result["spilled"] == 0 and result["again"] > 0 for result in results), results


@pytest.mark.parametrize("plan", ["n2", "d2"])
def test_memory_stays_within_the_budget(plan: str, tmp_path: Path) -> None:
    """Resident bytes, as the system counts them: two thirds of a rank's share are kept, the rest is on disk."""
    budget = 64 << 20
    for gained, counted in launch(memory_gained, 2, (plan, 96, 128, budget, str(tmp_path)), timeout_s=60):
        assert gained <= 1.05 * budget, gained / budget
        assert gained >= 0.5 * budget, "or it measures nothing"
        assert counted <= budget


@pytest.mark.parametrize(
    ("ranks", "plan", "reading", "size"),
    [
        (1, "one", None, 2),
        (2, "d2", None, 1),
        (2, "n2", None, 3),
        (4, "n2d2", None, 2),
        (4, "d4", "n4", 3),
        (4, "h2w2", "n2d2", 1),
    ],
)
def test_augmented_samples_come_out_of_memory(ranks: int, plan: str, reading: str | None, size: int) -> None:
    launch(serve_augmented, ranks, (plan, reading, size), timeout_s=60)

"""Cubes are slices of universes, whoever reads which part of them; each byte of a file is decoded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import worlds

import meshwright as mw
import universes as folders
from cosmostudy import symmetries
from cosmostudy.batches import Scale, part
from cosmostudy.cubes import Cubes
from meshwright.errors import DataError

PLANS = (
    mw.Plan.uniform(depth=2),
    mw.Plan.uniform(data=2, height=3),
    mw.Plan.uniform(depth=2, height=2, width=3),
    mw.Plan.uniform(data=5, depth=2),
)


@pytest.mark.parametrize("size", [16, 32])
def test_samples_are_the_cubes_of_the_universes(universes: Path, size: int) -> None:
    source, cells = Cubes(universes, size, 1, 3), worlds.VOXELS // size
    assert len(source) == len(source.names) == 3 * cells**3
    for index in range(len(source)):
        universe, cube = divmod(index, cells**3)
        d, h, w = (size * at for at in np.unravel_index(cube, (cells,) * 3))
        expected = worlds.whole(universes, 1 + universe)[:, d : d + size, h : h + size, w : w + size]
        sample = source.read(index, [slice(0, size)] * 3)
        assert sample["image"].dtype == torch.int16
        assert np.array_equal(sample["image"][0].numpy(), expected)
        assert torch.equal(sample["target"][0], source.targets[universe])


def test_targets_are_the_parameters_over_their_ranges(universes: Path) -> None:
    source, settings = Cubes(universes, 32, 2, 3), folders.load(universes)
    for universe in range(3):
        values = settings.parameters(2 + universe).array()
        for value, target, ends in zip(values, source.targets[universe], vars(settings.ranges).values(), strict=True):
            assert ends[0] + (float(target) + 1) / 2 * (ends[1] - ends[0]) == pytest.approx(value, abs=1e-7)
    assert source.targets.abs().max() <= 1


def test_a_rank_reads_its_part_once_and_no_other(universes: Path) -> None:
    source = Cubes(universes, 32, 0, 2)
    half = [slice(0, 32), slice(0, 16), slice(0, 32)]
    for _ in range(2):
        for index in range(2):
            source.read(index, half)
    # files are cut into chunks of 16³, blocks are 32³ here: a universe is one block
    assert source.stats.read_bytes == 2 * 2 * worlds.VOXELS**3
    assert source.stats.ideal_read_bytes == source.stats.read_bytes


def test_blocks_end_where_chunks_do(universes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmostudy.cubes.BLOCK", 16)
    source = Cubes(universes, 32, 0, 1)
    box = [slice(3, 15), slice(0, 32), slice(17, 20)]
    assert np.array_equal(source.counts(0, box), worlds.whole(universes, 0)[(slice(None), *box)])
    assert source.stats.read_bytes == 2 * 2 * 16**3  # one chunk along D and W, two along H
    source.counts(0, [slice(0, 32)] * 3)
    assert source.stats.read_bytes == 2 * worlds.VOXELS**3


def test_a_folder_with_too_few_universes_is_refused(universes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is to hold 7 universes; 8 are needed"):
        Cubes(universes, 16, 4, 4)
    with pytest.raises(DataError, match=r"do not fall into cubes of 24³"):
        Cubes(universes, 24, 0, 1)
    with pytest.raises(DataError, match=r"universes\.yaml does not exist"):
        Cubes(tmp_path, 16, 0, 1)


def test_a_renamed_file_is_found_out(universes: Path, tmp_path: Path) -> None:
    for file in universes.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "universe_00001.h5").unlink()
    (tmp_path / "universe_00001.h5").symlink_to(universes / "universe_00004.h5")
    source, box = Cubes(tmp_path, 32, 0, 3), [slice(0, 32)] * 3
    source.counts(0, box)
    source.counts(2, box)
    with pytest.raises(DataError, match=r"universe_00001\.h5 holds a universe of parameters .* Was the file renamed"):
        source.counts(1, box)


def test_the_48_symmetries_are_48_and_the_first_changes_nothing() -> None:
    cube = {"image": torch.arange(27).reshape(1, 3, 3, 3)}
    box = tuple(symmetries.transforms.whole((3, 3, 3)))
    found = {
        tuple(symmetries.symmetry(number).build([cube], box, (3, 3, 3))["image"].flatten().tolist())
        for number in range(symmetries.COUNT)
    }
    assert len(found) == symmetries.COUNT == 48
    assert torch.equal(symmetries.symmetry(0).build([cube], box, (3, 3, 3))["image"], cube["image"])


def test_what_is_drawn_depends_on_the_place_and_not_on_the_batch() -> None:
    drawn = symmetries.draw(3, 0, 4000)
    assert symmetries.draw(3, 100, 7) == drawn[100:107]
    assert symmetries.draw(4, 0, 100) != drawn[:100]
    counts = np.bincount(drawn, minlength=48)
    assert counts.min() > 40  # 83 expected, deviation 9
    assert counts.max() < 130


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_parts_of_a_batch_are_slices_of_the_whole_batch(universes: Path, plan: mw.Plan) -> None:
    source = Cubes(universes, 16, 0, 3)
    indices = (5, 17, 0, 23)
    numbers = symmetries.draw(1, 8, len(indices))
    image, target = part(source, mw.Plan.uniform(), 0, indices, numbers)
    cubes = [source.read(index, [slice(0, 16)] * 3)["image"][0] for index in indices]
    for own, cube, number in zip(image, cubes, numbers, strict=True):
        turn = symmetries.symmetry(number)
        assert torch.equal(
            own, turn.build([{"image": cube}], symmetries.transforms.whole((16,) * 3), (16,) * 3)["image"]
        )
    for rank in range(plan.ranks):
        mine, wanted = part(source, plan, rank, indices, numbers)
        spans = mw.interval(tuple(image.shape), plan, rank)
        assert torch.equal(mine, image[spans])
        assert torch.equal(wanted, target[spans[0]])


def test_inputs_have_mean_0_and_deviation_1(universes: Path) -> None:
    source = Cubes(universes, 32, 0, worlds.TRAIN)
    counts = torch.stack([source.read(index, [slice(0, 32)] * 3)["image"] for index in range(worlds.TRAIN)])
    scaled = Scale.measured(source).table(torch.float64)[counts.long()]
    assert abs(scaled.mean().item()) < 1e-12
    assert scaled.std(unbiased=False).item() == pytest.approx(1, abs=1e-12)
    few = scaled[counts == 0].unique(), scaled[counts == 1].unique(), scaled[counts == 3].unique()
    zero, one, three = (value.item() for value in few)
    assert (three - zero) / (one - zero) == pytest.approx(2)  # log 4 is twice log 2

"""A user's own folder: every layout of the tutorial gives the same samples, and what is ambiguous is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import zarr

from meshwright import config
from meshwright.data.folder import find_pairs
from meshwright.data.source import batch_shape, read_batch
from meshwright.data.volumes import hold_out, make_pairs
from meshwright.errors import ConfigError, DataError
from meshwright.plan.plan import Plan, interval
from meshwright.train.job import settled, sources
from training_jobs import job, losses, train, write_pairs

SHAPE = (7, 6, 5)
COUNT = 3
random = np.random.default_rng(3)
IMAGES = [random.integers(-900, 1200, SHAPE).astype(np.int16) for _ in range(COUNT)]
LABELS = [(image > 200).astype(np.uint8) + (image > 900) for image in IMAGES]


def nifti(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    nibabel.Nifti1Image(array.T, np.eye(4)).to_filename(path)


def npy(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    np.save(path, array)


def two_folders(folder: Path) -> Path:
    for case in range(COUNT):
        nifti(folder / f"images/case{case}.nii.gz", IMAGES[case])
        npy(folder / f"labels/case{case}.npy", LABELS[case])
    (folder / "images/.hidden.nii").touch()
    (folder / "images/readme.txt").touch()
    return folder


def decathlon(folder: Path) -> Path:
    for case in range(COUNT):
        nifti(folder / f"imagesTr/case{case}_0000.nii.gz", IMAGES[case])
        nifti(folder / f"labelsTr/case{case}.nii.gz", LABELS[case])
    return folder


def two_endings(folder: Path) -> Path:
    for case in range(COUNT):
        npy(folder / f"{case}_image.npy", IMAGES[case])
        with h5py.File(folder / f"{case}_label.h5", "w") as file:
            file["anything"] = LABELS[case]
    return folder


def hdf5_files(folder: Path) -> Path:
    for case in range(COUNT):
        with h5py.File(folder / f"{case}.h5", "w") as file:
            file.create_dataset("image", data=IMAGES[case], chunks=(2, 2, 2), compression="gzip")
            file["label"] = LABELS[case][None]
    return folder


def hdf5_groups(folder: Path) -> Path:
    with h5py.File(folder / "all.h5", "w") as file:
        for case in range(COUNT):
            file[f"case{case}/image"], file[f"case{case}/label"] = IMAGES[case], LABELS[case]
    return folder / "all.h5"


def hdf5_stack(folder: Path) -> Path:
    with h5py.File(folder / "all.h5", "w") as file:
        file.create_dataset("image", data=np.stack(IMAGES), chunks=(1, 3, 3, 3))
        file["label"] = np.stack(LABELS)
    return folder


def zarr_files(folder: Path) -> Path:
    for case in range(COUNT):
        group = zarr.open_group(folder / f"{case}.zarr", mode="w", zarr_format=2 + case % 2)  # type: ignore[arg-type]
        group.create_array("image", data=IMAGES[case], chunks=(3, 3, 3))
        group.create_array("label", data=LABELS[case], chunks=(3, 3, 3))
    return folder


def zarr_groups(folder: Path) -> Path:
    root = zarr.open_group(folder / "all.zarr", mode="w")
    for case in range(COUNT):
        group = root.create_group(f"case{case}")
        group.create_array("image", data=IMAGES[case])
        group.create_array("label", data=LABELS[case])
    return folder / "all.zarr"


LAYOUTS: list[Callable[[Path], Path]] = [
    two_folders, decathlon, two_endings, hdf5_files, hdf5_groups, hdf5_stack, zarr_files, zarr_groups,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parts(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    source = make_pairs(find_pairs(layout(tmp_path)))
    assert len(source.names) == len(set(source.names)) == COUNT
    assert source.classes == ("0", "1", "2")  # counted
    assert source.fields["image"].sizes == (1,)
    plan = Plan.uniform(data=2, depth=2, width=2)
    indices = range(COUNT)
    shape = batch_shape(source, indices)
    assert shape == (COUNT, 1, *SHAPE)
    for rank in range(plan.ranks):
        spans = interval(shape, plan, rank)
        part = read_batch(source, indices, spans)
        for row, index in enumerate(indices[spans[0]]):
            image = IMAGES[index].astype(np.float64)
            expected = (image - image[image != 0].mean()) / image[image != 0].std()
            np.testing.assert_allclose(part.image[row, 0].numpy(), expected[spans[2:]], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(part.label[row].numpy(), LABELS[index][spans[2:]])
    train, held = hold_out(source)
    assert (train.classes, len(train.names), len(held.names)) == (source.classes, 2, 1)


def four_channels(folder: Path, how: str) -> Path:
    both = [np.stack([image, image // 3 + 7]) for image in IMAGES]
    for case in range(COUNT):
        if how == "files":
            for channel in range(2):
                nifti(folder / f"images/case{case}_000{channel}.nii.gz", both[case][channel])
        elif how == "4-D":
            nifti(folder / f"images/case{case}.nii.gz", both[case])
        else:
            npy(folder / f"images/case{case}.npy", both[case])
        npy(folder / f"labels/case{case}.npy", LABELS[case])
    return folder


@pytest.mark.parametrize("how", ["files", "4-D", "npy"])
def test_channels_are_normalised_each_by_itself(how: str, tmp_path: Path) -> None:
    source = make_pairs(find_pairs(four_channels(tmp_path, how)))
    spans = (slice(2, 6), slice(0, 6), slice(1, 4))
    assert (len(source.names), batch_shape(source, [0, 1])) == (COUNT, (2, 2, *SHAPE))
    part = source.read(1, spans)
    for channel, stored in enumerate((IMAGES[1], IMAGES[1] // 3 + 7)):
        image = stored.astype(np.float64)
        expected = (image - image[image != 0].mean()) / image[image != 0].std()
        np.testing.assert_allclose(part.image[0, channel].numpy(), expected[spans], rtol=1e-5, atol=1e-6)
    given = make_pairs(find_pairs(tmp_path), intensity=(10.0, 4.0)).read(1, spans)
    np.testing.assert_allclose(given.image[0, 1].numpy(), ((IMAGES[1] // 3 + 7)[spans] - 10) / 4, rtol=1e-6)


def test_channels_of_one_case_have_the_numbers_and_the_orientation_of_all(tmp_path: Path) -> None:
    four_channels(tmp_path, "files")
    nibabel.Nifti1Image(IMAGES[1].T, np.diag([-1.0, 1, 1, 1])).to_filename(tmp_path / "images/case1_0001.nii.gz")
    with pytest.raises(DataError, match=r"case1_0000.nii.gz is stored RAS but .*case1_0001.nii.gz LAS"):
        find_pairs(tmp_path)
    (tmp_path / "images/case1_0001.nii.gz").rename(tmp_path / "images/case1_0002.nii.gz")
    with pytest.raises(DataError, match=r"case case1 has the channels \['_0000', '_0002'\], the first case .*'_0001'"):
        find_pairs(tmp_path)


def second(case: int) -> np.ndarray:
    """What t2 is beside the image of a case, t1."""
    return IMAGES[case] // 3 + 7


def t1_and_t2(folder: Path, how: str) -> Path:
    for case in range(COUNT):
        words = {"t1": IMAGES[case], "t2": second(case), "flair": IMAGES[case][:2]}
        if how == "folders":
            for word, array in words.items():
                nifti(folder / f"images/case{case}_{word}.nii.gz", array)
            npy(folder / f"labels/case{case}.npy", LABELS[case])
        elif how == "endings":
            for word, array in {**words, "label": LABELS[case]}.items():
                npy(folder / f"case{case}_{word}.npy", array)
        elif how == "files":
            with h5py.File(folder / f"{case}.h5", "w") as file:
                for word, array in {**words, "label": LABELS[case][None]}.items():
                    file[word] = array
    if how == "stack":
        group = zarr.open_group(folder / "all.zarr", mode="w")
        group.create_array("t1", data=np.stack(IMAGES))
        group.create_array("t2", data=np.stack([second(case) for case in range(COUNT)]))
        group.create_array("label", data=np.stack(LABELS))
    return folder


@pytest.mark.parametrize("how", ["folders", "endings", "files", "stack"])
def test_several_images_are_channels_in_the_order_asked_for(how: str, tmp_path: Path) -> None:
    t1_and_t2(tmp_path, how)
    spans = (slice(2, 6), slice(0, 6), slice(1, 4))
    ways = [(("t2", "t1"), [second, IMAGES.__getitem__]), (("t1",), [IMAGES.__getitem__])]
    for words, made in ways[: 1 if how == "folders" else 2]:  # of one word, all files in images/ are images
        settings = config.load(None, [f"data.path={tmp_path}", f"data.image=[{', '.join(words)}]"])
        train, held = sources(settings)
        assert (len(train.names), len(held.names), train.fields["image"].sizes) == (2, 1, (len(words),))
        part = train.read(1, spans)
        for channel, stored in enumerate(made):
            image = stored(1).astype(np.float64)
            expected = (image - image[image != 0].mean()) / image[image != 0].std()
            np.testing.assert_allclose(part.image[0, channel].numpy(), expected[spans], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(part.label[0].numpy(), LABELS[1][spans])


def test_several_images_by_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t1_and_t2(tmp_path, "endings")
    monkeypatch.chdir(tmp_path)
    words = ["data.name=folder", "data.images=['*_t1.npy', '*_t2.npy']", "data.labels='*_label.npy'"]
    known = sources(config.load(None, words))[0]
    assert (known.fields["image"].sizes, known.names) == ((2,), ("case0_label.npy", "case1_label.npy"))
    written = settled(config.load(None, words), known)
    assert written.data.images == (f"{tmp_path}/*_t1.npy", f"{tmp_path}/*_t2.npy")
    assert config.read(config.Config, written.as_dict(), "again") == written
    (tmp_path / "case1_t2.npy").unlink()
    with pytest.raises(DataError, match=r"data.images '\*_t2.npy' finds 2 files but data.labels .* finds 3"):
        sources(config.load(None, words))


def test_a_case_without_one_of_several_images_is_named(tmp_path: Path) -> None:
    t1_and_t2(tmp_path, "endings")
    (tmp_path / "case1_t2.npy").unlink()
    with pytest.raises(DataError, match=r"case1_t1.npy: there is no case1_t2.\* beside it; each case needs one"):
        find_pairs(tmp_path, ("t1", "t2"))
    with pytest.raises(DataError, match=r"case0_t1.npy has shape \(7, 6, 5\) but .*case0_flair.npy has \(2, 6, 5\)"):
        find_pairs(tmp_path, ("t1", "flair"))
    bad: list[str] = []
    assert len(find_pairs(tmp_path, ("t1", "t2"), bad=bad)) == len(bad) + 1 == 2
    for words in ((), ("t1", "t1"), ("t1", "label")):
        with pytest.raises(DataError, match=r"data.image = .*: one word or more, each once, are needed"):
            find_pairs(tmp_path, words)


def test_other_words_can_be_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"], file["truth"] = IMAGES[0], LABELS[0]
    npy(tmp_path / "b_raw.npy", IMAGES[1])
    with pytest.raises(DataError, match=r"no pairs of image and label found. Known are images/ \+ labels/"):
        find_pairs(tmp_path)
    with pytest.raises(DataError, match=r"b_raw.npy: there is no b_truth.\* beside it"):
        find_pairs(tmp_path, "raw", "truth")
    (tmp_path / "b_raw.npy").unlink()
    assert [pair.name for pair in find_pairs(tmp_path, "raw", "truth")] == ["a.h5"]


def test_what_is_missing_or_ambiguous_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path: there is no .*nowhere"):
        find_pairs(tmp_path / "nowhere")
    two_folders(tmp_path)
    two_endings(tmp_path)
    with pytest.raises(DataError, match=r"3 pair\(s\) as images/ \+ labels/ and 3 pair\(s\) as \*_image \+ \*_label"):
        find_pairs(tmp_path)
    for path in tmp_path.glob("*_*"):
        path.unlink()
    npy(tmp_path / "images/case1.npy", IMAGES[1])
    with pytest.raises(DataError, match=r"case1.nii.gz and .*case1.npy|case1.npy and .*case1.nii.gz"):
        find_pairs(tmp_path)
    (tmp_path / "images/case1.npy").rename(tmp_path / "images/case9.npy")
    with pytest.raises(DataError, match=r"case9.npy: there is no label case9.\* in .*labels"):
        find_pairs(tmp_path)
    (tmp_path / "images/case9.npy").unlink()
    npy(tmp_path / "labels/case7.npy", LABELS[0])
    with pytest.raises(DataError, match=r"case7.npy: there is no image for this label"):
        find_pairs(tmp_path)
    with h5py.File(tmp_path / "lonely.h5", "w") as file:
        file["image"] = IMAGES[0]
    with pytest.raises(DataError, match=r"lonely.h5::image: there is no dataset 'label' beside it; it has: image"):
        find_pairs(tmp_path / "lonely.h5")


def test_pairs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    npy(tmp_path / "a_image.npy", IMAGES[0])
    npy(tmp_path / "a_label.npy", LABELS[0][1:])
    with pytest.raises(DataError, match=r"a_image.npy has shape \(7, 6, 5\) but .*a_label.npy has \(6, 6, 5\)"):
        find_pairs(tmp_path)
    npy(tmp_path / "a_label.npy", LABELS[0])
    npy(tmp_path / "b_image.npy", np.stack([IMAGES[0]] * 2))
    npy(tmp_path / "b_label.npy", LABELS[0])
    with pytest.raises(DataError, match=r"a_image.npy has 1 channel\(s\) but .*b_image.npy has 2"):
        make_pairs(find_pairs(tmp_path))
    for value, words in ((0, "nothing but 0"), (-1, "label value -1"), (300, "label value 300")):
        for name in "ab":
            npy(tmp_path / f"{name}_image.npy", IMAGES[0])
            npy(tmp_path / f"{name}_label.npy", np.full(SHAPE, value, np.int16))
        with pytest.raises(DataError, match=words):
            make_pairs(find_pairs(tmp_path))


def test_the_configuration_takes_a_path_alone(tmp_path: Path) -> None:
    settings = config.load(None, [f"data.path={zarr_files(tmp_path)}"])
    known, _ = sources(settings)
    written = settled(settings, known)
    assert (written.data.name, written.data.classes) == ("folder", ("0", "1", "2"))
    assert sources(written)[0].names == known.names
    with pytest.raises(ConfigError, match=r"data.path = .* and data.images are both set"):
        sources(config.override(settings, "data.images=x*"))


def test_file_patterns_hold_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written down for a resumed run names the files wherever that begins."""
    monkeypatch.chdir(tmp_path)
    known = sources(config.load(None, [f"data.path={zarr_files(tmp_path)}"]))[0]
    settings = config.load(
        None, ["data.name=folder", "data.images=scans/*_t1.nii.gz", "data.labels=scans/*_seg.nii.gz"]
    )
    written = settled(settings, known).data
    assert (written.images, written.labels) == (f"{tmp_path}/scans/*_t1.nii.gz", f"{tmp_path}/scans/*_seg.nii.gz")


def test_bad_samples_are_left_out_if_that_is_asked_for(tmp_path: Path) -> None:
    folder = two_folders(tmp_path)
    settings = config.load(None, [f"data.path={folder}", "data.on_bad=skip"])
    assert [len(source.names) for source in sources(settings)] == [2, 1]
    for name, array in (("4", IMAGES[0][1:]), ("5", IMAGES[0]), ("6", np.stack([IMAGES[0]] * 2)), ("7", IMAGES[0])):
        npy(folder / f"images/case{name}.npy", array)
        if name != "7":
            npy(folder / f"labels/case{name}.npy", LABELS[0])
    data = (folder / "images/case5.npy").read_bytes()
    (folder / "images/case5.npy").write_bytes(data[:-1])
    bad: list[str] = []
    assert [len(source.names) for source in sources(settings, bad)] == [2, 1]
    reasons = ("case4.npy has shape", "case5.npy: truncated", "case7.npy: there is no label", "case6.npy has 2")
    assert all(words in text for words, text in zip(reasons, bad, strict=True))
    for way in (f"data.path={folder}", "data.on_bad=stop"), ("data.path=null", "data.on_bad=stop"):
        patterns = ["data.name=folder", f"data.images={folder}/images/*.n*", f"data.labels={folder}/labels/*.n*"]
        with pytest.raises(DataError, match=r"case4.npy has shape|finds 7 files but data.labels .* finds 6"):
            sources(config.load(None, [*(patterns if "null" in way[0] else []), *way]))
    (folder / "images/case7.npy").unlink()
    bad.clear()
    found = sources(config.load(None, [*patterns, "data.on_bad=skip"]), bad)
    assert (len(found[0].names), len(bad)) == (2, 3)
    everything = two_folders(tmp_path / "none") if (tmp_path / "none").mkdir() is None else tmp_path
    for path in everything.glob("*/*.n*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no pairs of image and label found.*left out: .*case0"):
        sources(config.load(None, [f"data.path={everything}", "data.on_bad=skip"]))


def test_a_job_on_other_formats_learns_the_same(tmp_path: Path) -> None:
    """The small job of the training tests, from NIfTI patterns, and from HDF5 and Zarr by `data.path` alone."""
    for name in ("nifti", "other", "channels"):
        (tmp_path / name).mkdir()
    settings = [*write_pairs(tmp_path / "nifti"), "train.steps=2"]
    for case in range(3):
        image, label = (
            np.asarray(nibabel.load(tmp_path / f"nifti/{kind}{case}.nii.gz").dataobj).T for kind in ("image", "label")
        )
        with h5py.File(tmp_path / f"other/{case}.h5", "w") as file:
            file.create_dataset("image", data=image, chunks=(4, 4, 4), compression="gzip")
            file.create_dataset("label", data=label)
        group = zarr.open_group(tmp_path / f"channels/{case}.zarr", mode="w")
        group.create_array("image", data=np.stack([image, -image]), chunks=(1, 5, 5, 5))
        group.create_array("label", data=label, chunks=(5, 5, 5))
    (tmp_path / "other/3.h5").write_bytes(b"cut off")
    shared = [setting for setting in settings if not setting.startswith("data.")]
    train(job(settings, ranks=2), tmp_path / "a")
    train(job(shared, f"data.path={tmp_path}/other", "data.on_bad=skip", ranks=2), tmp_path / "b")
    train(job(shared, f"data.path={tmp_path}/channels", "plan.depth=1", "plan.width=2", ranks=2), tmp_path / "c")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [json.loads((tmp_path / run / "summary.json").read_text())["left_out"] for run in "abc"] == [0, 1, 0]
    assert len(losses(tmp_path / "c")) == 2

"""Any torch dataset of whole samples: a rank gets the slice of its item, and the stats say what that costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from meshwright.data.counted import Counted
from meshwright.data.dataset import DatasetSource
from meshwright.data.kept import Kept
from meshwright.data.source import batch_shape, read_batch, widened
from meshwright.errors import DataError
from meshwright.plan.plan import Plan, interval

SHAPE = (7, 5, 6)


class Scans(Dataset[Any]):
    """int16 images of two channels, labels, a mask on the grid and two numbers of the patient."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng(index)
        image = random.integers(-999, 999, (2, *SHAPE), dtype=np.int16)
        return {
            "image": image,
            "label": torch.from_numpy(image[0] > 0),
            "mask": (image[1] > 0).astype(">f8"),
            "patient": torch.tensor([1.5, float(index)]),
            "file": f"scan{index}.dcm",
        }


def scans(**options: Any) -> DatasetSource:
    return DatasetSource(Scans(), ("no", "yes"), fields=("image", "label", "mask", "patient"), **options)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.fixed_dictionaries({axis: st.integers(1, 3) for axis in ("data", "depth", "height", "width")}),
    rank=st.integers(0, 80),
    halo=st.integers(0, 2),
)
def test_a_part_is_the_slice_of_the_item(sizes: dict[str, int], rank: int, halo: int) -> None:
    source, plan = scans(layouts={"mask": "DHW"}), Plan.uniform(**sizes)
    shape = batch_shape(source, (2, 0, 1))
    assert shape == (3, 2, *SHAPE)
    n, c, *own = interval(shape, plan, rank % plan.ranks)
    box = widened(own, SHAPE, halo)
    part = read_batch(source, (2, 0, 1), (n, c, *box))
    items = [Scans()[index] for index in (2, 0, 1)[n]]
    for row, item in enumerate(items):
        np.testing.assert_array_equal(part.image[row].numpy(), item["image"][(slice(None), *box)].astype(np.float32))
        assert torch.equal(part.label[row], item["label"][box].to(torch.uint8))
        np.testing.assert_array_equal(part["mask"][row].numpy(), item["mask"][box])
        assert torch.equal(part["patient"][row], item["patient"])
    assert (part.image.dtype, part.label.dtype, len(part)) == (torch.float32, torch.uint8, 4)
    voxels = np.prod(SHAPE)
    assert part.stats.read_bytes == len(items) * (voxels * (4 + 1 + 8) + 8)  # the whole item
    inside = np.prod([span.stop - span.start for span in box])
    assert part.stats.ideal_read_bytes == len(items) * (inside * (4 + 1 + 8) + 8)


def test_a_tuple_is_image_and_label_and_a_part_keeps_no_whole_item() -> None:
    whole = torch.randn(4, 4, 4)
    source = DatasetSource([(whole, (whole > 0).long())] * 2, ("no", "yes"))  # type: ignore[arg-type]
    part = source.read(1, (slice(0, 2), slice(0, 4), slice(1, 3)))
    assert torch.equal(part.image[0, 0], whole[:2, :, 1:3])
    assert part.image.untyped_storage().nbytes() == part.image.numel() * 4
    assert (source.names[1], source.shape(1), source.spacing_mm(0)) == ("list[1]", (4, 4, 4), (1.0, 1.0, 1.0))


def test_what_does_not_fit_is_named() -> None:
    image = torch.zeros(3, 4, 5)
    for items, words in (
        ([], "list has no items"),
        ([image], r"list\[0\] is a Tensor; a mapping"),
        ([{"label": image}], "a mapping with an 'image'"),
        ([{"image": "scan.nii"}], "image is a str; numbers are expected"),
        ([{"image": image[0]}], r"\[0\]: image has shape \(4, 5\), but its dims are named 'CDHW'"),
        ([(image, image[0])], "label has shape"),
    ):
        with pytest.raises(DataError, match=words):
            DatasetSource(items)  # type: ignore[arg-type]
    everything = (slice(0, 3), slice(0, 4), slice(0, 5))
    for second, words in (
        ((image[:2], image[:2]), r"list\[1\] has shape \(2, 4, 5\), not \(3, 4, 5\)"),
        ((image, image[:2]), r"list\[1\]: label has shape \(2, 4, 5\); \(3, 4, 5\) is expected"),
        ({"image": image}, r"list\[1\] has the fields \['image'\], item 0 has"),
        ((image, image + 0.5), "label values from 0.5 to 0.5"),
        ((image, image - 1), "label values from -1"),
        ((image, (image + 256).to(torch.uint16)), "label values from 256"),
    ):
        with pytest.raises(DataError, match=words):
            DatasetSource([(image, image), second]).read(1, everything)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"the box .* is no part of shape"):
        DatasetSource([(image, image)]).read(0, (slice(0, 4), slice(0, 4), slice(0, 5)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no field 'age'; it has image, label, mask, patient, file"):
        DatasetSource(Scans(), fields=("image", "age"))
    with pytest.raises(DataError, match="shapes has 1 sizes"):
        scans(shapes=[SHAPE])


def test_reads_are_counted_until_they_are_taken() -> None:
    counted = Counted(scans())
    kept = Kept(counted)
    spans = tuple(slice(0, size) for size in SHAPE)
    first = kept.read(0, spans)
    kept.read(0, spans)
    assert counted.take() == first.stats
    assert counted.take().read_bytes == 0
    assert (kept.names, kept.classes, kept.fields) == (counted.names, ("no", "yes"), counted.fields)
    assert (kept.shape(1), kept.spacing_mm(1)) == (SHAPE, (1.0, 1.0, 1.0))


def test_a_field_keeps_its_type_and_labels_may_be_uint16() -> None:
    image, everything = torch.zeros(3, 4, 5), (slice(0, 3), slice(0, 4), slice(0, 5))
    label = torch.ones(3, 4, 5, dtype=torch.uint16)
    assert DatasetSource([(image, label)]).read(0, everything).label.sum() == 60
    source = DatasetSource([{"image": image, "age": torch.tensor([3])}, {"image": image, "age": torch.tensor([3.7])}])
    with pytest.raises(DataError, match=r"list\[1\]: age is torch.float32, in item 0 torch.int64"):
        source.read(1, everything)

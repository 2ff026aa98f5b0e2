"""Any torch `Dataset` whose items are whole samples, as a `VolumeSource`: each rank takes its part of what it is given.

Every rank that owns a piece of a sample makes the whole sample: this is what sample-parallel reading costs, and the
stats say it (`read_bytes` counts the whole item, `ideal_read_bytes` the part). For large samples use files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from meshwright.data.source import Field, Part, kept
from meshwright.errors import DataError

_SPACE = "DHW"


class Items(Protocol):
    """What a map-style `torch.utils.data.Dataset` offers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class DatasetSource:
    """`dataset[i]` is a mapping of named tensors or arrays, or a tuple (image, label), the same fields for every i.

    `image` is [C, D, H, W] (or [D, H, W]: one channel) and becomes float32; `label` is [D, H, W] of whole numbers below
    256 and becomes uint8. Further fields name their dims in `layouts`, such as {"mask": "DHW", "age": "K"}; a field
    that is not named there belongs to the sample as a whole and is not cut. `fields` picks those that are wanted.

    The sizes are those of item 0 unless `shapes` says them for each item. Items must not depend on the rank or on when
    they are asked for. Raises `DataError`.
    """

    def __init__(
        self,
        dataset: Items,
        classes: Sequence[str] = (),
        *,
        fields: Sequence[str] | None = None,
        layouts: Mapping[str, str] | None = None,
        shapes: Sequence[tuple[int, int, int]] | None = None,
        spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        if len(dataset) == 0:
            raise DataError(f"{type(dataset).__name__} has no items")
        self._dataset, self._spacing_mm, self._wanted = dataset, spacing_mm, fields
        self.classes = tuple(classes)
        self.names = tuple(f"{type(dataset).__name__}[{index}]" for index in range(len(dataset)))
        self._layouts = {"image": "CDHW", "label": "DHW"} | dict(layouts or {})
        first = self._item(0)
        self.fields: Mapping[str, Field] = {name: self._field(name, tensor) for name, tensor in first.items()}
        size = self._volume(first, 0)
        if shapes is not None and (len(shapes) != len(dataset) or tuple(shapes[0]) != size):
            raise DataError(
                f"shapes has {len(shapes)} sizes, for item 0 {tuple(shapes[0]) if shapes else 'none'}; the dataset has "
                f"{len(dataset)} items, and item 0 is {size}"
            )
        self._shapes = [size] * len(dataset) if shapes is None else [(d, h, w) for d, h, w in shapes]

    def shape(self, index: int) -> tuple[int, int, int]:
        """D, H, W of item `index`."""
        return self._shapes[index]

    def spacing_mm(self, index: int) -> tuple[float, float, float]:
        """As given: items do not say it."""
        return self._spacing_mm

    def read(self, index: int, spans: Sequence[slice]) -> Part:
        """The box `spans` of item `index`, which is made whole first. Raises `DataError`."""
        item = self._item(index)
        if item.keys() != self.fields.keys():
            raise DataError(f"{self.names[index]} has the fields {sorted(item)}, item 0 has {sorted(self.fields)}")
        found = self._volume(item, index)
        if found != self.shape(index):
            raise DataError(
                f"{self.names[index]} has shape {found}, not {self.shape(index)}; name the sizes of items in `shapes`"
            )
        if any(not 0 <= span.start <= span.stop <= size for span, size in zip(spans, found, strict=True)):
            raise DataError(f"{self.names[index]}: the box {tuple(spans)} is no part of shape {found} (D, H, W)")
        cut, whole_bytes, ideal_bytes = {}, 0, 0
        space = dict(zip(_SPACE, spans, strict=True))
        for name, tensor in item.items():
            field = self.fields[name]
            if tuple(tensor.shape) != field.shape(found):
                raise DataError(
                    f"{self.names[index]}: {name} has shape {tuple(tensor.shape)}; {field.shape(found)} is expected "
                    f"({field.layout}, as in item 0)"
                )
            part = tensor[tuple(space.get(letter, slice(None)) for letter in field.layout)]
            whole_bytes += tensor.numel() * tensor.element_size()
            ideal_bytes += part.numel() * part.element_size()
            cut[name] = _checked(part, self.names[index]) if name == "label" else part
            if name not in ("image", "label") and part.dtype != field.dtype:
                raise DataError(
                    f"{self.names[index]}: {name} is {part.dtype}, in item 0 {field.dtype}; give all items one type"
                )
            cut[name] = cut[name].to(field.dtype, copy=True)  # a view would keep the whole item
        return kept(cut, read_bytes=whole_bytes, ideal_read_bytes=ideal_bytes, transient_bytes=whole_bytes)

    def _item(self, index: int) -> dict[str, Tensor]:
        item = self._dataset[index]
        if isinstance(item, tuple | list) and len(item) == 2:
            item = dict(zip(("image", "label"), item, strict=True))
        if not isinstance(item, Mapping) or "image" not in item:
            raise DataError(
                f"{self.names[index]} is a {type(item).__name__}; a mapping with an 'image', or a tuple of image and "
                "label, is expected"
            )
        missing = [name for name in self._wanted or () if name not in item]
        if missing:
            raise DataError(f"{self.names[index]} has no field {missing[0]!r}; it has {', '.join(map(str, item))}")
        wanted = item if self._wanted is None else self._wanted
        tensors = {str(name): _tensor(item[name], f"{self.names[index]}: {name}") for name in wanted}
        image = tensors["image"]
        return tensors | {"image": image[None] if image.ndim == 3 else image}

    def _field(self, name: str, tensor: Tensor) -> Field:
        layout = self._layouts.get(name, "KLMNOP"[: tensor.ndim])
        if len(layout) != tensor.ndim:
            raise DataError(
                f"{self.names[0]}: {name} has shape {tuple(tensor.shape)}, but its dims are named {layout!r}"
            )
        sizes = tuple(size for letter, size in zip(layout, tensor.shape, strict=True) if letter not in _SPACE)
        dtype = {"image": torch.float32, "label": torch.uint8}.get(name, tensor.dtype)
        return Field(layout, sizes, dtype)

    def _volume(self, item: Mapping[str, Tensor], index: int) -> tuple[int, int, int]:
        image = item["image"]
        if image.ndim != 4:
            raise DataError(f"{self.names[index]}: image has shape {tuple(image.shape)}; [C, D, H, W] is expected")
        _, d, h, w = image.shape
        return d, h, w


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().as_subclass(Tensor)
    array = np.asarray(value)
    if array.dtype.kind not in "iufb":
        raise DataError(f"{what} is a {type(value).__name__}; numbers are expected")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(array) if array.ndim else array.reshape(1))


def _checked(label: Tensor, name: str) -> Tensor:
    if label.dtype == torch.bool or not label.numel():
        return label
    if label.dtype in (torch.uint16, torch.uint32):  # of which torch finds no minimum
        label = label.to(torch.int64)
    broken = label.is_floating_point() and bool((label != label.floor()).any())
    if broken or label.min() < 0 or label.max() > 255:
        raise DataError(
            f"{name}: label values from {label.min()} to {label.max()}; whole numbers from 0 to 255 are kept"
        )
    return label

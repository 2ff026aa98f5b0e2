"""A part as one run of bytes: what is kept, spilled and sent. The fields are known, so no bytes describe them.

All samples of a source have the same fields; only the box differs. A field without D, H, W (a vector of targets)
belongs to the sample as a whole and goes with each of its boxes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from meshwright.data.buffers import buffer
from meshwright.data.owners import Box, Shape, sizes, spans_in
from meshwright.data.source import Field
from meshwright.errors import DataError

ALIGN_BYTES = 16  # where a part starts, so that any dtype can be viewed in place


class Packing:
    """The fields of a source in the order in which they are packed: wide dtypes first, so that none needs padding."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        for name, field in fields.items():
            if len(set("DHW") & set(field.layout)) not in (0, 3):
                raise DataError(f"field {name!r} has the layout {field.layout!r}; D, H and W go together, or none does")
        self.fields = dict(sorted(fields.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))

    def nbytes(self, box: Shape) -> int:
        """The bytes of a packed part of edges `box`; 0 where there is nothing to pack."""
        total = sum(field_bytes(field, box) for field in self.fields.values())
        return -(-total // ALIGN_BYTES) * ALIGN_BYTES

    def views(self, packed: Tensor, box: Shape) -> dict[str, Tensor]:
        """The fields inside `packed`, without a copy."""
        found, at = {}, 0
        for name, field in self.fields.items():
            size = field_bytes(field, box)
            found[name] = packed[at : at + size].view(field.dtype).view(field.shape(box))
            at += size
        return found

    def room(self, box: Shape) -> tuple[Tensor, dict[str, Tensor]]:
        """A buffer for a part of edges `box`, and its fields inside: what is read into them need not be packed."""
        packed = buffer(self.nbytes(box))
        return packed, self.views(packed, box)

    def rows(self, memory: Tensor, count: int, box: Shape) -> dict[str, Tensor]:
        """The fields [count, …] of so many parts inside `memory`, which has their bytes or more."""
        found, at = {}, 0
        for name, field in self.fields.items():  # wide types first, so that all are aligned
            size = count * field_bytes(field, box)
            found[name] = memory[at : at + size].view(field.dtype).view((count, *field.shape(box)))
            at += size
        return found

    def is_packed(self, packed: Tensor, part: Mapping[str, Tensor], box: Shape) -> bool:
        """Whether the fields of `part` are those inside of `packed`."""
        if packed.numel() != self.nbytes(box) or part.keys() != self.fields.keys():
            return False
        pairs = [(part[name], view) for name, view in self.views(packed, box).items()]
        return all(
            a.is_contiguous() and (a.data_ptr(), a.dtype, a.shape) == (b.data_ptr(), b.dtype, b.shape) for a, b in pairs
        )

    def pack(self, part: Mapping[str, Tensor], box: Shape) -> Tensor:
        """A copy of `part`, its fields as `Field.shape` has them, in one tensor [bytes] of uint8.

        Raises `DataError` for a field that is missing or has another shape or dtype.
        """
        packed = buffer(self.nbytes(box))
        for name, view in self.views(packed, box).items():
            value = part.get(name)
            if value is None or value.shape != view.shape or value.dtype != view.dtype:
                found = "missing" if value is None else f"{value.dtype} {tuple(value.shape)}"
                raise DataError(f"field {name!r} is {found}; the source promises {view.dtype} {tuple(view.shape)}")
            view.copy_(value)
        return packed

    def cut(self, packed: Tensor, held: Box, box: Box) -> Tensor:
        """`box` of a packed part that holds `held`, packed; the same tensor where these are equal."""
        if held == box:
            return packed
        views, edges = self.views(packed, sizes(held)), sizes(box)
        if not all(edges):
            hollow = {name: views[name].new_empty(f.shape(edges)) for name, f in self.fields.items() if f.is_volume}
            return self.pack(views | hollow, edges)
        return self.pack({name: views[name][within(f, box, held)] for name, f in self.fields.items()}, edges)


def field_bytes(field: Field, box: Shape) -> int:
    """The bytes of a field of edges `box`."""
    elements = 1
    for size in field.shape(box):
        elements *= size
    return elements * field.dtype.itemsize


def within(field: Field, box: Box, outer: Box) -> tuple[slice, ...]:
    """The slices of `box` in a field that holds `outer`, one for each of its dims."""
    spans = spans_in(box, outer)  # of an empty box all that it holds, which is nothing
    space = dict(zip("DHW", spans if all(sizes(box)) else [slice(None)] * 3, strict=True))
    return tuple(space.get(letter, slice(None)) for letter in field.layout)

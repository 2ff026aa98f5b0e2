"""Whether volumes that belong together lie on one grid."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.data.arrays import StoredArray
from meshwright.data.nifti import see_matching
from meshwright.data.planes import NiftiArray
from meshwright.errors import DataError


def see_one_grid(arrays: Sequence[StoredArray]) -> None:
    """Raise `DataError`, with both files, unless all arrays have the D, H, W of the first, and what else is known of
    where their voxels lie."""
    for array in arrays[1:]:
        if array.shape[-3:] != arrays[0].shape[-3:]:
            raise DataError(
                f"{arrays[0].name} has shape {arrays[0].shape} but {array.name} has {array.shape} (channels, then "
                "D, H, W); an image and its label must lie on the same grid: resample one to the other"
            )
    see_matching(*(array.volume for array in arrays if isinstance(array, NiftiArray)))

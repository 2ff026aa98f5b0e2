"""Whether volumes that belong together lie on one grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meshwright.data.arrays import StoredArray
from meshwright.data.nifti import APART, see_matching
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
    niftis = [array for array in arrays if isinstance(array, NiftiArray)]
    see_matching(*(array.volume for array in niftis))
    others = [array for array in arrays if not isinstance(array, NiftiArray) and array.spacing_mm is not None]
    known: list[StoredArray] = [*niftis[:1], *others]  # of NIfTI files the affines have been compared
    for array in known[1:]:
        first, other = np.array(known[0].spacing_mm), np.array(array.spacing_mm)
        if (abs(first - other) * (np.array(array.shape[-3:]) - 1) > APART * first).any():
            raise DataError(
                f"{known[0].name} has voxels of {known[0].spacing_mm} mm but {array.name} of {array.spacing_mm} mm "
                "(D, H, W); an image and its label must lie on the same grid: resample one to the other, or correct "
                "the voxel size (spacing_mm) that is wrong"
            )

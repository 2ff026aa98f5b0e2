"""`.npy` files: the header by numpy itself, then exactly the bytes of a box. Nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meshwright.data.arrays import see_numbers
from meshwright.data.raw import RawArray
from meshwright.data.retry import retried
from meshwright.errors import DataError


def open_npy(path: Path, dims: int = 3) -> RawArray:
    """Read the header and compare it with the length of the file. Raises `DataError`, below `dims` dims too."""

    def header() -> RawArray:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version[0]}.{version[1]} of the format, which is for named fields")
            first = version == (1, 0)
            reader = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(file)
            return RawArray(path, tuple(shape), dtype, file.tell(), fortran)

    try:
        array = retried(header, path)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: not a .npy file, or damaged: {error}. Write it again with numpy.save.") from None
    see_numbers(array.name, array.dtype, array.shape, dims)
    array.see_complete()
    return array

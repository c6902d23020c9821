"""The reproducible pseudo-random numbers from which known values are computed."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray


def crc(data: bytes) -> int:
    """The zlib CRC-32 of `data`."""
    return zlib.crc32(data)


def u(name: str, n: int) -> NDArray[np.float64]:
    """u(name, i) for i = 0..n-1, in [-1, 1): a hash of the flat row-major index i and of the name's CRC-32."""
    mask = np.uint64(0xFFFFFFFF)
    x = (np.arange(n, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(crc(name.encode("ascii")))) & mask
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(2246822519)) & mask
    x ^= x >> np.uint64(13)
    return x.astype(np.float64) / 2.0**31 - 1.0

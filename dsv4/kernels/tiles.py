"""Matrices as the copy engine of Hopper sees them: tensor maps, which tell a kernel where a box of bytes lies."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from dsv4.kernels.driver import call, driver

_MOST = 65536  # maps kept; one is 128 bytes


class ClusterForm(NamedTuple):
    """How a cluster's rows lie on its blocks; no choice changes a bit.

    turns: tiles of a block. stages: of its ring. smem: bytes of dynamic memory.
    """

    cluster: int
    turns: int
    stages: int
    smem: int


def tensor_map(matrix: Tensor, rows: int, columns: int) -> bytes:
    """The map of a matrix [n, k] for boxes of `rows` (at most 256) x `columns` bytes (at most 128).

    In shared memory a box has rows of `columns` bytes, the 16-byte pieces of row r of 128 bytes at `piece ^ (r % 8)`.
    The address has to be a multiple of 16, and the bytes from row to row too. Beyond the matrix boxes are zero.
    """
    n, size = matrix.shape[0], matrix.element_size()
    wide = matrix.shape[1] * size
    return _made(matrix.data_ptr(), n, wide, matrix.stride(0) * size if n > 1 else -(-wide // 16) * 16, rows, columns)


@lru_cache(maxsize=_MOST)
def _made(address: int, n: int, k: int, apart: int, rows: int, columns: int) -> bytes:
    kinds, wide = driver(), driver().cuuint64_t
    narrow = driver().cuuint32_t
    made = call(
        "cuTensorMapEncodeTiled",
        kinds.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        address,
        [wide(k), wide(n)],
        [wide(apart)],
        [narrow(columns), narrow(rows)],
        [narrow(1), narrow(1)],
        kinds.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        kinds.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        kinds.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        kinds.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return struct.pack("16Q", *(int(word) for word in made.opaque))

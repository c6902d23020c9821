"""FP8 matrices times many tokens, on Hopper, with the bits of csrc/linear_fp8.cu."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal, NamedTuple, get_args

from torch import Tensor

from dsv4.kernels.launch import Kernel
from dsv4.kernels.rows import NAMES
from dsv4.kernels.tiles import tensor_map
from dsv4.quant.tensor import QTensor

# As the sources have them.
TILE: Final = 128  # rows, tokens of a piece, columns
_THREADS: Final = 384
_MOST_STAGES: Final = 8
_BUFFER: Final = 8192  # bytes
_SHEET: Final = TILE * (TILE + 4) * 4  # bytes
SHARED: Final = (227 << 10) - 1024  # bytes of a block beside its barriers

Kind = Literal["wide128", "wide256", "split"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_SOURCES: Final[dict[Kind, tuple[str, str]]] = {
    "wide128": ("linear_fp8_wide.cu", "mmm pp iiiii ii"),
    "wide256": ("linear_fp8_wide.cu", "mmm pp iiiii ii"),
    "split": ("linear_fp8_split.cu", "mm ppp iiii ii"),
}
KERNELS: Final = {
    (dtype, kind): Kernel(file, f"linear_fp8_{kind}_{name}", signature)
    for dtype, name in NAMES.items()
    for kind, (file, signature) in _SOURCES.items()
}
# Clusters that an H100 or H200 holds at once, by their blocks. Of four, fewer than 31 ran at once where this was timed:
# the parts of the GPU have 18, 16 or fewer multiprocessors, and what four do not divide lies idle.
CLUSTERS: Final[dict[int, int]] = {1: 132, 2: 66, 4: 28}
_WIDTH: Final = 8


class Plan(NamedTuple):
    """How a product lies on blocks. Nothing here changes a bit: the order of the sums is that of `segments`.

    kind: tiles of 128 or 256 tokens (the latter for one segment), or a cluster that splits the segments. stages: of the
    ring. width: tiles of tokens that are taken together.
    """

    kind: Kind
    stages: int = 0
    width: int = _WIDTH

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return 2 * TILE if self.kind == "wide256" else TILE

    @property
    def bytes(self) -> int:
        """Of dynamic shared memory."""
        sums = _SHEET if self.kind == "split" else 2 * _BUFFER
        return self.stages * TILE * (TILE + self.tokens) + sums


@lru_cache(maxsize=4096)
def plan(rows: int, segments: int, tokens: int) -> Plan:
    """What is best for so many tokens: by bench/linear_wide.py."""
    high, wide = -(-rows // TILE), -(-tokens // TILE)
    if segments > 1 and segments * high * wide <= 8 * CLUSTERS[4]:  # two rounds, or one of fewer segments
        return fitting(Plan("split"))
    return fitting(Plan("wide256" if segments == 1 and wide > 1 and high * wide >= 2 * CLUSTERS[1] else "wide128"))


def fitting(given: Plan) -> Plan:
    """With as many stages as find room."""
    stages = max(n for n in range(1, _MOST_STAGES + 1) if given._replace(stages=n).bytes <= SHARED)
    return given._replace(stages=stages)


def launch(x: QTensor, weight: QTensor, y: Tensor, groups: int, segments: int, given: Plan) -> None:
    """y [T, rows] of x [T, groups * K] and weight [rows, K], whose K columns are added up in `segments`."""
    tokens, rows, blocks = x.shape[0], weight.shape[0], weight.shape[1] // TILE
    maps = [tensor_map(weight.data, TILE, TILE), tensor_map(x.data, given.tokens, TILE)]
    tiles, how = -(-rows // TILE) * -(-tokens // given.tokens), (groups, given.stages, given.width)
    kernel, scales, sizes = KERNELS[y.dtype, given.kind], (weight.scale, x.scale), (rows, tokens, blocks)
    if given.kind == "split":
        grid = segments * min(tiles, CLUSTERS[segments])
        kernel(grid, _THREADS, *maps, *scales, y, *sizes, *how, smem=given.bytes, cluster=segments, pdl=True)
    else:
        maps.append(tensor_map(y, TILE // y.element_size(), TILE))
        grid = min(tiles, CLUSTERS[1])
        kernel(grid, _THREADS, *maps, *scales, *sizes, segments, *how, smem=given.bytes, pdl=True)

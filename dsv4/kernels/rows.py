"""What kernels over rows share: which rows they take, how rows lie on threads, and where stored bytes go."""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.launch import need
from dsv4.quant.formats import FP8_ROW, MXFP4, NVFP4, Format
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor

NAMES: Final = {torch.bfloat16: "bf16", torch.float32: "float"}  # as the kernels' names have them
STORED: Final[tuple[Format, ...]] = (FP8_ROW, MXFP4, NVFP4)
Places = tuple[Tensor | None, ...]  # data, scale, given global scale, the rows' own
MOST_ROWS: Final = 2**30
WARP_COLUMNS: Final = 256  # of one chunk, csrc/common/vector.cuh
_BLOCK: Final = 8  # warps of a block where rows are short
THREADS: Final = 1024  # of a multiprocessor, where kernels have up to 64 registers
FEW: Final = 512  # rows up to which one chunk a warp is taken: more threads a row


class Rows(NamedTuple):
    """How rows lie on a launch: see `Shape` of csrc/common/rows.cuh. No choice here changes a bit of the results.

    chunks: of a warp, the number at the end of the kernel's name.
    """

    grid: int
    block: int
    slots: int
    warps: int
    chunks: int


def shape_rows(x: Tensor, chunks: int, threads: int) -> Rows:
    """For the rows of x [T, n], so many chunks to a warp and so many threads on a multiprocessor.

    Blocks walk over the rows. How many threads are best is measured (bench/row_forms.py): some kernels gain when more
    are launched than a multiprocessor holds at once.
    """
    rows, n = x.shape
    warps = max(1, -(-n // (WARP_COLUMNS * chunks)))
    slots = max(1, _BLOCK // warps)
    most = multiprocessors(x.device) * max(1, threads // (32 * slots * warps))
    return Rows(min(-(-rows // slots), most), 32 * slots * warps, slots, warps, chunks)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def refuse_rows(name: str, x: Tensor, most: int) -> str | None:
    """Why kernels cannot read x as rows, or None."""
    if not x.is_cuda:
        return f"{name} is on {x.device}"
    if x.dtype not in NAMES:
        return f"{name} is {str(x.dtype).removeprefix('torch.')}"
    if not 0 < x.shape[-1] <= most:
        return f"rows of {name} are {x.shape[-1]} long, and 1 to {most} fit"
    if x.numel() // x.shape[-1] > MOST_ROWS:
        return f"{name} has more than {MOST_ROWS} rows"
    if x.stride(-1) != 1 or (x.dim() != 2 and not x.is_contiguous()):
        return f"{name} has stride {list(x.stride())}"
    return None


def refuse_format(fmt: Format, scale: GlobalScale = None) -> str | None:
    """Why a kernel cannot store rows so while it has them, or None."""
    if isinstance(scale, str) and scale == "tensor":
        return "the scale of all rows is known after the last of them"
    return None if fmt in STORED else f"no kernel stores {fmt.name}"


def need_vector(x: Tensor, name: str, size: int, device: torch.device) -> None:
    """KernelError unless x is [size] FP32 on this device, contiguous."""
    need(x, name, shape=(size,), dtype=torch.float32, device=device)


def stored_rows(rows: int, n: int, fmt: Format, scale: GlobalScale, device: torch.device) -> tuple[QTensor, Places]:
    """An empty QTensor for rows of n numbers, and the four arguments by which a kernel fills it.

    FormatError for pairs that do not fit. `scale` is None, a 0-dim tensor or "row".
    """
    data = torch.empty(fmt.data_shape(rows, n), dtype=fmt.data_dtype, device=device)
    scales = torch.empty(fmt.scale_shape(rows, n), dtype=fmt.scale_dtype, device=device)
    if not fmt.has_global_scale:
        assert scale is None, f"{fmt.name} has no global scale"
        return QTensor(data, scales, fmt), (data, scales, None, None)
    if isinstance(scale, Tensor):
        need(scale, "scale", shape=(), dtype=torch.float32, device=device)
        return QTensor(data, scales, fmt, scale), (data, scales, scale, None)
    if scale is None:
        return QTensor(data, scales, fmt, _one(device)), (data, scales, None, None)
    own = torch.empty(rows, 1, device=device)
    return QTensor(data, scales, fmt, own), (data, scales, None, own)


@lru_cache
@torch.inference_mode(False)
def _one(device: torch.device) -> Tensor:
    """The global scale of those who ask for none. Not to be written to."""
    return torch.ones((), device=device)

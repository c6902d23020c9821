"""cuBLASLt's product of two NVFP4 matrices on Blackwell, through torch. It has never run on a GPU that has it.

On Hopper NVFP4 weights are decoded in a kernel (experts.py) and meet FP8 activations. The library multiplies NVFP4 by
NVFP4 alone, so this takes the case where both operands are: `quantize(x, NVFP4)` and a matrix of a checkpoint. What it
rests on was read in torch's source (`_scaled_mm`) and tried as far as a CPU goes: torch's own rules for shapes, and the
order of the scales. Rows depend on their company, as with any library: it runs only where it is named.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.rows import NAMES
from dsv4.ops.linear import scaled_matmul
from dsv4.quant.formats import NVFP4
from dsv4.quant.tensor import QTensor

NAME: Final = "cublaslt_nvfp4"
_CAPABILITY: Final = (10, 0)  # Blackwell; no older tensor core reads E2M1
_CUDA: Final = (12, 8)  # whose cuBLASLt was the first to have the product
_ROWS, _COLUMNS = 16, 32  # of a weight, multiples: torch asks for 16 rows, and rows of whole 16 bytes
TALL, WIDE = 128, 4  # scales of a tile, 512 bytes
_LANES: Final = 32  # rows that stand one below another in a tile, 16 bytes apart
_weights: WeakKeyDictionary[QTensor, Tensor] = WeakKeyDictionary()  # their scales as the library wants them


def _refuse(x: QTensor, weight: QTensor, dtype: torch.dtype) -> str | None:
    if not x.data.is_cuda:
        return f"x is on {x.device}: wanted a GPU of compute capability 10.0 or more"
    if x.format is not NVFP4 or weight.format is not NVFP4:
        return f"x is {x.format.name} and the weight {weight.format.name}: both have to be {NVFP4.name}"
    if dtype not in NAMES:
        return f"{str(dtype).removeprefix('torch.')} is not among the types of a result"
    (rows, columns), tokens = weight.shape, len(x)
    if rows % _ROWS or columns % _COLUMNS or not rows * columns * tokens:
        return f"{tokens} tokens and a matrix of {rows} x {columns}: wanted some, and multiples of {_ROWS} x {_COLUMNS}"
    if not hasattr(torch, "float4_e2m1fn_x2"):
        return f"torch {torch.__version__} has no float4_e2m1fn_x2: wanted 2.8 or newer"
    if tuple(map(int, (torch.version.cuda or "0.0").split("."))) < _CUDA:
        return f"torch is built for CUDA {torch.version.cuda}: wanted 12.8 or newer"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < _CAPABILITY:
        return "the GPU has compute capability {}.{}: wanted 10.0 or more, which reads NVFP4".format(*capability)
    return None


@scaled_matmul.impl(NAME, accepts=_refuse)
def _scaled_matmul(x: QTensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    by = _weights.get(weight)
    if by is None:
        by = _weights[weight] = tiled(weight.scale)
    assert x.global_scale is not None
    assert weight.global_scale is not None
    # The library knows the scales of blocks alone; FP32, so that the global ones come before the only rounding.
    product = torch._scaled_mm(_pairs(x), _pairs(weight).t(), tiled(x.scale), by, out_dtype=torch.float32)
    return (product * x.global_scale * _across(weight.global_scale)).type(dtype)


def tiled(scale: Tensor) -> Tensor:
    """E4M3 [rows, blocks] -> E4M3 [bytes], in the order of cuBLASLt's `VEC16_UE4M3`, zeros where there are none.

    A tile has 128 rows and 4 columns; tiles of one row of tiles stand one after another. In a tile the scale of row r
    and column c is byte (r % 32) * 16 + (r // 32) * 4 + c.
    """
    rows, columns = scale.shape
    whole = F.pad(scale.view(torch.uint8), (0, -columns % WIDE, 0, -rows % TALL))
    tiles = whole.view(-(-rows // TALL), TALL // _LANES, _LANES, -(-columns // WIDE), WIDE)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e4m3fn)


def _pairs(q: QTensor) -> Tensor:
    """The same bytes under torch's name for two E2M1 numbers, the even one in the low half: [rows, columns / 2]."""
    return q.data.view(torch.float4_e2m1fn_x2)


def _across(scale: Tensor) -> Tensor:
    """A weight's global scale, of all or of each row [N, 1], as it meets a product [T, N]."""
    return scale.t() if scale.dim() == 2 else scale

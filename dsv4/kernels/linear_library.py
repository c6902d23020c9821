"""cuBLASLt's block-scaled product through torch. Its rows depend on their company: it runs only where it is named."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.kernels.rows import NAMES
from dsv4.ops.linear import scaled_matmul
from dsv4.quant.e8m0 import ue8m0_decode
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW
from dsv4.quant.tensor import QTensor

_BLOCK = 128  # rows, columns of a scale of the weight
_FOUR = 4  # the library reads scales in fours: of tokens, and of a weight's blocks of columns
_weights: WeakKeyDictionary[QTensor, Tensor] = WeakKeyDictionary()  # their scales as the library wants them


def _refuse(x: QTensor, weight: QTensor, dtype: torch.dtype) -> str | None:
    if not x.data.is_cuda:
        return f"x is on {x.device}"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no scaled_mm: wanted a newer one"
    if tuple(map(int, (torch.version.cuda or "0.0").split("."))) < (12, 9):
        return f"torch is built for CUDA {torch.version.cuda}: wanted 12.9 or newer"
    if x.format is not FP8_ROW or weight.format is not FP8_BLOCK:
        return f"x is {x.format.name} and the weight {weight.format.name}"
    if dtype not in NAMES:
        return f"{str(dtype).removeprefix('torch.')} is not among the types of a result"
    if weight.shape[0] % _BLOCK or weight.shape[1] % _BLOCK or not x.data.numel() or not weight.data.numel():
        return f"{x.shape[0]} tokens and a matrix of {list(weight.shape)}: wanted some, and multiples of {_BLOCK}"
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "the library has scales of blocks for Hopper alone"
    return None


@scaled_matmul.impl("cublaslt", accepts=_refuse)
def _scaled_matmul(x: QTensor, weight: QTensor, dtype: torch.dtype) -> Tensor:
    tokens = x.shape[0]
    data = _fours(x.data.view(torch.uint8), 0).view(torch.float8_e4m3fn)
    return product(data, weight, token_scales(x), dtype)[:tokens]


def token_scales(x: QTensor) -> Tensor:
    """Of rows [T, K] as the library wants them: FP32 [T, K / 128], T a multiple of 4, token beside token in memory."""
    return _fours(ue8m0_decode(x.scale), 0).t().contiguous().t()


def product(data: Tensor, weight: QTensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, N] in `dtype` of E4M3 tokens [T, K], T a multiple of 4, under `token_scales`."""
    by = _weights.get(weight)
    if by is None:
        by = _weights[weight] = _fours(ue8m0_decode(weight.scale), 1).t()
    kinds = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(data, weight.data.t(), scale, kinds[0], by, kinds[1], output_dtype=dtype)


def _fours(x: Tensor, dim: int) -> Tensor:
    """A matrix with zeros behind it, so that `dim` is a multiple of four; the same one if it is already."""
    behind = -x.shape[dim] % _FOUR
    return F.pad(x, (0, 0, 0, behind) if dim == 0 else (0, behind)) if behind else x

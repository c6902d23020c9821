"""The first half of the output projection, as the second half reads it."""

from __future__ import annotations

from torch import Tensor

from dsv4.ops.linear import grouped_linear
from dsv4.ops.op import op
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import Format
from dsv4.quant.tensor import QTensor


@op
def grouped_linear_quant(x: Tensor, weight: Tensor | QTensor, fmt: Format) -> QTensor:
    """`grouped_linear`, rounded to x.dtype, then stored: x [T, G, K], weight [G * R, K] -> [T, G * R] rows in `fmt`."""
    return quantize(grouped_linear(x, weight), fmt)

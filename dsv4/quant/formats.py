"""The stored formats: each owns its bytes, its scales, and the way between them and values."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from dsv4.errors import DSV4Error
from dsv4.quant import e2m1, e4m3
from dsv4.quant.activation import fp8_quantize
from dsv4.quant.e8m0 import NAN, ue8m0_decode, ue8m0_encode_ceil
from dsv4.quant.tensor import QTensor


class FormatError(DSV4Error):
    """Values or shapes that a number format cannot hold."""


@dataclass(frozen=True)
class Format:
    """One way to store a matrix [out, in]. `block` is the (rows, columns) that share a scale; edge blocks are short.

    `data_name`, `scale_name`: safetensors dtype strings of the two tensors. `data_dtype`, `scale_dtype`: the torch
    dtypes that hold them in memory; UE8M0 scales are uint8 bytes.
    """

    name: str
    block: tuple[int, int]
    data_name: str
    scale_name: str
    data_dtype: torch.dtype
    scale_dtype: torch.dtype
    values_per_byte: int = 1
    has_global_scale: bool = False

    def data_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Stored shape of the data of a logical [rows, columns] matrix. FormatError where pairs do not fit."""
        if columns % self.values_per_byte:
            wanted = f"a multiple of {self.values_per_byte}"
            raise FormatError(f"{self.name} cannot pack a row", got=f"{columns} values", wanted=wanted)
        return rows, columns // self.values_per_byte

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Stored shape of the scales of a logical [rows, columns] matrix."""
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    @abstractmethod
    def encode(self, x: torch.Tensor) -> QTensor:
        """FP32 or BF16 [out, in] -> nearest stored matrix. NaN and Inf are refused (FormatError).

        The values are divided by the scale as stored. A block of zeros gets zeros under a defined scale.
        """

    @abstractmethod
    def decode(self, q: QTensor) -> torch.Tensor:
        """-> FP32 [out, in]. A NaN scale or value gives NaN."""

    def _amax(self, x: torch.Tensor) -> torch.Tensor:
        """FP32 [out, in] -> largest magnitude of every block, in the scale's shape."""
        (rows, cols), (height, width) = x.shape, self.block
        down, across = self.scale_shape(rows, cols)
        padded = torch.nn.functional.pad(x.abs(), (0, -cols % width, 0, -rows % height))
        return padded.view(down, height, across, width).amax((1, 3))

    def _spread(self, scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """One number a block -> one a value, [out, in]."""
        height, width = self.block
        wide = scale.repeat_interleave(width, 1)[:, : shape[1]]
        return wide if height == 1 else wide.repeat_interleave(height, 0)[: shape[0]]


class Fp8Block(Format):
    """Dense FP8: one E4M3 byte a value, one UE8M0 byte for 128x128 of them.

          weight  F8_E4M3 [out, in]                   byte (i, j): seee emmm, see `e4m3`
          scale   F8_E8M0 [ceil(out/128), ceil(in/128)]

          value(i, j) = E4M3(weight[i, j]) * 2^(scale[i // 128, j // 128] - 127)      exact in FP32

    The scale is amax / 448 rounded up to a power of two; a block of zeros has scale 1 (byte 127).
    """

    def encode(self, x: torch.Tensor) -> QTensor:
        x = _finite(x, self)
        amax = self._amax(x)
        scale = ue8m0_encode_ceil(torch.where(amax > 0, _over(amax, e4m3.MAX), 1.0))
        return QTensor(e4m3.e4m3_encode(x / self._spread(ue8m0_decode(scale), _shape(x))), scale, self)

    def decode(self, q: QTensor) -> torch.Tensor:
        return e4m3.e4m3_decode(q.data) * self._spread(ue8m0_decode(q.scale), q.shape)


class Fp8BlockF32(Format):
    """Dense FP8 of the Base checkpoints: as `Fp8Block`, but the scales are FP32 and no powers of two.

          weight  F8_E4M3 [out, in]
          scale   F32     [ceil(out/128), ceil(in/128)]

          value(i, j) = fp32(E4M3(weight[i, j]) * scale[i // 128, j // 128])      rounded once

    The scale is amax / 448; a block of zeros has scale 1.
    """

    def encode(self, x: torch.Tensor) -> QTensor:
        x = _finite(x, self)
        amax = self._amax(x)
        # Under 2^-140 the quotient has too few bits left and the largest values would saturate; at 2^-140 the
        # smallest E4M3 number is FP32's smallest, so that nothing is lost.
        scale = torch.where(amax > 0, _over(amax, e4m3.MAX).clamp_(min=2.0**-140), 1.0)
        return QTensor(e4m3.e4m3_encode(x / self._spread(scale, _shape(x))), scale, self)

    def decode(self, q: QTensor) -> torch.Tensor:
        return e4m3.e4m3_decode(q.data) * self._spread(q.scale, q.shape)


class Fp8Row(Fp8Block):
    """FP8 of activations: one E4M3 byte a value, one UE8M0 byte for 128 of them along a row.

          data    F8_E4M3 [T, n]
          scale   F8_E8M0 [T, ceil(n/128)]

          value(i, j) = E4M3(data[i, j]) * 2^(scale[i, j // 128] - 127)      exact in FP32

    The scale is max(amax, 1e-4) / 448 rounded up to a power of two: a block of zeros has scale 2^-22 (byte 105).
    """

    def encode(self, x: torch.Tensor) -> QTensor:
        data, scale = fp8_quantize(_finite(x, self), self.block[1])
        return QTensor(data, ue8m0_encode_ceil(scale), self)


class Mxfp4(Format):
    """MXFP4: two E2M1 values a byte, one UE8M0 byte for 32 of them along the input.

          weight  I8      [out, in/2]     byte (i, j): hi nibble = value 2j + 1, lo nibble = value 2j, see `e2m1`
          scale   F8_E8M0 [out, ceil(in/32)]

          value(i, j) = E2M1(code[i, j]) * 2^(scale[i, j // 32] - 127)      exact in FP32

    The scale is amax / 6 rounded up to a power of two, so that nothing saturates; zeros have scale 1 (byte 127).
    """

    def encode(self, x: torch.Tensor) -> QTensor:
        x = _finite(x, self)
        self.data_shape(*_shape(x))
        amax = self._amax(x)
        scale = ue8m0_encode_ceil(torch.where(amax > 0, _over(amax, e2m1.MAX), 1.0))
        codes = e2m1.e2m1_encode(x / self._spread(ue8m0_decode(scale), _shape(x)))
        return QTensor(e2m1.pack(codes).view(torch.int8), scale, self)

    def decode(self, q: QTensor) -> torch.Tensor:
        return e2m1.e2m1_decode(e2m1.unpack(q.data)) * self._spread(ue8m0_decode(q.scale), q.shape)


class Nvfp4(Format):
    """NVFP4: two E2M1 values a byte, one E4M3 byte for 16 of them, one FP32 number for the matrix.

          weight          U8      [out, in/2]     nibbles as in `Mxfp4`
          weight_scale    F8_E4M3 [out, ceil(in/16)]
          weight_scale_2  F32     []              `QTensor.global_scale`

          value(i, j) = fp32(E2M1(code[i, j]) * E4M3(weight_scale[i, j // 16]) * weight_scale_2)      rounded once

    weight_scale_2 is amax / (6 * 448), or 1 for a matrix of zeros. weight_scale is the block's amax / 6 in those
    units, rounded to E4M3 and never under its smallest number 2^-9 (which is what a block of zeros gets).
    """

    def encode(self, x: torch.Tensor) -> QTensor:
        x = _finite(x, self)
        self.data_shape(*_shape(x))
        amax = self._amax(x)
        top = amax.max()
        total = torch.where(top > 0, _over(top, e2m1.MAX * e4m3.MAX).clamp_(min=2.0**-126), 1.0)
        scale = e4m3.e4m3_encode((_over(amax, e2m1.MAX) / total).clamp_(min=2.0**-9))
        codes = e2m1.e2m1_encode(x / self._spread(e4m3.e4m3_decode(scale) * total, _shape(x)))
        return QTensor(e2m1.pack(codes), scale, self, total)

    def decode(self, q: QTensor) -> torch.Tensor:
        assert q.global_scale is not None
        exact = e2m1.e2m1_decode(e2m1.unpack(q.data)) * self._spread(e4m3.e4m3_decode(q.scale), q.shape)
        return exact * q.global_scale


def _shape(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _over(x: torch.Tensor, top: float) -> torch.Tensor:
    """x / top, rounded once on every device: by a host scalar a GPU would multiply with the rounded reciprocal."""
    return x / x.new_tensor(top)


def _finite(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """[out, in] of any float dtype -> FP32, or FormatError where a number is not finite."""
    assert x.ndim == 2, f"a matrix, not {tuple(x.shape)}"
    x = x.float()
    if not bool(x.isfinite().all()):
        raise FormatError(f"{fmt.name} cannot hold the values", got="NaN or Inf", wanted="finite numbers")
    return x


def has_nan_scale(q: QTensor) -> bool:
    """Whether any scale of `q` is NaN: UE8M0 byte 255, E4M3 byte 0x7F or 0xFF, or an FP32 NaN."""
    if q.scale.dtype == torch.uint8:
        return bool((q.scale == NAN).any())
    return bool(q.scale.float().isnan().any())


_F8 = torch.float8_e4m3fn
FP8_BLOCK = Fp8Block("fp8", (128, 128), "F8_E4M3", "F8_E8M0", _F8, torch.uint8)
FP8_ROW = Fp8Row("fp8_row", (1, 128), "F8_E4M3", "F8_E8M0", _F8, torch.uint8)
FP8_BLOCK_F32 = Fp8BlockF32("fp8_f32", (128, 128), "F8_E4M3", "F32", _F8, torch.float32)
MXFP4 = Mxfp4("mxfp4", (1, 32), "I8", "F8_E8M0", torch.int8, torch.uint8, 2)
NVFP4 = Nvfp4("nvfp4", (1, 16), "U8", "F8_E4M3", torch.uint8, _F8, 2, True)
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in (FP8_BLOCK, FP8_BLOCK_F32, FP8_ROW, MXFP4, NVFP4)}

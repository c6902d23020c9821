"""QTensor: a quantised matrix, of weights or of activations, that travels whole: bytes, scales and format together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dsv4.quant.formats import Format


@dataclass(frozen=True, eq=False)
class QTensor:
    """A matrix as it is stored: `data` and `scale` in the dtypes and shapes that `format` prescribes.

    `global_scale` is FP32 for the formats that have one (NVFP4), a scalar or one number a row [out, 1], and None for
    all others. Dtypes and shapes are invariants here; a file that breaks them is refused where files are read.
    """

    data: torch.Tensor
    scale: torch.Tensor
    format: Format
    global_scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        fmt = self.format
        assert (self.data.dtype, self.scale.dtype) == (fmt.data_dtype, fmt.scale_dtype), f"{fmt.name} dtypes"
        assert self.data.ndim == 2, f"{fmt.name} data is a matrix"
        assert tuple(self.scale.shape) == fmt.scale_shape(*self.shape), f"{fmt.name} shapes"
        assert (self.global_scale is not None) == fmt.has_global_scale, f"{fmt.name} global scale"

    @property
    def shape(self) -> tuple[int, int]:
        """Logical (out, in), in values rather than bytes."""
        return self.data.shape[0], self.data.shape[1] * self.format.values_per_byte

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales included."""
        tensors = (self.data, self.scale, self.global_scale)
        return sum(t.nbytes for t in tensors if t is not None)

    def values(self) -> torch.Tensor:
        """FP32 [out, in], decoded on the first call and kept. Not to be written to."""
        return self._values

    @cached_property
    def _values(self) -> torch.Tensor:
        return self.format.decode(self)

    def to(self, device: torch.device | str) -> QTensor:
        """The same bytes on `device`; decoded values are not carried along."""
        glob = None if self.global_scale is None else self.global_scale.to(device)
        return replace(self, data=self.data.to(device), scale=self.scale.to(device), global_scale=glob)

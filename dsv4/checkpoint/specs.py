"""What one stored tensor and one parameter are, and which number formats a checkpoint uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from dsv4.config import ModelConfig
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, MXFP4, NVFP4, Format

ITEM_BYTES: Final = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "I64": 8}  # safetensors names
_PLAIN: Final = {"bfloat16": "BF16", "float32": "F32"}


class TensorSpec(NamedTuple):
    """One tensor of a file: its Hub name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Param(NamedTuple):
    """One parameter of the model: a tensor of `dtype`, or a matrix [out, in] in `format` and so several tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    format: Format | None = None

    def stored(self) -> list[TensorSpec]:
        """The tensors that hold it, data first, then scales (and NVFP4's scale of the matrix)."""
        if self.format is None:
            return [TensorSpec(self.name, self.dtype, self.shape)]
        out, into = self.shape
        data = TensorSpec(self.name, self.format.data_name, self.format.data_shape(out, into))
        scale = TensorSpec(self.scale_name, self.format.scale_name, self.format.scale_shape(out, into))
        if not self.format.has_global_scale:
            return [data, scale]
        return [data, scale, TensorSpec(f"{self.name}_scale_2", "F32", ())]

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What it takes in its files."""
        return sum(spec.nbytes for spec in self.stored())

    @property
    def scale_name(self) -> str:
        """ "x.scale" beside "x.weight"; NVFP4, another producer's, says "x.weight_scale"."""
        assert self.format is not None
        return f"{self.name}_scale" if self.format is NVFP4 else f"{self.name.removesuffix('.weight')}.scale"


@dataclass(frozen=True)
class StoredFormats:
    """The formats of a checkpoint: `plain` for unquantised weights, `linear` and `experts` None if these are plain too.

    `nvfp4` holds the expert banks, such as "layers.3.ffn.experts", that are NVFP4 whatever `experts` says.
    """

    plain: str = "BF16"
    linear: Format | None = FP8_BLOCK
    experts: Format | None = MXFP4
    nvfp4: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: ModelConfig) -> StoredFormats:
        """What a configuration alone promises. An absent `expert_dtype` means MXFP4, as in the first Flash."""
        if config.quantization is None:
            return cls(_PLAIN[config.torch_dtype], None, None)
        linear = FP8_BLOCK if config.quantization.scale_fmt == "ue8m0" else FP8_BLOCK_F32
        return cls("BF16", linear, linear if config.expert_dtype == "fp8" else MXFP4, config.quantization.nvfp4)

    def names(self) -> tuple[str, str]:
        """What linears and experts are stored as, for people."""
        linear, experts = (stored.name if stored else self.plain for stored in (self.linear, self.experts))
        return linear, experts

    def of_bank(self, bank: str) -> Format | None:
        """The format of one expert bank, such as "mtp.0.ffn.experts"."""
        return NVFP4 if bank in self.nvfp4 else self.experts

"""Which activations a model rounds, and to what: numerics as a table from places to roundings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Final

from torch import Tensor

from dsv4.quant import scaled
from dsv4.quant.activation import fp4_simulate, fp8_simulate

Rounding = Callable[[Tensor], Tensor]  # BF16 or FP32 [..., n] -> the same shape and dtype


def none(x: Tensor) -> Tensor:
    """x itself."""
    return x


def bf16(x: Tensor) -> Tensor:
    """x rounded to BF16, in its own dtype."""
    return x.bfloat16().type(x.dtype)


FP8: Final = partial(fp8_simulate, block=128)
FP8_KV: Final = partial(fp8_simulate, block=64)
FP4: Final = partial(fp4_simulate, block=32)

ROUNDINGS: Final[Mapping[str, Rounding]] = {
    "none": none,
    "bf16": bf16,
    "fp8": FP8,  # E4M3 per 128, scales powers of two: what the linears of the official models were trained with
    "fp8-64": FP8_KV,  # the same per 64: their keys and values
    "fp8-tensor": scaled.fp8_per_tensor,
    "mxfp4": FP4,  # E2M1 per 32, scales powers of two: their index vectors
    "nvfp4": scaled.nvfp4_simulate,  # E2M1 per 16, E4M3 scales, global scale 1
    "nvfp4-tensor": scaled.nvfp4_per_tensor,
    "nvfp4-token": scaled.nvfp4_per_token,
    "fp4-128": partial(fp4_simulate, block=128),  # known to be too coarse
    "fp4-tensor": scaled.fp4_per_tensor,  # coarser still
    "int8-token": scaled.int8_per_token,
}


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What each place rounds its activations to.

    At the inputs of matrices a rounding counts only if the matrix is quantised. `kv` is applied to the dimensions
    that carry no position; `index`, unless `none`, to vectors that a Hadamard matrix has spread over their dimensions.
    """

    attn_input: Rounding = none  # of wq_a and wkv
    latent: Rounding = none  # of wq_b and the indexer's wq_b
    group_output: Rounding = none  # of wo_a, one group of heads a row
    attn_output: Rounding = none  # of wo_b
    expert_input: Rounding = none  # of the routed experts' w1 and w3
    expert_hidden: Rounding = none  # of their w2
    shared_input: Rounding = none  # of the shared expert's w1 and w3
    shared_hidden: Rounding = none  # of its w2
    draft_input: Rounding = none  # of the matrices in front of a draft's layers
    kv: Rounding = none  # keys and values, of the window and pooled
    index: Rounding = none  # the indexer's queries and keys


PLACES: Final = tuple(field.name for field in fields(Numerics))
LINEARS: Final = tuple(place for place in PLACES if place not in ("kv", "index"))

FLOAT: Final = Numerics()
# The reference's own model.py rounds in front of every quantised matrix but wo_a, which it widens.
OFFICIAL: Final = Numerics(
    **{place: FP8 for place in LINEARS if place != "group_output"}, group_output=none, kv=FP8_KV, index=FP4
)
NUMERICS: Final[Mapping[str, Numerics]] = {"official": OFFICIAL, "float": FLOAT}

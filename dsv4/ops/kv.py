"""Keys and values between a layer and the bytes of its paged cache."""

from __future__ import annotations

from torch import Tensor

from dsv4.ops.norm import rms_norm
from dsv4.ops.op import op
from dsv4.ops.rope import Rotation, rope
from dsv4.quant.kv_rows import KvRow
from dsv4.quant.paged import read_rows, write_rows


@op
def write_kv(kv: Tensor, weight: Tensor, eps: float, turn: Rotation, pages: Tensor, rows: Tensor) -> None:
    """Normalise, rotate, round and store one vector a token.

    kv: [T, D] as the projection left it; weight: [D] FP32 of kv_norm; pages: uint8 [P, page bytes] of `KvRow`, whose
    row n is row n mod m of page n // m, m rows a page; rows: [T] int64, all different. A negative row is not stored.
    Mutates `pages`.
    """
    layout = KvRow(kv.shape[1], turn.cos.shape[-1])
    kept = rows >= 0
    data, scales = layout.encode(rope(rms_norm(kv, weight, eps), turn)[kept])
    write_rows(layout, pages, rows[kept], data, scales)


@op
def read_kv(pages: Tensor, rows: Tensor, dims: int, rope_dims: int) -> Tensor:
    """The stored vectors, decoded: pages as above, rows [T] int64 -> BF16 [T, D]. A negative row gives zeros."""
    layout = KvRow(dims, rope_dims)
    return layout.decode(*read_rows(layout, pages, rows.clamp(min=0))).masked_fill_((rows < 0).unsqueeze(1), 0.0)

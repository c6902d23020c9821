"""What a chunk of a prompt has to multiply and to move in one layer: the floor of `dsv4 bench prefill`.

Counted are multiplications and additions, two FLOP for both, as if all ran at one peak: every matrix that a token
passes (dense ones of any format, with router, compressors and mHC's; of the routed experts those that it is given),
scores and values of attention over the window and the entries that are picked, the indexer's scores of all entries that
a token sees, and the mixing of mHC's streams. Not counted: norms, RoPE, softmax, SwiGLU, Sinkhorn, quantising, and what
chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dsv4.checkpoint.reads import INDEXED, Reads, row_reads
from dsv4.checkpoint.specs import ITEM_BYTES, Param
from dsv4.config import ModelConfig


class Chunk(NamedTuple):
    """So many tokens of one prompt, behind so many that have run already."""

    tokens: int
    behind: int


class Flop(NamedTuple):
    """Of a layer, by what multiplies."""

    dense: float
    experts: float
    attention: float
    scores: float
    streams: float


def chunk_flop(config: ModelConfig, own: Iterable[Param], ratio: int, chunk: Chunk) -> Flop:
    """Of a layer of this compression ratio with these parameters."""
    matrices = [param for param in own if len(param.shape) == 2 and not param.name.endswith((".ape", ".tid2eid"))]
    dense = sum(param.size for param in matrices if ".ffn.experts." not in param.name)
    routed = sum(param.size for param in matrices if ".ffn.experts." in param.name)
    chosen = routed * config.num_experts_per_tok / config.n_routed_experts
    seen = entries(chunk, ratio) if ratio else 0
    picked = entries(chunk, ratio, config.index_topk) if ratio == INDEXED else seen
    rows = entries(chunk, 1, config.sliding_window) + picked
    heads = config.num_attention_heads * config.head_dim
    scored = seen * config.index_n_heads * config.index_head_dim if ratio == INDEXED else 0
    wide = config.hc_mult * (config.hc_mult + 2) * config.hidden_size  # streams into one, a new one and old ones back
    return Flop(*(2.0 * n for n in (chunk.tokens * dense, chunk.tokens * chosen, 2 * rows * heads, scored,
                                    2 * chunk.tokens * wide)))  # fmt: skip


def entries(chunk: Chunk, ratio: int, most: int | None = None) -> int:
    """Entries of `ratio` tokens that are whole when a token has been read, at most so many, over the chunk's tokens."""
    seen = (position // ratio for position in range(chunk.behind + 1, chunk.behind + chunk.tokens + 1))
    return sum(seen if most is None else (min(count, most) for count in seen))


def chunk_bytes(config: ModelConfig, own: Iterable[Param], ratio: int, touched: float, chunk: Chunk) -> float:
    """Bytes of a layer: its weights once, of the routed experts those in use; streams in and out, larger than a cache.

    And the rows that one token reads of what earlier chunks have left; what more of them others read is not counted.
    """
    streams = 2 * chunk.tokens * config.hc_mult * config.hidden_size * ITEM_BYTES["BF16"]
    weights = Reads.of(own).step(config, touched, chunk.tokens)
    return weights + streams + row_reads(config, ratio, chunk.behind)

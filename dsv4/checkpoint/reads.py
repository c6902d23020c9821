"""Bytes that a decode step must read: what no engine can be faster than, whatever it does.

Weights are those of the files, of the routed experts those that a token of the step chose; rows of the embedding and of
the hash layers' tables are looked up. Of a cache each sequence reads the rows that its token attends to, and the index
keys where there are more entries than are picked. What is written, and activations, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from dsv4.checkpoint.specs import ITEM_BYTES, Param
from dsv4.config import ModelConfig
from dsv4.quant.index_keys import FP4_KEYS
from dsv4.quant.kv_rows import KvRow

INDEXED: Final = 4  # the ratio of the layers with an indexer
_HEAD: Final = ("head.", "hc_head", "norm.")


class Point(NamedTuple):
    """So many sequences, a token of each, behind so many tokens of context."""

    sequences: int
    context: int


def touched_experts(config: ModelConfig, tokens: int) -> float:
    """Different experts that so many tokens choose in a layer, on average, if each chooses evenly and on its own."""
    count = config.n_routed_experts
    return count * (1 - (1 - config.num_experts_per_tok / count) ** tokens)


class Reads(NamedTuple):
    """Bytes of weights. fixed: read by every step. routed: all routed experts. looked_up: a token's rows of tables."""

    fixed: int
    routed: int
    looked_up: int

    @classmethod
    def of(cls, params: Iterable[Param]) -> Reads:
        """Of these parameters, but for a draft's."""
        fixed = routed = looked_up = 0
        for param in params:
            if param.name.startswith("mtp."):
                continue
            if ".ffn.experts." in param.name:
                routed += param.nbytes
            elif param.name.endswith(("embed.weight", ".tid2eid")):
                looked_up += param.shape[1] * ITEM_BYTES[param.dtype]
            else:
                fixed += param.nbytes
        return cls(fixed, routed, looked_up)

    def step(self, config: ModelConfig, touched: float, tokens: int) -> float:
        """Of a step of so many tokens that reads so many routed experts a layer."""
        return self.fixed + self.routed * touched / config.n_routed_experts + tokens * self.looked_up


def layer_bytes(config: ModelConfig, own: Iterable[Param], ratio: int, touched: float, point: Point) -> float:
    """Bytes read of a layer of this compression ratio with these parameters. touched: its routed experts in use."""
    weights = Reads.of(own).step(config, touched, point.sequences)
    return weights + point.sequences * row_reads(config, ratio, point.context)


def row_reads(config: ModelConfig, ratio: int, context: int) -> int:
    """Bytes of a layer's cache, in stored rows, that the token behind `context` tokens of one sequence reads."""
    entries = context // ratio if ratio else 0
    indexed = ratio == INDEXED
    picked = min(config.index_topk, entries) if indexed else entries
    keys = entries * sum(FP4_KEYS.sizes) if indexed and entries > config.index_topk else 0
    row = sum(KvRow(config.head_dim, config.qk_rope_head_dim).sizes)
    return (min(config.sliding_window, context) + picked) * row + keys


def head_bytes(params: Iterable[Param]) -> int:
    """Of the head, and of what lies between it and the last layer."""
    return sum(param.nbytes for param in params if param.name.startswith(_HEAD))


def step_bytes(config: ModelConfig, weights: Reads, point: Point) -> float:
    """Bytes that a decode step of all main layers, whose weights these are, reads, without a draft."""
    rows = sum(row_reads(config, ratio, point.context) for ratio in config.layer_ratios)
    return weights.step(config, touched_experts(config, point.sequences), point.sequences) + point.sequences * rows

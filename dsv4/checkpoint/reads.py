"""Bytes that a decode step must read: what no engine can be faster than, whatever it does.

Weights are those of the files, of the routed experts those that a token of the step chose; rows of the embedding and of
the hash layers' tables are looked up. Of a cache each sequence reads the rows that its token attends to, and the index
keys where there are more entries than are picked. What is written, and activations, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def layer_bytes(config: ModelConfig, own: Iterable[Param], ratio: int, touched: float, point: Point) -> float:
    """Bytes read of a layer of this compression ratio with these parameters. touched: its routed experts in use."""
    return weight_reads(config, own, touched, point.sequences) + point.sequences * row_reads(
        config, ratio, point.context
    )


def weight_reads(config: ModelConfig, own: Iterable[Param], touched: float, tokens: int) -> float:
    """Bytes of a layer's weights that a step of so many tokens reads."""
    total = 0.0
    for param in own:
        if ".ffn.experts." in param.name:
            total += param.nbytes * touched / config.n_routed_experts
        elif param.name.endswith(".tid2eid"):
            total += tokens * config.num_experts_per_tok * ITEM_BYTES[param.dtype]
        else:
            total += param.nbytes
    return total


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


def step_bytes(config: ModelConfig, params: Sequence[Param], point: Point) -> float:
    """Bytes that a decode step of all main layers reads, without a draft."""
    touched, total = touched_experts(config, point.sequences), float(head_bytes(params))
    total += sum(point.sequences * config.hidden_size * ITEM_BYTES[p.dtype] for p in params if p.name == "embed.weight")
    layers = [param for param in params if param.name.startswith("layers.")]
    total += weight_reads(config, layers, touched, point.sequences)
    return total + point.sequences * sum(row_reads(config, ratio, point.context) for ratio in config.layer_ratios)

"""What the largest step takes beside weights and cache, in stored layers on a GPU: an estimate with its parts.

The step is that of `Runner.rehearse`: a chunk of a prompt and every slot decoding, all at the end of the context.
Sizes are those of the tensors that `model/stored.py` and the kernels below its ops make for so many tokens. Attention,
experts and logits follow one another and take turns in one memory; the indexer runs in a stream of its own, whose
memory torch gives to nobody else. Not counted: what the allocator leaves between tensors, and what CUDA graphs keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from dsv4.cache.layout import OVERLAPPED, layer_layout
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.runner import largest_step
from dsv4.kernels.experts import choose, most_groups
from dsv4.kernels.mhc import RANGE
from dsv4.model.pool import Run, most_rows, pool_rows
from dsv4.ops.index import KEY_BLOCK
from dsv4.quant.index_keys import FP4_KEYS
from dsv4.quant.packed import ROWS

_BF16: Final = 2
_WIDE: Final = 4  # FP32
_INDEX: Final = 8  # INT64
_STREAMS: Final = 3  # those that a layer began with, those between its halves, those behind
_LISTS: Final = 2  # of rows of every entry: in the cache, and among those that are decoded
_SCALED: Final = 128  # numbers of an FP8 row that share a scale byte


class Workspace(NamedTuple):
    """Bytes. attention, experts and logits are not there at once."""

    tokens: int
    streams: int
    lists: int
    indexer: int
    attention: int
    experts: int
    logits: int

    @property
    def total(self) -> int:
        return self.streams + self.lists + self.indexer + max(self.attention, self.experts, self.logits)


def workspace(config: ModelConfig, options: EngineOptions) -> Workspace:
    """Of the largest step that these options allow."""
    context, few = options.max_context, 1 + options.draft_slack
    counts = largest_step(options.prefill_chunk, options.draft_slack, options.max_sequences, context)
    tokens = sum(counts)
    asked = min(tokens, few * options.max_sequences)
    runs = [Run(slot, context - count, context) for slot, count in enumerate(counts)]
    return Workspace(
        tokens,
        tokens * _streams(config),
        tokens * sum(_lists(config, ratio, context) for ratio in set(config.layer_ratios)),
        tokens * _indexer(config, context),
        tokens * _attention(config) + _pool(config, options, runs),
        _experts(config, tokens),
        asked * (_WIDE * config.vocab_size + (1 + config.hc_mult) * _BF16 * config.hidden_size),
    )


def _stored(columns: int) -> int:
    """A row in FP8 with its scales."""
    return columns + -(-columns // _SCALED)


def _streams(c: ModelConfig) -> int:
    """Of a token: streams, what a sublayer reads of them (BF16 twice, and FP8) and gives, and the sums of a mix."""
    rows, d = c.hc_mult * (c.hc_mult + 2), c.hidden_size
    beside = 3 * _BF16 * d + _stored(d) + -(-d // RANGE) * (rows + 1) * _WIDE
    turns = 4 * c.qk_rope_head_dim * _WIDE
    return _STREAMS * c.hc_mult * d * _BF16 + beside + turns


def _lists(c: ModelConfig, ratio: int, context: int) -> int:
    """Of a token: rows of its window, and of all entries where all are attended to."""
    entries = context // ratio if ratio else 0
    every = 0 if ratio == OVERLAPPED and entries > c.index_topk else entries
    return 2 * c.sliding_window * _INDEX + _LISTS * every * _INDEX


def _indexer(c: ModelConfig, context: int) -> int:
    """Of a token: heads, as they are and stored, a score for every entry, and which were picked and where they lie."""
    entries = context // OVERLAPPED
    if OVERLAPPED not in c.layer_ratios or entries <= c.index_topk:
        return 0
    heads = c.index_n_heads * (_BF16 * c.index_head_dim + sum(FP4_KEYS.sizes) + _WIDE)
    return heads + -(-entries // KEY_BLOCK) * KEY_BLOCK * _WIDE + 2 * min(c.index_topk, entries) * _INDEX


def _attention(c: ModelConfig) -> int:
    """Of a token: what the matrices make of a layer's input, heads before and behind (or values), and the way out."""
    dense = max(_terms(c, ratio) for ratio in set(c.layer_ratios))
    down = c.q_lora_rank + c.head_dim
    heads = 2 * c.num_attention_heads * c.head_dim * _BF16
    grouped = c.o_groups * c.o_lora_rank
    return dense * _WIDE + down * _BF16 + _stored(c.q_lora_rank) + heads + grouped * _BF16 + _stored(grouped)


def _pool(c: ModelConfig, options: EngineOptions, runs: Sequence[Run]) -> int:
    """Rows that are decoded once for all tokens, of the layers that have most of them, as BF16.

    Where that does not pay, as many as it would up to: what a longer context needs is never less.
    """
    most = 0
    for layout in {layer_layout(c, options, ratio) for ratio in set(c.layer_ratios)}:
        entries = options.max_context // layout.ratio if layout.ratio else 0
        listed = min(entries, c.index_topk) if layout.indexed else entries
        most = max(most, min(pool_rows(runs, layout), most_rows(runs, layout, listed)))
    return most * c.head_dim * _BF16


def _terms(c: ModelConfig, ratio: int) -> int:
    """FP32 numbers of a token that compressors, the indexer's among them, and the weights of its heads are."""
    if ratio != OVERLAPPED:
        return 2 * c.head_dim if ratio else 0
    return 4 * (c.head_dim + c.index_head_dim) + c.index_n_heads


def _experts(c: ModelConfig, tokens: int) -> int:
    """Groups of tokens by expert, each padded, with what lies between the two matrices; what each expert gives."""
    k, wide = c.num_experts_per_tok, c.hidden_size + -c.hidden_size % ROWS
    form = choose(tokens, k, c.n_routed_experts)
    rows = most_groups(tokens, k, c.n_routed_experts, form.wide) * form.wide
    each = sum(n + n // _SCALED * _WIDE for n in (c.hidden_size, c.moe_intermediate_size)) + 2 * _WIDE
    return rows * each + tokens * (k + 2) * wide * _BF16 + tokens * k * (_INDEX + _WIDE)

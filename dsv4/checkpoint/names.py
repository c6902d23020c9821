"""Every parameter of a DeepSeek-V4 checkpoint under its Hub name, and the tensors that store it.

w1 is the gate, w3 the up and w2 the down projection. wo_a holds the groups' matrices one under another. There is no
embedding or head in `mtp.*`: the drafters share the main model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dsv4.checkpoint.specs import Param, StoredFormats, TensorSpec
from dsv4.config import ModelConfig

_Row = tuple[str, str, tuple[int, ...]]  # suffix of the name; "norm", "plain", "linear", "F32" or "I64"; shape


def parameters(config: ModelConfig, formats: StoredFormats | None = None, draft: bool = True) -> Iterator[Param]:
    """All parameters in the model's order: top level, main layers, then (with `draft`) the drafter's blocks."""
    formats = formats or StoredFormats.of(config)
    c = config
    yield from _resolve("", _top(c), formats)
    for layer, ratio in enumerate(c.layer_ratios):
        rows = [*_layer(c), *_compression(c, ratio), *_router(c, hashed=layer < c.num_hash_layers)]
        yield from _resolve(f"layers.{layer}.", rows, formats)
        yield from _experts(c, f"layers.{layer}.ffn.experts", formats)
    for stage in range(c.draft_layers if draft else 0):
        rows = [*_layer(c), *_router(c, hashed=False), *_draft(c, stage)]
        yield from _resolve(f"mtp.{stage}.", rows, formats)
        yield from _experts(c, f"mtp.{stage}.ffn.experts", formats)


def inventory(config: ModelConfig, formats: StoredFormats | None = None, draft: bool = True) -> dict[str, TensorSpec]:
    """Every tensor that the checkpoint of `config` must hold, by name. `formats` default to what `config` promises."""
    return {spec.name: spec for param in parameters(config, formats, draft) for spec in param.stored()}


class Census(NamedTuple):
    """How many tensors, of which dtypes, and how many bytes of payload."""

    tensors: int
    nbytes: int
    dtypes: dict[str, int]


def census(specs: Iterable[TensorSpec]) -> Census:
    """Counts `specs`; dtypes in alphabetical order."""
    specs = list(specs)
    dtypes = Counter(spec.dtype for spec in specs)
    return Census(len(specs), sum(spec.nbytes for spec in specs), dict(sorted(dtypes.items())))


def _resolve(prefix: str, rows: Iterable[_Row], formats: StoredFormats) -> Iterator[Param]:
    for suffix, kind, shape in rows:
        if kind == "linear" and formats.linear is not None:
            yield Param(prefix + suffix, formats.linear.data_name, shape, formats.linear)
        else:
            dtype = formats.plain if kind in ("plain", "linear") else kind
            yield Param(prefix + suffix, dtype, shape)


def _top(c: ModelConfig) -> list[_Row]:
    return [
        ("embed.weight", "plain", (c.vocab_size, c.hidden_size)),
        ("head.weight", "plain", (c.vocab_size, c.hidden_size)),
        ("norm.weight", "plain", (c.hidden_size,)),
        *_stream_head(c),
    ]


def _stream_head(c: ModelConfig) -> list[_Row]:
    """The weights that reduce the residual streams to one before a head."""
    streams = c.hc_mult
    return [
        ("hc_head_fn", "F32", (streams, streams * c.hidden_size)),
        ("hc_head_base", "F32", (streams,)),
        ("hc_head_scale", "F32", (1,)),
    ]


def _layer(c: ModelConfig) -> list[_Row]:
    """A block without compression, router and routed experts."""
    d, heads, dim, f = c.hidden_size, c.num_attention_heads, c.head_dim, c.moe_intermediate_size
    grouped = c.o_groups * c.o_lora_rank
    return [
        *_mixing(c, "attn"),
        ("attn_norm.weight", "plain", (d,)),
        ("attn.wq_a.weight", "linear", (c.q_lora_rank, d)),
        ("attn.q_norm.weight", "plain", (c.q_lora_rank,)),
        ("attn.wq_b.weight", "linear", (heads * dim, c.q_lora_rank)),
        ("attn.wkv.weight", "linear", (dim, d)),
        ("attn.kv_norm.weight", "plain", (dim,)),
        ("attn.attn_sink", "F32", (heads,)),
        ("attn.wo_a.weight", "linear", (grouped, heads * dim // c.o_groups)),
        ("attn.wo_b.weight", "linear", (d, grouped)),
        *_mixing(c, "ffn"),
        ("ffn_norm.weight", "plain", (d,)),
        ("ffn.shared_experts.w1.weight", "linear", (f, d)),
        ("ffn.shared_experts.w2.weight", "linear", (d, f)),
        ("ffn.shared_experts.w3.weight", "linear", (f, d)),
    ]


def _mixing(c: ModelConfig, sublayer: str) -> list[_Row]:
    """mHC around one sublayer: rows for pre, post and the square mixing matrix, and a scale for each of the three."""
    rows = c.hc_mult * (2 + c.hc_mult)
    return [
        (f"hc_{sublayer}_fn", "F32", (rows, c.hc_mult * c.hidden_size)),
        (f"hc_{sublayer}_base", "F32", (rows,)),
        (f"hc_{sublayer}_scale", "F32", (3,)),
    ]


def _compression(c: ModelConfig, ratio: int) -> list[_Row]:
    if ratio == 0:
        return []
    rows = _compressor(c, "attn.compressor", ratio, c.head_dim)
    if ratio != 4:
        return rows
    return [
        *rows,
        ("attn.indexer.wq_b.weight", "linear", (c.index_n_heads * c.index_head_dim, c.q_lora_rank)),
        ("attn.indexer.weights_proj.weight", "plain", (c.index_n_heads, c.hidden_size)),
        *_compressor(c, "attn.indexer.compressor", ratio, c.index_head_dim),
    ]


def _compressor(c: ModelConfig, prefix: str, ratio: int, dim: int) -> list[_Row]:
    wide = dim * (2 if ratio == 4 else 1)  # ratio 4 overlaps: one half for the next entry, one for its own
    return [
        (f"{prefix}.ape", "F32", (ratio, wide)),
        (f"{prefix}.wkv.weight", "plain", (wide, c.hidden_size)),
        (f"{prefix}.wgate.weight", "plain", (wide, c.hidden_size)),
        (f"{prefix}.norm.weight", "plain", (dim,)),
    ]


def _router(c: ModelConfig, hashed: bool) -> list[_Row]:
    gate: _Row = ("ffn.gate.weight", "plain", (c.n_routed_experts, c.hidden_size))
    if hashed:
        return [gate, ("ffn.gate.tid2eid", "I64", (c.vocab_size, c.num_experts_per_tok))]
    return [gate, ("ffn.gate.bias", "F32", (c.n_routed_experts,))]


def _experts(c: ModelConfig, bank: str, formats: StoredFormats) -> Iterator[Param]:
    stored, d, f = formats.of_bank(bank), c.hidden_size, c.moe_intermediate_size
    dtype = formats.plain if stored is None else stored.data_name
    for expert in range(c.n_routed_experts):
        for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
            yield Param(f"{bank}.{expert}.{name}.weight", dtype, shape, stored)


def _draft(c: ModelConfig, stage: int) -> list[_Row]:
    d = c.hidden_size
    if c.dspark is None:
        return [
            ("e_proj.weight", "linear", (d, d)),
            ("h_proj.weight", "linear", (d, d)),
            *((f"{name}.weight", "plain", (d,)) for name in ("enorm", "hnorm", "norm")),
            *_stream_head(c),
        ]
    rows: list[_Row] = []
    if stage == 0:
        rows += [("main_proj.weight", "linear", (d, len(c.dspark.target_layer_ids) * d))]
        rows += [("main_norm.weight", "plain", (d,))]
    if stage == c.draft_layers - 1:
        rank = c.dspark.markov_rank
        rows += [("norm.weight", "plain", (d,)), *_stream_head(c)]
        rows += [(f"markov_head.{name}.weight", "plain", (c.vocab_size, rank)) for name in ("markov_w1", "markov_w2")]
        rows += [("confidence_head.proj.weight", "plain", (1, d + rank))]
    return rows

"""A layer in the bytes that kernels read: activations as FP8 rows, caches as pages, experts packed.

It says in fewer and larger ops what `attention.py`, `moe.py` and `block.py` say, in the official roundings, whose
values these bytes hold: the numbers are the same to the bit, but for the indexer's scores, which nothing rounds here.
So a far entry may be chosen in place of another whose score was rounded to an equal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from dsv4.cache.paged import Paged
from dsv4.cache.store import AnyLayer
from dsv4.cache.stored import StoredLayer
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import ConfigError
from dsv4.model.attention import compressor_of
from dsv4.model.batch import Batch
from dsv4.model.beside import Beside
from dsv4.model.block import Block
from dsv4.model.layers import Behind, HyperConnection, Norm, Scope
from dsv4.model.moe import Router, experts_of
from dsv4.model.places import Places
from dsv4.ops.attention import attend
from dsv4.ops.compress import OVERLAPPED, Compressor, Ring, StepTokens, compress_keys, compress_kv
from dsv4.ops.experts import store_experts, stored_moe
from dsv4.ops.index import entry_rows, select_rows
from dsv4.ops.index_logits import index_logits
from dsv4.ops.index_queries import IndexQueries, index_queries
from dsv4.ops.kv import write_kv
from dsv4.ops.linear import scaled_matmul, shared_input
from dsv4.ops.linear_grouped import grouped_linear_quant
from dsv4.ops.linear_heads import scaled_matmul_q_norm_rope
from dsv4.ops.mhc import Mixer, mhc_post_pre_norm_quant, mhc_pre_norm_quant
from dsv4.ops.norm import rms_norm_quant
from dsv4.ops.prefetch import prefetch
from dsv4.ops.rope import Rotation
from dsv4.ops.step import BlockRows
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW, Format
from dsv4.quant.index_keys import KeyLayout
from dsv4.quant.rounding import Numerics
from dsv4.quant.tensor import QTensor
from dsv4.taps import heard, tap

_FEW: Final = 64  # tokens
_Compressed = tuple[Tensor, Tensor, Tensor, float, Rotation, StepTokens, Ring, int]  # the first of `compress_kv`


def _stored(scope: Scope, name: str) -> QTensor:
    weight = scope.matrix(name)
    if not isinstance(weight, QTensor) or weight.format is not FP8_BLOCK:
        got = weight.format.name if isinstance(weight, QTensor) else str(weight.dtype)
        raise ConfigError(f"stored layers: {name}", got=got, wanted=FP8_BLOCK.name, do="run it simulated")
    return weight


def _below(matrices: Sequence[QTensor]) -> QTensor:
    """One matrix of the rows of all. All but the last have whole blocks of them."""
    data, scale = (torch.cat([getattr(one, part) for one in matrices]) for part in ("data", "scale"))
    return QTensor(data, scale, matrices[0].format)


class StoredIndexer:
    """Chooses the compressed rows that each token of a ratio-4 layer attends to."""

    def __init__(self, scope: Scope, config: ModelConfig) -> None:
        self.wq_b, self.weights_proj = _stored(scope, "wq_b"), scope.dense("weights_proj.weight")
        self.compressor = compressor_of(scope.sub("compressor"))
        self.heads, self.dim, self.k = config.index_n_heads, config.index_head_dim, config.index_topk

    def project(self, latent: QTensor) -> Tensor:
        """The heads [T, H, D] of the tokens' latents [T, lora]."""
        return scaled_matmul(latent, self.wq_b, torch.bfloat16).view(-1, self.heads, self.dim)

    def select(self, queries: IndexQueries, places: Places, keys: Paged[KeyLayout]) -> Tensor:
        """Entries for each token, ascending, -1 at the end: [T, k]."""
        visible = places.blocks(0).visible
        scores = index_logits(*queries, keys.pages, places.table, places.slots, visible, places.width)
        return select_rows(scores, visible, self.k)


class StoredAttention:
    """One layer's attention over stored rows."""

    def __init__(self, scope: Scope, config: ModelConfig, ratio: int, layer: int) -> None:
        self.ratio, self.layer, self.eps = ratio, layer, config.rms_norm_eps
        self.heads, self.groups, self.lora = config.num_attention_heads, config.o_groups, config.q_lora_rank
        self.input = _below([_stored(scope, "wq_a"), _stored(scope, "wkv")])
        self.wq_b, self.wo_a, self.wo_b = (_stored(scope, name) for name in ("wq_b", "wo_a", "wo_b"))
        self.q_norm, self.kv_norm = Norm(scope, "q_norm", config), Norm(scope, "kv_norm", config)
        self.sink = scope.wide("attn_sink")
        self.compressor = compressor_of(scope.sub("compressor")) if ratio else None
        self.indexer = StoredIndexer(scope.sub("indexer"), config) if ratio == OVERLAPPED else None
        self.dense, self.widths = self._dense()

    def _dense(self) -> tuple[Tensor | None, list[int]]:
        """The dense matrices that read a layer's input, one below another, and the rows of each.

        Whose they are has views of them from now on: they lie in memory once.
        """
        if self.compressor is None:
            return None, []
        parts = [self.compressor.project]
        if self.indexer:
            parts += [self.indexer.compressor.project, self.indexer.weights_proj]
        dense, widths = torch.cat(parts), [len(part) for part in parts]
        views = dense.split(widths)
        self.compressor = self.compressor._replace(project=views[0])
        if self.indexer:
            self.indexer.compressor = self.indexer.compressor._replace(project=views[1])
            self.indexer.weights_proj = views[2]
        return dense, widths

    def __call__(self, x: Tensor, rows: QTensor, batch: Batch, store: StoredLayer) -> Tensor:
        """x: [T, d], normalised, and `rows`, the same as FP8_ROW; writes this step into `store`, returns [T, d]."""
        turn, places = batch.turn(self.ratio), batch.places(store)
        scored = self.indexer is not None and places.most > self.indexer.k
        # Here, and not in one of the branches, of which none may wait for another's.
        listed = self.indexer.k if self.indexer is not None and scored else places.most if self.ratio else 0
        pool = batch.pool(store, listed)
        blocks = places.blocks(0 if scored or pool else listed) if self.ratio else None
        far = blocks.rows if blocks else places.positions.new_empty(len(x), 0)
        table = pool.table if pool and blocks else places.table
        if pool and blocks and not scored:
            far = pool.first_rows(listed)
        cache, index, ahead = (Beside(x.device, n) for n in range(3))
        parts: Sequence[Tensor] = ()
        if self.dense is None:
            wide = scaled_matmul(rows, self.input, x.dtype)
        else:
            dense, wide = shared_input(x, rows, self.dense, self.input)
            parts = dense.split(self.widths, 1)
        with cache.run():
            if self.indexer is not None and store.keys is not None and blocks:
                given = self._given(parts[1], self.indexer.compressor, store.key_tail, batch, blocks, store)
                compress_keys(*given, store.keys.pages, store.keys.layout)
                cache.mark()
        latent = rms_norm_quant(wide[:, : self.lora], self.q_norm.weight, self.eps, FP8_ROW)[1]
        if self.indexer is not None and scored:
            heads = self.indexer.project(latent)  # in front of wq_b: what follows from it takes as long
            with index.run():
                far = self._chosen(self.indexer, heads, parts[2], turn, places, store, cache, table)
        elif self.indexer is not None and heard():
            tap("selected", self.layer, places.every)
        with cache.run(again=True):
            if self.compressor is not None and blocks:
                given = self._given(parts[0], self.compressor, store.tail, batch, blocks, store)
                compress_kv(*given, store.far.pages)
            write_kv(wide[:, self.lora :], self.kv_norm.weight, self.eps, turn, store.near.pages, places.write)
        q = scaled_matmul_q_norm_rope(latent, self.wq_b, self.heads, self.eps, turn, x.dtype)
        with ahead.run():
            soon(len(x), self.wo_a.data)
        cache.join()
        index.join()
        (near, beyond), seen = (store.near.pages, store.far.pages), places.window
        if pool:
            (near, beyond), seen = pool.decoded(store, q.shape[-1], turn.cos.shape[-1]), pool.seen
        values = attend(q, near, seen, beyond, far, self.sink, turn)
        grouped = grouped_linear_quant(values.view(len(x), self.groups, -1), self.wo_a, FP8_ROW)
        y = scaled_matmul(grouped, self.wo_b, x.dtype)
        ahead.join()
        return y

    def _given(
        self, projected: Tensor, weights: Compressor, terms: Tensor, batch: Batch, blocks: BlockRows, store: StoredLayer
    ) -> _Compressed:
        """What keeps the tokens' terms and stores the entries of blocks that end here."""
        tokens, ring = StepTokens(batch.slots, batch.positions, blocks.own), Ring(terms, store.layout.tail)
        turn = batch.block_turns[self.ratio]
        return projected, weights.ape, weights.norm, self.eps, turn, tokens, ring, batch.most

    def _chosen(
        self,
        indexer: StoredIndexer,
        heads: Tensor,
        weights: Tensor,
        turn: Rotation,
        places: Places,
        store: StoredLayer,
        written: Beside,
        table: Tensor,
    ) -> Tensor:
        """Far rows that each token attends to where not all are: [T, k], -1 for none.

        heads: the indexer's; weights: of these; written: where the step's own keys are; table: of the rows.
        """
        assert store.keys is not None
        queries = index_queries(heads, turn, weights, store.keys.layout)
        written.join()
        chosen = indexer.select(queries, places, store.keys)
        tap("selected", self.layer, chosen)
        return entry_rows(chosen, table, places.slots, places.layout.entries)


def soon(tokens: int, *weights: Tensor) -> None:
    """Bring weights into the cache meanwhile, where a step has so few tokens that it waits for little else."""
    if tokens <= _FEW:
        for weight in weights:
            prefetch(weight)


class StoredMoE:
    """Router, routed experts and the shared one, packed."""

    def __init__(self, scope: Scope, config: ModelConfig, layer: int, hashed: bool) -> None:
        self.router, self.limit = Router(scope, config, layer, hashed), config.swiglu_limit
        self.experts = store_experts(*experts_of(scope, config))

    def __call__(self, x: Tensor, rows: QTensor, batch: Batch) -> Tensor:
        """x: [T, d], normalised, and `rows`, the same as FP8_ROW; returns [T, d]."""
        return stored_moe(rows, self.router(x, batch), self.experts, self.limit, x.dtype)


class StoredBlock:
    """A main layer, or a draft's (ratio 0, never hashed). `rounds` is the official table: bytes know no other."""

    def __init__(
        self, scope: Scope, config: ModelConfig, layer: int, ratio: int, hashed: bool, rounds: Numerics
    ) -> None:
        self.layer = layer
        self.hc_attn, self.hc_ffn = (HyperConnection(scope, site, config) for site in ("attn", "ffn"))
        self.attn_norm, self.ffn_norm = Norm(scope, "attn_norm", config), Norm(scope, "ffn_norm", config)
        self.attn = StoredAttention(scope.sub("attn"), config, ratio, layer)
        self.ffn = StoredMoE(scope.sub("ffn"), config, layer, hashed)

    def __call__(self, streams: Tensor | Behind, batch: Batch, store: AnyLayer) -> Behind:
        """streams: [T, M, d], or what the layer before left."""
        assert isinstance(store, StoredLayer)
        site = _site(self.hc_attn, self.attn_norm)
        if isinstance(streams, Tensor):
            mixed, x, rows = mhc_pre_norm_quant(streams, *site)
        else:
            written, mixed, x, rows = mhc_post_pre_norm_quant(streams.y, streams.mixed, *site)
            tap("streams", streams.layer, written)
        tap("attn comb", self.layer, mixed.comb)
        y = self.attn(x, rows, batch, store)
        ahead = Beside(x.device, 2)
        with ahead.run():
            soon(len(x), self.ffn.experts.shared.up.tiles, self.ffn.experts.shared.down.tiles)
        _, mixed, x, rows = mhc_post_pre_norm_quant(y, mixed, *_site(self.hc_ffn, self.ffn_norm))
        tap("ffn comb", self.layer, mixed.comb)
        y = self.ffn(x, rows, batch)
        ahead.join()
        return Behind(y, mixed, self.layer)


def _site(site: HyperConnection, norm: Norm) -> tuple[Mixer, int, float, float, Tensor, Format]:
    """What the fused ops of an mHC site take behind streams or sublayer."""
    return site.mixer, site.iterations, site.eps, site.norm_eps, norm.weight, FP8_ROW


def kind_of_block(options: EngineOptions) -> type[Block | StoredBlock]:
    """What a model's layers, and a draft's, are made of."""
    return StoredBlock if options.stored else Block

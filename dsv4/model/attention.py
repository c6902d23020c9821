"""Attention over a window and, in the layers that compress, over pooled rows of the whole past."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.cache.store import LayerStore
from dsv4.config import ModelConfig
from dsv4.model.batch import Batch, Closing
from dsv4.model.layers import Norm, Scope
from dsv4.ops.attention import BLOCK, sparse_attention, window_positions
from dsv4.ops.compress import Compressor, block_tokens, compressor_terms, finish_entry, pool
from dsv4.ops.index import head_weights, index_scores, select_rows
from dsv4.ops.linear import dense, grouped_linear, linear, project, quantize_input
from dsv4.ops.norm import unit_rms
from dsv4.ops.quantize import quantize_index, quantize_kv
from dsv4.ops.rope import Rotation, rope
from dsv4.taps import tap


def _compressor(scope: Scope) -> Compressor:
    names = ("wkv.weight", "wgate.weight", "ape", "norm.weight")
    return Compressor(*(scope.wide(name) for name in names))


class Indexer:
    """Chooses the compressed rows that each token of a ratio-4 layer attends to."""

    def __init__(self, scope: Scope, config: ModelConfig, simulate: bool) -> None:
        self.wq_b, self.weights_proj = scope.matrix("wq_b"), dense(scope.matrix("weights_proj"))
        self.compressor = _compressor(scope.sub("compressor"))
        self.heads, self.dim, self.k = config.index_n_heads, config.index_head_dim, config.index_topk
        self.eps, self.simulate = config.rms_norm_eps, simulate

    def remember(self, x: Tensor, batch: Batch, ratio: int, store: LayerStore) -> None:
        """Run the index keys' own compressor over x [T, d]."""
        closing = batch.closing[ratio]
        terms = compressor_terms(x, self.compressor, batch.positions)
        store.key_tail[store.tail_rows(batch.slots, batch.positions)] = terms
        if closing is not None:
            keys = _entries(store.key_tail, self.compressor, closing, ratio, store, x.dtype, self.eps)
            store.keys[store.key_rows(closing.slots, closing.entries)] = quantize_index(keys) if self.simulate else keys

    def select(self, x: Tensor, latent: Tensor, batch: Batch, visible: Tensor, store: LayerStore) -> Tensor:
        """Entries for each token, ascending, -1 at the end. x: [T, d]; latent as in `queries`; returns [T, n]."""
        ratio = store.layout.ratio
        width = -(-(batch.longest // ratio) // BLOCK) * BLOCK
        entries = torch.arange(width, device=x.device)
        if batch.longest // ratio <= self.k:  # every visible entry is selected: no score can change the answer
            return entries.masked_fill(entries >= visible.unsqueeze(1), -1)
        q = project(latent, self.wq_b).unflatten(1, (self.heads, self.dim))
        q = rope(q, batch.turn(ratio))
        q = quantize_index(q) if self.simulate else q
        weights = head_weights(x, self.weights_proj, self.dim)
        rows = store.key_rows(batch.slots.unsqueeze(1), entries)
        return select_rows(index_scores(q, weights, store.keys, rows), visible, self.k)


def _entries(
    tail: Tensor, weights: Compressor, closing: Closing, ratio: int, store: LayerStore, dtype: torch.dtype, eps: float
) -> Tensor:
    """The closed blocks' entries, normalised and rotated: [B, D]."""
    tokens = block_tokens(closing.ends, ratio)
    terms = tail[store.tail_rows(closing.slots.unsqueeze(1), tokens)]
    return finish_entry(pool(terms, tokens, ratio, dtype), weights.norm, closing.turn, eps)


class Attention:
    """One layer's attention. `simulate`: round activations, keys and index vectors as the model was trained with."""

    def __init__(self, scope: Scope, config: ModelConfig, ratio: int, layer: int, simulate: bool) -> None:
        self.ratio, self.layer, self.simulate = ratio, layer, simulate
        self.heads, self.groups, self.window = config.num_attention_heads, config.o_groups, config.sliding_window
        self.rope_dims, self.eps = config.qk_rope_head_dim, config.rms_norm_eps
        self.wq_a, self.wq_b, self.wkv = (scope.matrix(name) for name in ("wq_a", "wq_b", "wkv"))
        self.wo_a, self.wo_b = dense(scope.matrix("wo_a")), scope.matrix("wo_b")
        self.q_norm, self.kv_norm = Norm(scope, "q_norm", config), Norm(scope, "kv_norm", config)
        self.sink = scope.wide("attn_sink")
        self.compressor = _compressor(scope.sub("compressor")) if ratio else None
        self.indexer = Indexer(scope.sub("indexer"), config, simulate) if ratio == 4 else None

    def __call__(self, x: Tensor, batch: Batch, store: LayerStore) -> Tensor:
        """x: [T, d], normalised; writes this step into `store`, returns [T, d]."""
        turn, slots = batch.turn(self.ratio), batch.slots.unsqueeze(1)
        rounded = quantize_input(x, self.wq_a, self.simulate)
        latent, q = self.queries(rounded, turn)
        store.kv[store.window_rows(batch.slots, batch.positions)] = self.keys(rounded, turn)
        rows = store.window_rows(slots, window_positions(batch.positions, self.window))
        if self.compressor is not None:
            chosen = self.remember(x, latent, batch, self.compressor, store)
            rows = torch.cat((rows, store.entry_rows(slots, chosen)), 1)
        return self.output(sparse_attention(q, store.kv, rows, self.sink), turn)

    def queries(self, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """The low-rank query [T, q_lora], rounded for its matrices, and the rotated heads [T, H, D].

        x: [T, d], here and in `keys` as `quantize_input` leaves it: one rounding serves both.
        """
        latent = quantize_input(self.q_norm(project(x, self.wq_a)), self.wq_b, self.simulate)
        q = project(latent, self.wq_b).unflatten(1, (self.heads, -1))
        return latent, rope(unit_rms(q, self.eps), turn)

    def keys(self, x: Tensor, turn: Rotation) -> Tensor:
        """The one vector per token that is key and value of every head: [T, d] -> [T, D]."""
        kv = rope(self.kv_norm(project(x, self.wkv)), turn)
        return quantize_kv(kv, self.rope_dims) if self.simulate else kv

    def remember(self, x: Tensor, latent: Tensor, batch: Batch, weights: Compressor, store: LayerStore) -> Tensor:
        """Pool the blocks that end here, then name the entries that each token attends to: [T, n], -1 for none."""
        closing = batch.closing[self.ratio]
        store.tail[store.tail_rows(batch.slots, batch.positions)] = compressor_terms(x, weights, batch.positions)
        if closing is not None:
            entries = _entries(store.tail, weights, closing, self.ratio, store, x.dtype, self.eps)
            entries = quantize_kv(entries, self.rope_dims) if self.simulate else entries
            store.kv[store.entry_rows(closing.slots, closing.entries)] = entries
        visible = (batch.positions + 1) // self.ratio
        if self.indexer is None:
            every = torch.arange(batch.longest // self.ratio, device=x.device)
            return every.masked_fill(every >= visible.unsqueeze(1), -1)
        self.indexer.remember(x, batch, self.ratio, store)
        chosen = self.indexer.select(x, latent, batch, visible, store)
        tap("selected", self.layer, chosen)
        return chosen

    def output(self, out: Tensor, turn: Rotation) -> Tensor:
        """Turn the values back by the query's own position and project the groups of heads: [T, H, D] -> [T, d]."""
        grouped = rope(out, turn, inverse=True).reshape(out.shape[0], self.groups, -1)
        return linear(grouped_linear(grouped, self.wo_a), self.wo_b, self.simulate)

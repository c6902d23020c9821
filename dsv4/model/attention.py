"""Attention over a window and, in the layers that compress, over pooled rows of the whole past."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.cache.store import LayerStore
from dsv4.config import ModelConfig
from dsv4.model.batch import Batch
from dsv4.model.layers import Norm, Scope
from dsv4.model.places import Places
from dsv4.ops.attention import sparse_attention
from dsv4.ops.compress import OVERLAPPED, Compressor, compressor_terms, finish_entry, pool
from dsv4.ops.index import head_weights, index_scores, select_rows
from dsv4.ops.linear import dense, grouped_linear, linear, project, quantize_input
from dsv4.ops.norm import unit_rms
from dsv4.ops.quantize import quantize_index, quantize_kv
from dsv4.ops.rope import Rotation, rope
from dsv4.quant.rounding import Numerics, none
from dsv4.quant.tensor import QTensor
from dsv4.taps import tap


def compressor_of(scope: Scope) -> Compressor:
    """The weights of the compressor below a scope."""
    project = torch.cat([scope.dense(f"{name}.weight") for name in ("wkv", "wgate")])
    ape, norm = scope.wide("ape"), scope.wide("norm.weight")
    return Compressor(project, torch.stack((torch.zeros_like(ape), ape), 1), norm)


class Indexer:
    """Chooses the compressed rows that each token of a ratio-4 layer attends to."""

    def __init__(self, scope: Scope, config: ModelConfig, rounds: Numerics) -> None:
        self.wq_b, self.weights_proj = scope.matrix("wq_b"), dense(scope.matrix("weights_proj"))
        self.compressor = compressor_of(scope.sub("compressor"))
        self.heads, self.dim, self.k = config.index_n_heads, config.index_head_dim, config.index_topk
        self.eps, self.rounds = config.rms_norm_eps, rounds

    def remember(self, x: Tensor, places: Places, store: LayerStore) -> None:
        """Run the index keys' own compressor over x [T, d]."""
        store.key_tail[places.tail] = compressor_terms(x, self.compressor, places.positions)
        if places.closing is not None:
            keys = _entries(store.key_tail, self.compressor, places, x.dtype, self.eps)
            *_, rows = places.closed
            store.keys[rows] = quantize_index(keys, self.rounds.index)

    def select(self, x: Tensor, latent: Tensor, turn: Rotation, places: Places, store: LayerStore) -> Tensor:
        """Entries for each token, ascending, -1 at the end. x: [T, d]; latent as in `queries`; returns [T, k]."""
        q = rope(project(latent, self.wq_b).view(-1, self.heads, self.dim), turn)
        q = quantize_index(q, self.rounds.index)
        scores = index_scores(q, head_weights(x, self.weights_proj, self.dim), store.keys, places.keys)
        return select_rows(scores, places.blocks(0).visible, self.k)


def _entries(tail: Tensor, weights: Compressor, places: Places, dtype: torch.dtype, eps: float) -> Tensor:
    """The entries of the blocks that end in this step, normalised and rotated: [B, D]."""
    assert places.closing is not None
    tokens, rows, *_ = places.closed
    entry = pool(tail[rows], tokens, places.layout.ratio, dtype)
    return finish_entry(entry, weights.norm, places.closing.turn, eps)


class Attention:
    """One layer's attention. `rounds`: what activations, keys and index vectors are rounded to."""

    def __init__(self, scope: Scope, config: ModelConfig, ratio: int, layer: int, rounds: Numerics) -> None:
        self.ratio, self.layer, self.rounds = ratio, layer, rounds
        self.heads, self.groups = config.num_attention_heads, config.o_groups
        self.rope_dims, self.eps = config.qk_rope_head_dim, config.rms_norm_eps
        self.wq_a, self.wq_b, self.wkv = (scope.matrix(name) for name in ("wq_a", "wq_b", "wkv"))
        self.wo_a, self.wo_b = scope.matrix("wo_a"), scope.matrix("wo_b")
        self.round_groups = rounds.group_output if isinstance(self.wo_a, QTensor) else none
        self.q_norm, self.kv_norm = Norm(scope, "q_norm", config), Norm(scope, "kv_norm", config)
        self.sink = scope.wide("attn_sink")
        self.compressor = compressor_of(scope.sub("compressor")) if ratio else None
        self.indexer = Indexer(scope.sub("indexer"), config, rounds) if ratio == OVERLAPPED else None

    def __call__(self, x: Tensor, batch: Batch, store: LayerStore) -> Tensor:
        """x: [T, d], normalised; writes this step into `store`, returns [T, d]."""
        turn, places = batch.turn(self.ratio), batch.places(store)
        rounded = quantize_input(x, self.wq_a, self.rounds.attn_input)
        latent, q = self.queries(rounded, turn)
        store.kv[places.write] = self.keys(rounded, turn)
        rows = places.window
        if self.compressor is not None:
            self.remember(x, self.compressor, places, store)
            rows = torch.cat((rows, self.entries(x, latent, turn, places, store)), 1)
        return self.output(sparse_attention(q, store.kv, rows, self.sink), turn)

    def queries(self, x: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
        """The low-rank query [T, q_lora], rounded for its matrices, and the rotated heads [T, H, D].

        x: [T, d], here and in `keys` as `quantize_input` leaves it: one rounding serves both.
        """
        latent = quantize_input(self.q_norm(project(x, self.wq_a)), self.wq_b, self.rounds.latent)
        q = project(latent, self.wq_b).view(len(x), self.heads, -1)
        return latent, rope(unit_rms(q, self.eps), turn)

    def keys(self, x: Tensor, turn: Rotation) -> Tensor:
        """The one vector per token that is key and value of every head: [T, d] -> [T, D]."""
        kv = rope(self.kv_norm(project(x, self.wkv)), turn)
        return quantize_kv(kv, self.rope_dims, self.rounds.kv)

    def remember(self, x: Tensor, weights: Compressor, places: Places, store: LayerStore) -> None:
        """Keep what the tokens add to their blocks, and pool the blocks that end here."""
        store.tail[places.tail] = compressor_terms(x, weights, places.positions)
        if places.closing is not None:
            entries = _entries(store.tail, weights, places, x.dtype, self.eps)
            _, _, rows, _ = places.closed
            store.kv[rows] = quantize_kv(entries, self.rope_dims, self.rounds.kv)
        if self.indexer is not None:
            self.indexer.remember(x, places, store)

    def entries(self, x: Tensor, latent: Tensor, turn: Rotation, places: Places, store: LayerStore) -> Tensor:
        """Rows of the pooled entries that each token attends to: [T, n], -1 for none.

        Where all are selected anyway, no score can change the answer and none is computed.
        """
        if self.indexer is None:
            return places.every_row
        if places.most <= self.indexer.k:
            tap("selected", self.layer, places.every)
            return places.every_row
        chosen = self.indexer.select(x, latent, turn, places, store)
        tap("selected", self.layer, chosen)
        return places.rows(chosen)

    def output(self, out: Tensor, turn: Rotation) -> Tensor:
        """Turn the values back by the query's own position and project the groups of heads: [T, H, D] -> [T, d]."""
        grouped = rope(out, turn, inverse=True).reshape(out.shape[0], self.groups, -1)
        return linear(grouped_linear(self.round_groups(grouped), self.wo_a), self.wo_b, self.rounds.attn_output)

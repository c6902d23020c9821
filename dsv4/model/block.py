"""One layer: attention and experts, each between the two halves of an mHC site."""

from __future__ import annotations

from torch import Tensor

from dsv4.cache.store import AnyLayer, LayerStore
from dsv4.config import ModelConfig
from dsv4.model.attention import Attention
from dsv4.model.batch import Batch
from dsv4.model.layers import Behind, HyperConnection, Norm, Scope
from dsv4.model.moe import MoE
from dsv4.quant.rounding import Numerics
from dsv4.taps import tap


class Block:
    """A main layer, or a draft's (ratio 0, never hashed)."""

    def __init__(
        self, scope: Scope, config: ModelConfig, layer: int, ratio: int, hashed: bool, rounds: Numerics
    ) -> None:
        self.layer = layer
        self.hc_attn, self.hc_ffn = (HyperConnection(scope, site, config) for site in ("attn", "ffn"))
        self.attn_norm, self.ffn_norm = Norm(scope, "attn_norm", config), Norm(scope, "ffn_norm", config)
        self.attn = Attention(scope.sub("attn"), config, ratio, layer, rounds)
        self.ffn = MoE(scope.sub("ffn"), config, layer, hashed, rounds)

    def __call__(self, streams: Tensor | Behind, batch: Batch, store: AnyLayer) -> Tensor:
        """streams: [T, M, d]; returns the same."""
        assert isinstance(streams, Tensor)
        assert isinstance(store, LayerStore)
        mixed = self.hc_attn.pre(streams)
        tap("attn comb", self.layer, mixed.comb)
        y = self.attn(self.attn_norm(mixed.x), batch, store)
        streams = self.feed_forward(self.hc_attn.post(y, mixed), batch)
        tap("streams", self.layer, streams)
        return streams

    def feed_forward(self, streams: Tensor, batch: Batch) -> Tensor:
        """The second half of the layer."""
        mixed = self.hc_ffn.pre(streams)
        tap("ffn comb", self.layer, mixed.comb)
        return self.hc_ffn.post(self.ffn(self.ffn_norm(mixed.x), batch), mixed)

"""The one-layer draft of the first releases: from a position's streams and the next token to the token after it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsv4.cache.store import AnyLayer
from dsv4.config import EngineOptions, ModelConfig
from dsv4.model.batch import Batch
from dsv4.model.layers import HeadMix, Norm, Scope, settled
from dsv4.model.model import Model
from dsv4.model.stored import kind_of_block
from dsv4.ops.linear import linear, matmul
from dsv4.quant.rounding import NUMERICS
from dsv4.quant.tensor import QTensor


class Mtp:
    """`mtp.0`: a window-only layer with a projection before it; embedding and head are the main model's."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor | QTensor], options: EngineOptions, main: Model
    ) -> None:
        scope = Scope(weights, "mtp.0.")
        self.main, self.rounds = main, NUMERICS[options.numerics]
        self.e_proj, self.h_proj = scope.matrix("e_proj"), scope.matrix("h_proj")
        self.enorm, self.hnorm = Norm(scope, "enorm", config), Norm(scope, "hnorm", config)
        self.block = kind_of_block(options)(
            scope, config, config.num_hidden_layers, ratio=0, hashed=False, rounds=self.rounds
        )
        self.head_mix = HeadMix(scope, config)

    @torch.inference_mode()
    def __call__(self, streams: Tensor, next_ids: Tensor, batch: Batch, store: AnyLayer) -> Tensor:
        """One step over the T positions of `batch`.

        streams: [T, M, d] behind the main model's last layer (raw, before any norm) or this block's own output when
        it drafts further; next_ids: [T] the token after each position; store: the draft layer's. Returns [T, M, d].
        """
        tokens, count, width = streams.shape
        e = linear(self.enorm(self.main.embed(next_ids)), self.e_proj, self.rounds.draft_input)
        h = linear(self.hnorm(streams).view(-1, width), self.h_proj, self.rounds.draft_input).view(tokens, count, width)
        return settled(self.block(e.unsqueeze(1) + h, batch, store))

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """[T, M, d] -> [T, V] FP32: of the token two places after each position."""
        return matmul(self.head_mix(streams), self.main.head)

"""The whole model: token ids in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.cache.store import Store
from dsv4.config import EngineOptions, ModelConfig
from dsv4.model.batch import Batch, Segment, Steps, Unread, make_batch
from dsv4.model.layers import Behind, HeadMix, Scope, expand, settled
from dsv4.model.stored import kind_of_block
from dsv4.ops.linear import matmul
from dsv4.quant.rounding import NUMERICS, Numerics
from dsv4.quant.tensor import QTensor
from dsv4.taps import tap


class Output(NamedTuple):
    """What a step leaves for the head and for a draft."""

    streams: Tensor  # [T, M, d] behind the last layer, before any norm
    targets: Tensor | None  # [T, n * d] mean streams of the n layers that a DSpark draft reads


class Model:
    """The main layers, without the draft (`mtp.py`, `dspark.py`)."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor | QTensor],
        options: EngineOptions,
        numerics: Callable[[int], Numerics] | None = None,
    ) -> None:
        """`numerics`: what layer n rounds, in place of what `options` says for all."""
        self.config, self.dtype = config, getattr(torch, options.dtype)
        self.targets = config.dspark.target_layer_ids if config.dspark else ()
        rounds = numerics or (lambda _: NUMERICS[options.numerics])
        scope = Scope(weights)
        self.steps = Steps.of(config, options.device, stored=bool(options.stored))
        self.embedding = scope.wide("embed.weight").to(self.dtype)
        make = kind_of_block(options)
        self.blocks = [
            make(scope.sub(f"layers.{n}"), config, n, ratio, n < config.num_hash_layers, rounds(n))
            for n, ratio in enumerate(config.layer_ratios)
        ]
        self.head_mix, self.head = HeadMix(scope, config), scope.dense("head.weight")

    def batch(self, segments: Sequence[Segment], unread: Unread | None = None) -> Batch:
        """Lay segments out as one step of this model."""
        return make_batch(segments, self.config.layer_ratios, self.steps, unread)

    def embed(self, ids: Tensor) -> Tensor:
        """[T] token ids -> [T, d]."""
        return self.embedding[ids]

    @torch.inference_mode()
    def __call__(self, batch: Batch, store: Store) -> Output:
        """Run the layers over one step, writing its state into `store`."""
        streams: Tensor | Behind = expand(self.embed(batch.ids), self.config.hc_mult)
        tap("streams", -1, settled(streams))
        means: dict[int, Tensor] = {}
        for block, layer_store in zip(self.blocks, store.layers, strict=False):
            streams = block(streams, batch, layer_store)
            if block.layer in self.targets:
                streams = settled(streams)
                means[block.layer] = streams.float().mean(1).to(streams.dtype)
        return Output(settled(streams), torch.cat([means[layer] for layer in self.targets], 1) if means else None)

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """[T, M, d] of the tokens asked about -> [T, V] FP32."""
        return matmul(self.head_mix(streams), self.head)

"""The three-stage draft of the later releases: a block of tokens at once from what three main layers saw.

Context: one vector per committed position, made of the listed main layers' outputs, gives keys for every stage.
Draft: the anchor token and noise tokens run through the three stages and see the context and one another, in both
directions; a low-rank table of token pairs then corrects the logits one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.cache.store import LayerStore
from dsv4.config import EngineOptions, ModelConfig
from dsv4.model.batch import Batch, Segment
from dsv4.model.block import Block
from dsv4.model.layers import HeadMix, Norm, Scope, expand
from dsv4.model.model import Model
from dsv4.ops.attention import sparse_attention, window_positions
from dsv4.ops.linear import linear, matmul, quantize_input
from dsv4.quant.rounding import NUMERICS
from dsv4.quant.tensor import QTensor


class Draft(NamedTuple):
    """Proposed tokens and what they rest on."""

    ids: list[int]
    logits: Tensor  # [n, V] FP32, corrected
    confidence: Tensor  # [n] logits; their sigmoid is the chance of acceptance


class DSpark:
    """`mtp.0` to `mtp.2`."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor | QTensor], options: EngineOptions, main: Model
    ) -> None:
        assert config.dspark is not None
        self.rules, self.main, self.rounds = config.dspark, main, NUMERICS[options.numerics]
        self.window, self.streams = config.sliding_window, config.hc_mult
        stages = [Scope(weights, f"mtp.{n}.") for n in range(config.draft_layers)]
        first, last = stages[0], stages[-1]
        self.main_proj, self.main_norm = first.matrix("main_proj"), Norm(first, "main_norm", config)
        self.blocks = [
            Block(scope, config, config.num_hidden_layers + n, ratio=0, hashed=False, rounds=self.rounds)
            for n, scope in enumerate(stages)
        ]
        self.head_mix = HeadMix(last, config)
        self.pairs_in, self.pairs_out = (last.wide(f"markov_head.markov_{name}.weight") for name in ("w1", "w2"))
        self.confidence = last.wide("confidence_head.proj.weight")

    @torch.inference_mode()
    def observe(self, targets: Tensor, batch: Batch, stores: list[LayerStore]) -> Tensor:
        """Keep the context keys of committed positions.

        targets: [T, n * d] of `Output.targets`; returns main_x [T, d].
        """
        x = self.main_norm(linear(targets, self.main_proj, self.rounds.draft_input))
        rounded = quantize_input(x, self.blocks[0].attn.wkv, self.rounds.attn_input)
        for block, store in zip(self.blocks, stores, strict=True):
            store.kv[batch.places(store).write] = block.attn.keys(rounded, batch.plain)
        return x

    @torch.inference_mode()
    def draft(self, slot: int, position: int, anchor: int, stores: list[LayerStore]) -> Draft:
        """Propose `block_size` tokens after `anchor`, which stands behind the last observed `position` of `slot`."""
        ids = [anchor] + [self.rules.noise_token_id] * (self.rules.block_size - 1)
        batch = self.main.batch([Segment(slot, position + 1, ids)])
        streams = expand(self.main.embed(batch.ids), self.streams)
        for block, store in zip(self.blocks, stores, strict=True):
            streams = self._stage(block, streams, batch, position, store)
        return self._choose(streams, anchor)

    def _stage(self, block: Block, streams: Tensor, batch: Batch, position: int, store: LayerStore) -> Tensor:
        """One stage: every query sees the whole context window and the whole block; nothing is kept."""
        mixed = block.hc_attn.pre(streams)
        x = quantize_input(block.attn_norm(mixed.x), block.attn.wq_a, self.rounds.attn_input)
        _, q = block.attn.queries(x, batch.plain)
        context = window_positions(torch.tensor([position], device=x.device), self.window)[0]
        context = store.layout.window_rows(batch.slots[0], context[context >= 0])
        pool = torch.cat((store.kv[context], block.attn.keys(x, batch.plain)))
        rows = torch.arange(len(pool), device=x.device).expand(len(x), -1)
        y = block.attn.output(sparse_attention(q, pool, rows, block.attn.sink), batch.plain)
        return block.feed_forward(block.hc_attn.post(y, mixed), batch)

    def _choose(self, streams: Tensor, anchor: int) -> Draft:
        """Greedy tokens one after another, each corrected by the one before it."""
        reduced = self.head_mix.reduce(streams)
        base = matmul(self.head_mix.norm(reduced), self.main.head)
        ids, logits, confidence = [anchor], [], []
        for state, row in zip(reduced, base, strict=True):
            pair = self.pairs_in[ids[-1]].unsqueeze(0)
            logits.append(row + matmul(pair, self.pairs_out)[0])
            confidence.append(matmul(torch.cat((state.unsqueeze(0).float(), pair), 1), self.confidence)[0, 0])
            ids.append(int(logits[-1].argmax()))
        return Draft(ids[1:], torch.stack(logits), torch.stack(confidence))

"""The architecture as it is trained: whole rows of tokens at once, with gradients, in pieces that compile.

The mathematics is that of `dsv4/model` and `dsv4/ops`, where each equation is explained; here it is arranged for a
GPU that trains. N tokens are B rows of S, one after another. Everything but the attention to compressed entries works
on the flat N, so that a piece is compiled once for every layer and every length of row. A test compares the logits
with the engine's.

Three things are taught that logits alone would not: the Lightning indexer (it only picks, so it gets its own loss, the
divergence of its softmax from where attention went), the draft, and rounding (see `rounding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv4.config import ModelConfig
from dsv4.ops.rope import frequencies
from training.pieces import (
    OVERLAPPED,
    Style,
    Turn,
    compress,
    enter,
    entries_attention,
    expert_weights,
    experts,
    heads,
    index_inputs,
    index_loss,
    index_scores,
    leave,
    linear,
    merge,
    project_out,
    reduce,
    rms,
    round_kv,
    scores_of_experts,
    token_losses,
    window,
)  # fmt: skip

Params = Mapping[str, Tensor]
CHUNK_SCORES = 1 << 29  # attention scores held at once


@dataclass
class Losses:
    """Sums that a step adds up beside the logits."""

    index: list[Tensor] = field(default_factory=list)  # divergence of each indexer
    recall: list[Tensor] = field(default_factory=list)  # attention mass inside what each indexer selected
    load: dict[str, Tensor] = field(default_factory=dict)  # tokens sent to each expert, by router


@dataclass(frozen=True)
class Rows:
    """B rows of S tokens, flat, and what all layers need to know of them."""

    ids: Tensor  # [N]
    length: int  # S
    positions: Tensor  # [N]
    plain: Turn
    yarn: Turn

    @property
    def count(self) -> int:
        """Rows, B."""
        return len(self.ids) // self.length


# Pieces worth a compiler's time, by what they save; the others are cheap as they are.
COMPILED = ("enter", "leave", "heads", "experts", "project_out", "window", "entries_attention", "merge", "compress",
            "index_inputs", "index_scores", "token_losses")  # fmt: skip
_PIECES: tuple[Callable[..., Any], ...] = (
    enter, leave, reduce, heads, window, compress, index_inputs, index_scores, entries_attention, index_loss, merge,
    project_out, scores_of_experts, expert_weights, experts, token_losses,
)  # fmt: skip


def _again(work: Callable[..., Any], *given: Tensor) -> Any:
    """The result of `work`, which will be computed again for the gradient instead of being kept."""
    return checkpoint(work, *given, use_reentrant=False, preserve_rng_state=False)


class Network:
    """The functions above wired as the configuration says, over one flat table of parameters."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        dtype: torch.dtype = torch.bfloat16,
        rounding: bool = True,
        compiled: Collection[str] = (),
    ) -> None:
        self.config, self.params = config, params
        self.style = Style(dtype, rounding, config.rms_norm_eps)
        self.selected = config.index_topk
        self.run = {piece.__name__: piece for piece in _PIECES}
        for name in compiled:
            self.compile(name)
        c, s = config, config.rope_scaling
        yarn = (s.factor, s.original_max_position_embeddings, s.beta_fast, s.beta_slow)
        plain = frequencies(c.qk_rope_head_dim, c.rope_theta)
        device = params["embed.weight"].device
        self.steps = plain.to(device), frequencies(c.qk_rope_head_dim, c.compress_rope_theta, *yarn).to(device)

    def compile(self, name: str) -> None:
        """Run a piece through the compiler, once for every shape it meets."""
        torch._dynamo.config.cache_size_limit = 64  # beyond the limit it would silently go on uncompiled
        self.run[name] = torch.compile(self.run[name], dynamic=False)

    def rows(self, ids: Tensor) -> Rows:
        """ids [B, S] -> the rows of a step."""
        count, length = ids.shape
        positions = torch.arange(length, device=ids.device)
        turns = (positions[:, None].float() * steps for steps in self.steps)
        plain, yarn = (Turn(angle.cos().repeat(count, 1), angle.sin().repeat(count, 1)) for angle in turns)
        return Rows(ids.flatten(), length, positions.repeat(count), plain, yarn)

    def streams(self, rows: Rows, losses: Losses, sparse: bool) -> Tensor:
        """[N, M, d] behind the last layer. `sparse`: attend only to what the indexers select."""
        embedded = F.embedding(rows.ids, self.params["embed.weight"]).to(self.style.dtype)
        streams = embedded[:, None].repeat(1, self.config.hc_mult, 1)
        for layer, ratio in enumerate(self.config.layer_ratios):
            streams = self.block(streams, rows, f"layers.{layer}.", ratio, losses, sparse)
        return streams

    def losses(self, streams: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [N] of the main head."""
        p = self.params
        x = self.run["reduce"](streams, p["hc_head_fn"], p["hc_head_base"], p["hc_head_scale"], p["norm.weight"],
                               self.config.hc_eps, self.style)  # fmt: skip
        return self.run["token_losses"](x, p["head.weight"], targets)  # type: ignore[no-any-return]

    def draft_streams(self, streams: Tensor, next_rows: Rows, losses: Losses) -> Tensor:
        """The draft block: streams of the main model and the tokens that follow -> its own streams."""
        p, style = self.params, self.style
        embedded = F.embedding(next_rows.ids, p["embed.weight"]).to(style.dtype)
        e = linear(rms(embedded, p["mtp.0.enorm.weight"], style.eps), p["mtp.0.e_proj.weight"], style)
        normed = rms(streams, p["mtp.0.hnorm.weight"], style.eps)
        h = linear(normed.flatten(0, 1), p["mtp.0.h_proj.weight"], style).view_as(streams)
        return self.block(e[:, None] + h, next_rows, "mtp.0.", 0, losses, False)

    def draft_losses(self, streams: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy [N] of the draft."""
        p = self.params
        names = ("hc_head_fn", "hc_head_base", "hc_head_scale", "norm.weight")
        x = self.run["reduce"](streams, *(p[f"mtp.0.{name}"] for name in names), self.config.hc_eps, self.style)
        return self.run["token_losses"](x, p["head.weight"], targets)  # type: ignore[no-any-return]

    def block(self, streams: Tensor, rows: Rows, name: str, ratio: int, losses: Losses, sparse: bool) -> Tensor:
        """One layer."""
        for site, inner in (("attn", self.attention), ("ffn", self.mixture)):
            p, c = self.params, self.config
            mixer = (p[f"{name}hc_{site}_{part}"] for part in ("fn", "base", "scale"))
            x, post, comb = self.run["enter"](streams, *mixer, p[f"{name}{site}_norm.weight"], c.hc_mult,
                                              c.hc_sinkhorn_iters, c.hc_eps, self.style)  # fmt: skip
            y = inner(x, rows, f"{name}{site}.", ratio, losses, sparse)
            streams = self.run["leave"](streams, y, post, comb)
        return streams

    def attention(self, x: Tensor, rows: Rows, name: str, ratio: int, losses: Losses, sparse: bool) -> Tensor:
        """x: [N, d], normalised; returns [N, d]."""
        p, c, turn = self.params, self.config, rows.yarn if ratio else rows.plain
        names = ("wq_a.weight", "q_norm.weight", "wq_b.weight", "wkv.weight", "kv_norm.weight")
        latent, q, kv = self.run["heads"](x, *(p[name + n] for n in names), turn, c.num_attention_heads, self.style)
        parts = self.run["window"](q, kv, p[name + "attn_sink"], rows.positions, c.sliding_window)
        if ratio:
            entries = round_kv(self.compressed(x, rows, name + "compressor."), 2 * turn.cos.shape[-1], self.style)
            index = self.indexed(x, latent, rows, name + "indexer.") if ratio == OVERLAPPED else None
            more = self.far(q, entries, parts[0], index, rows, ratio, losses, sparse)
        else:
            more = (parts[0], torch.zeros_like(parts[1]), torch.zeros_like(parts[2]))
        out = self.run["merge"](parts, *more)
        return self.run["project_out"](out, p[name + "wo_a.weight"], p[name + "wo_b.weight"], turn, c.o_groups,
                                       self.style)  # type: ignore[no-any-return]  # fmt: skip

    def compressed(self, x: Tensor, rows: Rows, name: str) -> Tensor:
        """Entries of all rows, [N / m, D]."""
        weights = (self.params[name + n] for n in ("wkv.weight", "wgate.weight", "ape", "norm.weight"))
        return self.run["compress"](x, *weights, rows.positions, rows.yarn, self.style)  # type: ignore[no-any-return]

    def indexed(self, x: Tensor, latent: Tensor, rows: Rows, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """What the indexer scores with. It learns from its own loss alone."""
        p, x, latent = self.params, x.detach(), latent.detach()
        keys = self.compressed(x, rows, name + "compressor.")
        return self.run["index_inputs"](x, latent, p[name + "wq_b.weight"], p[name + "weights_proj.weight"], keys,
                                        rows.yarn, self.config.index_head_dim, self.style)  # type: ignore[no-any-return]  # fmt: skip

    def far(
        self,
        q: Tensor,
        entries: Tensor,
        peak: Tensor,
        index: tuple[Tensor, Tensor, Tensor] | None,
        rows: Rows,
        ratio: int,
        losses: Losses,
        sparse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention to the compressed entries, in chunks of queries where all scores would not fit."""
        b, s, heads_ = rows.count, rows.length, q.shape[1]
        entries = entries.view(b, s // ratio, -1)
        q, peak = q.view(b, s, heads_, -1), peak.view(b, s, heads_)
        index_heads = 0 if index is None else index[0].shape[1]
        fits = CHUNK_SCORES // (b * (s // ratio) * (heads_ + index_heads))
        step = s if fits >= s else max(fits // 128, 1) * 128
        results = []
        for start in range(0, s, step):
            cut = slice(start, min(start + step, s))
            visible = (torch.arange(cut.start, cut.stop, device=q.device) + 1) // ratio
            seen = (torch.arange(s // ratio, device=q.device) < visible[:, None]).expand(b, -1, -1)
            chunk = [q[:, cut], entries, seen, peak[:, cut]]
            if index is not None:
                iq, iw = (t.view(b, s, *t.shape[1:])[:, cut] for t in index[:2])
                chunk += [iq, iw, index[2].view(b, s // ratio, -1)]
            inner = self.dense_chunk if index is None else self.sparse_chunk if sparse else self.warm_chunk
            results.append(inner(*chunk) if step == s else _again(inner, *chunk))
        if index is not None:
            losses.index.append(sum(r[3] for r in results) / len(rows.ids))
            losses.recall.append(sum(r[4] for r in results) / len(rows.ids))
        join = (torch.cat([r[n] for r in results], 1).flatten(0, 1) for n in range(3))
        return tuple(join)  # type: ignore[return-value]

    def dense_chunk(self, q: Tensor, entries: Tensor, seen: Tensor, peak: Tensor) -> tuple[Tensor, ...]:
        """Every visible entry."""
        return self.run["entries_attention"](q.contiguous(), entries, seen, peak)[:3]  # type: ignore[no-any-return]

    def warm_chunk(
        self, q: Tensor, entries: Tensor, seen: Tensor, peak: Tensor, iq: Tensor, iw: Tensor, keys: Tensor
    ) -> tuple[Tensor, ...]:
        """Every visible entry, while the indexer learns to find where the attention goes."""
        *out, share = self.run["entries_attention"](q.contiguous(), entries, seen, peak)
        scores = self.run["index_scores"](iq.contiguous(), iw, keys)
        return (*out, *self.run["index_loss"](scores, share, seen, self.choose(scores, seen)))

    def sparse_chunk(
        self, q: Tensor, entries: Tensor, seen: Tensor, peak: Tensor, iq: Tensor, iw: Tensor, keys: Tensor
    ) -> tuple[Tensor, ...]:
        """Only what the indexer selects; it goes on learning inside its selection."""
        scores = self.run["index_scores"](iq.contiguous(), iw, keys)
        chosen = self.choose(scores, seen)
        *out, share = self.run["entries_attention"](q.contiguous(), entries, chosen, peak)
        return (*out, *self.run["index_loss"](scores, share, chosen, chosen))

    def choose(self, scores: Tensor, seen: Tensor) -> Tensor:
        """The best `selected` visible entries of each token, as a mask."""
        if scores.shape[-1] <= self.selected:
            return seen
        masked = scores.detach().masked_fill(~seen, -1e30)
        least = masked.topk(self.selected, -1).values[..., -1:]
        return seen & (masked >= least)

    def mixture(self, x: Tensor, rows: Rows, name: str, ratio: int, losses: Losses, sparse: bool) -> Tensor:
        """x: [N, d], normalised; returns [N, d]."""
        p, c = self.params, self.config
        scores = self.run["scores_of_experts"](x, p[name + "gate.weight"])
        table, bias = p.get(name + "gate.tid2eid"), p.get(name + "gate.bias")
        chosen = None if table is None else table[rows.ids]
        weights = self.run["expert_weights"](scores, bias, chosen, c.num_experts_per_tok, c.routed_scaling_factor)
        if bias is not None:
            losses.load[name] = (weights.detach() > 0).sum(0)
        routed = (p[f"{name}experts.{w}"] for w in ("w1", "w3", "w2"))
        shared = tuple(p[f"{name}shared_experts.{w}.weight"] for w in ("w1", "w3", "w2"))
        return self.run["experts"](x, weights, *routed, shared, c.swiglu_limit, self.style)  # type: ignore[no-any-return]

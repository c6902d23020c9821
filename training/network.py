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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv4.config import ModelConfig
from dsv4.ops.quantize import _hadamard_matrix
from dsv4.ops.rope import frequencies
from training.rounding import straight
from training.sinkhorn import sinkhorn

Params = Mapping[str, Tensor]
OVERLAPPED = 4
CHUNK_SCORES = 1 << 29  # attention scores held at once


class Turn(NamedTuple):
    """Cosines and sines of the N positions, [N, R / 2] each."""

    cos: Tensor
    sin: Tensor


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


# ---------------------------------------------------------------- pieces, each compiled by itself


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with weight."""
    wide = x.float()
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))).type(x.dtype)


def rotate(x: Tensor, turn: Turn, inverse: bool = False) -> Tensor:
    """RoPE on the last R of [N, D] or [N, H, D], neighbouring pairs."""
    dims = 2 * turn.cos.shape[-1]
    shape = (len(x),) + (1,) * (x.dim() - 2) + (dims // 2,)
    cos, sin = turn.cos.view(shape), turn.sin.view(shape)
    sin = -sin if inverse else sin
    even, odd = x[..., -dims:].float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((x[..., :-dims], turned.type(x.dtype)), -1)


class Style(NamedTuple):
    """How a network computes: `dtype` of activations, and whether numbers are rounded as the engine will."""

    dtype: torch.dtype
    rounding: bool
    eps: float


def linear(x: Tensor, weight: Tensor, style: Style, x_rounded: bool = False) -> Tensor:
    """x [N, K] times an FP8 matrix [O, K]."""
    if style.rounding:
        x, weight = x if x_rounded else straight(x, "fp8_rows", 128), straight(weight, "fp8_tiles", 128)
    return x @ weight.to(style.dtype).t()


def enter(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm: Tensor,
    m: int,
    iterations: int,
    hc_eps: float,
    style: Style,
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, M, d] -> the sublayer's normalised input [N, d], post [N, M], comb [N, M, M]."""
    mixed = _mixed(streams, fn, base, scale, (m, m, m * m), style)
    pre, post = torch.sigmoid(mixed[:, :m]) + hc_eps, 2 * torch.sigmoid(mixed[:, m : 2 * m])
    comb = sinkhorn(mixed[:, 2 * m :].reshape(-1, m, m), iterations, hc_eps)
    return rms(_weighted(streams, pre), norm, style.eps), post, comb


def _mixed(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rows: tuple[int, ...], style: Style) -> Tensor:
    flat = streams.flatten(1)
    size = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + style.eps)
    factor = torch.cat([scale[n : n + 1].expand(count) for n, count in enumerate(rows)])
    return (flat @ fn.to(style.dtype).t()).float() * size * factor + base


def _weighted(streams: Tensor, pre: Tensor) -> Tensor:
    return sum((pre[:, n, None] * streams[:, n].float() for n in range(streams.shape[1])), 0.0).type(streams.dtype)


def leave(streams: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write y [N, d] back: new streams."""
    m = streams.shape[1]
    carried = sum(comb[:, n, :, None] * streams[:, n, None].float() for n in range(m))
    return (post[:, :, None] * y.float()[:, None] + carried).type(streams.dtype)


def reduce(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, hc_eps: float, style: Style
) -> Tensor:
    """[N, M, d] -> the vector that the head reads."""
    pre = torch.sigmoid(_mixed(streams, fn, base, scale, (streams.shape[1],), style)) + hc_eps
    return rms(_weighted(streams, pre), norm, style.eps)


def heads(
    x: Tensor,
    wq_a: Tensor,
    q_norm: Tensor,
    wq_b: Tensor,
    wkv: Tensor,
    kv_norm: Tensor,
    turn: Turn,
    count: int,
    style: Style,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, d] -> low-rank query [N, q_lora] (rounded), q [N, H, D], kv [N, D]."""
    x = straight(x, "fp8_rows", 128) if style.rounding else x
    latent = rms(linear(x, wq_a, style, True), q_norm, style.eps)
    latent = straight(latent, "fp8_rows", 128) if style.rounding else latent
    q = linear(latent, wq_b, style, True).unflatten(-1, (count, -1))
    q = q * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + style.eps).type(q.dtype)
    kv = rotate(rms(linear(x, wkv, style, True), kv_norm, style.eps), turn)
    return latent, rotate(q, turn), _round_kv(kv, 2 * turn.cos.shape[-1], style)


def _round_kv(kv: Tensor, dims: int, style: Style) -> Tensor:
    if not style.rounding:
        return kv
    return torch.cat((straight(kv[..., :-dims], "fp8_rows", 64), kv[..., -dims:]), -1)


def window(q: Tensor, kv: Tensor, sink: Tensor, positions: Tensor, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to the last `span` tokens: running maximum [N, H], mass [N, H] with the sink's, sum [N, H, D].

    The N tokens are blocks of `span`; a block looks at itself and the one before. Maxima carry no gradient: the result
    does not depend on them.
    """
    (n, h, d), blocks = q.shape, len(q) // span
    own = kv.view(blocks, span, d)
    keys = torch.cat((own.roll(1, 0), own), 1)
    scores = torch.bmm(q.view(blocks, span * h, d), keys.mT).float().view(blocks, span, h, 2 * span) * d**-0.5
    age = torch.arange(span, device=q.device)[:, None] + span - torch.arange(2 * span, device=q.device)
    seen = (age >= 0) & (age < span) & (age <= positions.view(blocks, span, 1))
    scores = scores.masked_fill(~seen[:, :, None], -1e30)
    peak = torch.maximum(scores.amax(-1), sink).detach()
    exp = torch.exp(scores - peak[..., None])
    mass = exp.sum(-1) + torch.exp(sink - peak)
    total = torch.bmm(exp.type(q.dtype).view(blocks, span * h, 2 * span), keys)
    return peak.view(n, h), mass.view(n, h), total.view(n, h, d)


def compress(
    x: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor, norm: Tensor, positions: Tensor, turn: Turn, style: Style
) -> Tensor:
    """Pool blocks of m tokens: x [N, d] -> entries [N / m, D], normalised and rotated to their first position."""
    m = ape.shape[0]
    values, scores = ((x @ w.to(style.dtype).t()).float().unflatten(0, (-1, m)) for w in (wkv, wgate))
    scores = scores + ape
    first = positions.view(-1, m)[:, 0]
    if m == OVERLAPPED:
        values, scores = _overlapped(values), _overlapped(scores)
        begins = (first == 0)[:, None, None] & (torch.arange(2 * m, device=x.device) < m)[:, None]
        scores = scores.masked_fill(begins, -1e30)
    entries = (torch.softmax(scores, 1) * values).sum(1).type(style.dtype)
    return rotate(rms(entries, norm, style.eps), Turn(turn.cos[::m], turn.sin[::m]))


def _overlapped(terms: Tensor) -> Tensor:
    """[blocks, m, 2 D] -> [blocks, 2 m, D]: half A of the block before, half B of the own."""
    before, own = terms.chunk(2, -1)
    return torch.cat((before.roll(1, 0), own), 1)


def index_inputs(
    x: Tensor, latent: Tensor, wq_b: Tensor, weights_proj: Tensor, keys: Tensor, turn: Turn, dim: int, style: Style
) -> tuple[Tensor, Tensor, Tensor]:
    """Index queries [N, H, D], the weight of each head [N, H], and keys [n, D], spread and rounded."""
    q = rotate(linear(latent, wq_b, style, True).unflatten(-1, (-1, dim)), turn)
    weights = (x @ weights_proj.to(style.dtype).t()) * (dim * weights_proj.shape[0]) ** -0.5
    if not style.rounding:
        return q, weights, keys
    spread = _hadamard_matrix(dim, x.device).to(style.dtype)
    return straight(q @ spread, "fp4_rows", 32), weights, straight(keys @ spread, "fp4_rows", 32)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """[B, T, H, D], [B, T, H], [B, n, D] -> [B, T, n] FP32."""
    b, t, h, d = q.shape
    dots = torch.bmm(q.view(b, t * h, d), keys.mT).view(b, t, h, -1)
    return (dots.relu() * weights[..., None]).float().sum(2)


def entries_attention(q: Tensor, entries: Tensor, seen: Tensor, peak: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of [B, T, H, D] to entries [B, n, D] where `seen` [B, T, n]; `peak` [B, T, H] of the window.

    Returns the new peak, mass [B, T, H], sum [B, T, H, D], and where the mass went, [B, T, n], all heads together.
    """
    b, t, h, d = q.shape
    scores = torch.bmm(q.view(b, t * h, d), entries.mT).float().view(b, t, h, -1) * d**-0.5
    scores = scores.masked_fill(~seen[:, :, None], -1e30)
    peak = torch.maximum(scores.amax(-1), peak).detach()
    exp = torch.exp(scores - peak[..., None])
    mass = exp.sum(-1)
    total = torch.bmm(exp.type(q.dtype).view(b, t * h, -1), entries).view(b, t, h, d)
    share = (exp.detach() / mass.detach().clamp(min=1e-20)[..., None]).mean(2)
    return peak, mass, total, share


def index_loss(scores: Tensor, share: Tensor, seen: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of the indexer's softmax from the attention's, over what was `seen`, and recall of `chosen`: sums."""
    target = share.masked_fill(~seen, 0)
    some = seen.any(-1)
    log = F.log_softmax(scores.masked_fill(~seen, -1e30), -1)
    divergence = (target * (torch.log(target.clamp(min=1e-9)) - log)).masked_fill(~seen, 0).sum(-1)
    recall = (target * chosen).sum(-1)
    return (divergence * some).sum(), (recall * some).sum()


def merge(parts: tuple[Tensor, Tensor, Tensor], peak: Tensor, mass: Tensor, total: Tensor) -> Tensor:
    """The window's part and the entries', relative to their common peak: [N, H, D]."""
    old, window_mass, window_total = parts
    keep = torch.exp(old - peak)
    return ((window_total.float() * keep[..., None] + total.float()) / (window_mass * keep + mass)[..., None]).type(
        total.dtype
    )


def project_out(out: Tensor, wo_a: Tensor, wo_b: Tensor, turn: Turn, groups: int, style: Style) -> Tensor:
    """[N, H, D] -> [N, d]: turned back, grouped low-rank projection."""
    grouped = rotate(out, turn, inverse=True).reshape(len(out), groups, -1)
    weight = straight(wo_a, "fp8_tiles", 128) if style.rounding else wo_a
    blocks = weight.to(style.dtype).view(groups, -1, weight.shape[1])
    return linear(torch.einsum("ngk,grk->ngr", grouped, blocks).flatten(1), wo_b, style)


def scores_of_experts(x: Tensor, gate: Tensor) -> Tensor:
    """sqrt(softplus(gate x)), FP32: [N, E]."""
    return F.softplus(x.float() @ gate.t()).sqrt()


def expert_weights(scores: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, scale: float) -> Tensor:
    """[N, E]: the routing weight of every expert, zero where it was not chosen."""
    if chosen is None:
        assert bias is not None
        chosen = (scores + bias).topk(k, -1).indices
    picked = scores.gather(1, chosen)
    weights = picked / picked.sum(-1, keepdim=True) * scale
    return torch.zeros_like(scores).scatter(1, chosen, weights)


def experts(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    shared: tuple[Tensor, Tensor, Tensor],
    limit: float,
    style: Style,
) -> Tensor:
    """All experts on all tokens, weighed: for a dozen small experts that is faster than sorting tokens by expert."""
    s1, s3, s2 = shared
    if style.rounding:
        x = straight(x, "fp8_rows", 128)
        w1, w3, w2 = (straight(w, "fp4_rows", 32) for w in (w1, w3, w2))
        s1, s3, s2 = (straight(w, "fp8_tiles", 128) for w in (s1, s3, s2))
    gate, up = (x @ torch.cat((w.flatten(0, 1), s)).to(style.dtype).t() for w, s in ((w1, s1), (w3, s3)))
    gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    each = F.pad(weights, (0, 1), value=1.0)
    hidden = ((F.silu(gate) * up).unflatten(1, (len(w1) + 1, -1)) * each[..., None]).type(style.dtype)
    hidden = straight(hidden, "fp8_rows", 128) if style.rounding else hidden
    return hidden.flatten(1) @ torch.cat((w2.transpose(1, 2).flatten(0, 1), s2.t())).to(style.dtype)


def token_losses(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each token in nats, FP32 inside: x [N, d], head [V, d] -> [N]."""
    return F.cross_entropy((x @ head.to(x.dtype).t()).float(), targets, reduction="none")


# ---------------------------------------------------------------- the network

# Pieces worth a compiler's time, by what they save; the others are cheap as they are.
COMPILED = ("enter", "leave", "heads", "experts", "project_out", "window", "entries_attention", "merge", "compress",
            "index_inputs", "index_scores", "token_losses")  # fmt: skip
_PIECES: tuple[Callable[..., Any], ...] = (
    enter, leave, reduce, heads, window, compress, index_inputs, index_scores, entries_attention, index_loss, merge,
    project_out, scores_of_experts, expert_weights, experts, token_losses,
)  # fmt: skip


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
        self.steps = (
            frequencies(c.qk_rope_head_dim, c.rope_theta),
            frequencies(c.qk_rope_head_dim, c.compress_rope_theta, *yarn),
        )

    def compile(self, name: str) -> None:
        """Run a piece through the compiler, once for every shape it meets."""
        torch._dynamo.config.cache_size_limit = 64  # beyond the limit it would silently go on uncompiled
        self.run[name] = torch.compile(self.run[name], dynamic=False)

    def rows(self, ids: Tensor) -> Rows:
        """ids [B, S] -> the rows of a step."""
        count, length = ids.shape
        positions = torch.arange(length, device=ids.device)
        turns = (positions[:, None].float() * steps.to(ids.device) for steps in self.steps)
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
            entries = _round_kv(self.compressed(x, rows, name + "compressor."), 2 * turn.cos.shape[-1], self.style)
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
            results.append(inner(*chunk) if step == s else checkpoint(inner, *chunk, use_reentrant=False))
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

"""The mathematics of a layer over N tokens, as pieces that compile; `network.py` puts them together.

Each says the same as an op of `dsv4/ops`, arranged for a GPU that trains.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.ops.quantize import _hadamard_matrix
from training.rounding import straight
from training.sinkhorn import sinkhorn

OVERLAPPED = 4


class Turn(NamedTuple):
    """Cosines and sines of the N positions, [N, R / 2] each."""

    cos: Tensor
    sin: Tensor


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
    return latent, rotate(q, turn), round_kv(kv, 2 * turn.cos.shape[-1], style)


def round_kv(kv: Tensor, dims: int, style: Style) -> Tensor:
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
    """sqrt(softplus(gate x)), FP32: [N, E]. The root's slope is infinite at 0, which a score may underflow to."""
    return F.softplus(x.float() @ gate.t()).clamp(min=1e-20).sqrt()


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

"""mHC on a GPU: the mix, its two ends, and the whole step between two sublayers.

A mix is two kernels: mhc_mix.cu sums fn @ streams over ranges of columns on many multiprocessors, mhc_finish.cu makes
gates, comb and the next input of it. Which form of the first one runs follows from shapes alone, and changes no bit.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels import mhc_accepts as accepts
from dsv4.kernels import rows
from dsv4.kernels.launch import Kernel, need
from dsv4.kernels.mhc_accepts import FAST_STREAMS
from dsv4.kernels.rows import NAMES, STORED, Places, need_vector, stored_rows
from dsv4.ops.mhc import Mixed, Mixer, mhc_head, mhc_post, mhc_post_pre_norm_quant, mhc_pre, mhc_pre_norm_quant
from dsv4.quant.formats import Format
from dsv4.quant.rows import GlobalScale
from dsv4.quant.tensor import QTensor

RANGE: Final = 256  # columns of a partial sum
MANY_FROM: Final = 12  # tokens from which the mix `many` is the faster one on an H100
_MANY_TOKENS: Final = {torch.bfloat16: 6, torch.float32: 3}  # of a tile
_MANY_THREADS: Final = 192
_FEW_ROWS: Final = 4  # rows of fn of a block of `few` and `any`, a warp each
_FEW_BLOCKS: Final = 6  # of `few` on one multiprocessor
_POST_THREADS: Final = 256
_STEP_THREADS: Final = 384


def _kernels(file: str, signature: str, *names: str) -> dict[str, Kernel]:
    """By name, each for both dtypes."""
    return {f"{name}_{t}": Kernel(file, f"{name}_{t}", signature) for name in names for t in NAMES.values()}


_FINISH: Final = "p p p i f p p i i f"  # streams, partial, x, d, norm_eps, base, scale, m, iterations, eps
_NEXT: Final = "p p p p p p p p"  # post, comb, weight, y, data, scale, given global scale, the rows' own
_RUN: Final = {
    **_kernels("mhc_mix.cu", "p p p i i i i i", "mhc_mix_few", "mhc_mix_many", "mhc_mix_any"),
    **_kernels("mhc_mix.cu", "p p p p p p p i i i i i", "mhc_post_mix_few", "mhc_post_mix_many"),
    **_kernels("mhc_post.cu", "p p p p p i i i", "mhc_post", "mhc_post_any"),
    **_kernels("mhc_finish.cu", _FINISH + "p p", "mhc_pre", "mhc_pre_any"),
    **_kernels("mhc_finish.cu", _FINISH, "mhc_head", "mhc_head_any"),
    **_kernels("mhc_finish.cu", _FINISH + _NEXT, *(f"mhc_pre_{fmt.name}" for fmt in STORED)),
}

_CLUSTER: Final = {
    fmt: Kernel("mhc_step.cu", f"mhc_step_{fmt.name}_bf16", "p p p p p p p i f p p i f" + _NEXT) for fmt in STORED
}


class MixPlan(NamedTuple):
    """How a mix runs: the kernel's form, blocks, threads of a block, and groups of blocks that share out the tokens."""

    form: str
    grid: int
    block: int
    groups: int


def mix_form(tokens: int, m: int, n: int) -> str:
    """`any` for other numbers of streams than four; `many` from so many tokens on, but not for the head; else `few`."""
    if m != FAST_STREAMS:
        return "any"
    return "many" if tokens >= MANY_FROM and n == m * (m + 2) else "few"


def mix_plan(form: str, tokens: int, n: int, d: int, dtype: torch.dtype, processors: int) -> MixPlan:
    """The launch of a mix of n rows of fn: one wave of blocks on so many multiprocessors, fewer for few tokens."""
    ranges = -(-d // RANGE)
    if form == "many":
        tiles = -(-tokens // _MANY_TOKENS[dtype])
        groups = min(tiles, max(1, 2 * processors // ranges))
        return MixPlan(form, ranges * groups, _MANY_THREADS, groups)
    blocks = ranges * -(-n // _FEW_ROWS)
    groups = min(tokens, max(1, _FEW_BLOCKS * processors // blocks))
    return MixPlan(form, blocks * groups, 32 * _FEW_ROWS, groups)


def mix(streams: Tensor, mixer: Mixer, n: int, form: str | None = None) -> Tensor:
    """Partial sums [T, ranges, n + 1] of streams [T, M, d]. n: rows of fn. form: to have that one, as for timing."""
    return _mix("mix", (), streams, mixer, n, form)


def post_mix(y: Tensor, mixed: Mixed, mixer: Mixer, form: str | None = None) -> tuple[Tensor, Tensor]:
    """The streams behind a sublayer that gave y, and their partial sums. Four streams alone."""
    _need_mixed(y, mixed)
    streams = _like(mixed.streams)
    given = (y, mixed.streams, mixed.post, mixed.comb)
    return streams, _mix("post_mix", given, streams, mixer, _rows(streams), form)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rows(streams: Tensor) -> int:
    """Of fn around a sublayer."""
    m = streams.shape[1]
    return m * (m + 2)


def _mix(family: str, given: tuple[Tensor, ...], streams: Tensor, mixer: Mixer, n: int, form: str | None) -> Tensor:
    tokens, m, d = streams.shape
    _need_mixer(streams, mixer, n)
    plan = mix_plan(form or mix_form(tokens, m, n), tokens, n, d, streams.dtype, rows.multiprocessors(streams.device))
    partial = torch.empty(tokens, -(-d // RANGE), n + 1, device=streams.device)
    run = _RUN[f"mhc_{family}_{plan.form}_{NAMES[streams.dtype]}"]
    run(plan.grid, plan.block, *given, streams, mixer.fn, partial, tokens, d, n, m, plan.groups, pdl=True)
    return partial


def _need_mixer(streams: Tensor, mixer: Mixer, n: int) -> None:
    (_, m, d), device = streams.shape, streams.device
    need(streams, "streams", align=16)
    need(mixer.fn, "fn", shape=(n, m * d), dtype=torch.float32, device=device, align=16)
    need_vector(mixer.base, "base", n, device)
    need_vector(mixer.scale, "scale", n, device)


def _need_mixed(y: Tensor, mixed: Mixed) -> None:
    (tokens, m, d), device = mixed.streams.shape, mixed.streams.device
    need(mixed.streams, "streams", align=16)
    need(y, "y", shape=(tokens, d), device=device, align=16)
    need(mixed.post, "post", shape=(tokens, m), dtype=torch.float32, device=device, align=16)
    need(mixed.comb, "comb", shape=(tokens, m, m), dtype=torch.float32, device=device, align=16)


def _name(family: str, streams: Tensor) -> str:
    """Of the kernel for these streams."""
    fast = streams.shape[1] == FAST_STREAMS
    return f"mhc_{family}{'' if fast else '_any'}_{NAMES[streams.dtype]}"


def _finish(
    family: str, streams: Tensor, partial: Tensor, mixer: Mixer, constants: tuple[float, int, float], more: Places
) -> Tensor:
    """x [T, d]. constants: norm_eps, iterations, eps. more: the family's further arguments, post and comb first."""
    tokens, m, d = streams.shape
    norm_eps, iterations, eps = constants
    x = torch.empty(tokens, d, dtype=streams.dtype, device=streams.device)
    block = 32 * (-(-d // RANGE) + bool(more))  # one warp more for the way back
    site = (norm_eps, mixer.base, mixer.scale, m, iterations, eps)
    _RUN[_name(family, streams)](tokens, block, streams, partial, x, d, *site, *more, pdl=True)
    return x


def _way_back(streams: Tensor) -> tuple[Tensor, Tensor]:
    """Room for post and comb."""
    (tokens, m, _), device = streams.shape, streams.device
    return torch.empty(tokens, m, device=device), torch.empty(tokens, m, m, device=device)


@mhc_pre.impl("fused", accepts=accepts.pre)
def _pre(streams: Tensor, mixer: Mixer, iterations: int, eps: float, norm_eps: float) -> Mixed:
    way_back = _way_back(streams)
    x = _finish("pre", streams, mix(streams, mixer, _rows(streams)), mixer, (norm_eps, iterations, eps), way_back)
    return Mixed(x, *way_back, streams)


@mhc_head.impl("fused", accepts=accepts.head)
def _head(streams: Tensor, mixer: Mixer, eps: float, norm_eps: float) -> Tensor:
    return _finish("head", streams, mix(streams, mixer, streams.shape[1]), mixer, (norm_eps, 0, eps), ())


@mhc_post.impl("fused", accepts=accepts.post)
def _post(y: Tensor, mixed: Mixed) -> Tensor:
    _need_mixed(y, mixed)
    tokens, m, d = mixed.streams.shape
    streams = _like(mixed.streams)
    grid = -(-tokens * d // (8 * _POST_THREADS))
    given = (y, mixed.streams, mixed.post, mixed.comb, streams)
    _RUN[_name("post", streams)](grid, _POST_THREADS, *given, tokens, d, m, pdl=True)
    return streams


class _Next(NamedTuple):
    """What the next sublayer reads, and the arguments by which a kernel writes it: post and comb, then `_NEXT`."""

    post: Tensor
    comb: Tensor
    y: Tensor
    stored: QTensor
    arguments: Places

    @classmethod
    def of(cls, streams: Tensor, weight: Tensor, fmt: Format, scale: GlobalScale) -> _Next:
        (tokens, _, d), device = streams.shape, streams.device
        need(weight, "weight", shape=(d,), dtype=torch.float32, device=device, align=16)
        post, comb = _way_back(streams)
        y = torch.empty(tokens, d, dtype=streams.dtype, device=device)
        stored, places = stored_rows(tokens, d, fmt, scale, device)
        return cls(post, comb, y, stored, (post, comb, weight, y, *places))


@mhc_pre_norm_quant.impl("fused", accepts=accepts.pre_norm_quant)
def _pre_norm_quant(
    streams: Tensor,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> tuple[Mixed, Tensor, QTensor]:
    to = _Next.of(streams, weight, fmt, scale)
    constants = (norm_eps, iterations, eps)
    x = _finish(f"pre_{fmt.name}", streams, mix(streams, mixer, _rows(streams)), mixer, constants, to.arguments)
    return Mixed(x, to.post, to.comb, streams), to.y, to.stored


@mhc_post_pre_norm_quant.impl("fused", accepts=accepts.step)
def _step(
    y: Tensor,
    mixed: Mixed,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> tuple[Tensor, Mixed, Tensor, QTensor]:
    to = _Next.of(mixed.streams, weight, fmt, scale)
    streams, partial = post_mix(y, mixed, mixer)
    x = _finish(f"pre_{fmt.name}", streams, partial, mixer, (norm_eps, iterations, eps), to.arguments)
    return streams, Mixed(x, to.post, to.comb, streams), to.y, to.stored


@mhc_post_pre_norm_quant.impl("cluster", accepts=accepts.cluster_step)
def _cluster_step(
    y: Tensor,
    mixed: Mixed,
    mixer: Mixer,
    iterations: int,
    eps: float,
    norm_eps: float,
    weight: Tensor,
    fmt: Format,
    scale: GlobalScale = None,
) -> tuple[Tensor, Mixed, Tensor, QTensor]:
    _need_mixed(y, mixed)
    _need_mixer(mixed.streams, mixer, _rows(mixed.streams))
    to = _Next.of(mixed.streams, weight, fmt, scale)
    (tokens, d), size = y.shape, accepts.cluster_size(y.shape[1], y.device)
    streams, x = _like(mixed.streams), _like(y)
    given = (y, mixed.streams, mixed.post, mixed.comb, streams, mixer.fn, x, d)
    site = (norm_eps, mixer.base, mixer.scale, iterations, eps)
    _CLUSTER[fmt](tokens * size, _STEP_THREADS, *given, *site, *to.arguments, cluster=size, pdl=True)
    return streams, Mixed(x, to.post, to.comb, streams), to.y, to.stored

"""Hyper-connections: the way in with its Sinkhorn, the way back, the head, and the chain between two sublayers.

Where logits are prescribed, streams are +1 and -1 (their root mean square is exactly 1) and the weights have few bits:
every order of sums gives the same logits, and what is judged is the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, BIG, FLASH, INF, MANY, NAN, PRO, norm_weight, normal
from dsv4.check.cases.norm import DTYPES, FORMATS, size_of
from dsv4.check.contract import Arguments, Case, Property
from dsv4.check.metrics import EXACT, Bound, Bounds
from dsv4.ops.mhc import Mixed, Mixer, mhc_head, mhc_post, mhc_post_pre_norm_quant, mhc_pre, mhc_pre_norm_quant
from dsv4.ops.norm import rms_norm
from dsv4.ops.quantize import quantize

EPS = 1e-6
TIMED = ((1, FLASH, "flash"), (MANY, FLASH, "flash"), (1, PRO, "pro"), (MANY, PRO, "pro"))
SHAPES = ((1, 4, 64), (3, 4, 264), (0, 4, 128), (3, 4, FLASH), (3, 4, PRO), (3, 1, 64), (3, 16, 64))
_X = Bound("ulp", 1, floor=2.0**-20)  # streams may cancel
# Logits are exact here: what differs is the exponential and the order of sums of M numbers.
PRESCRIBED: Bounds = {"x": _X, "f32": Bound("abs", 1e-6)}
# Here they are sums of up to 28,672 products of about 0.006: FP32's unit at the sum of their magnitudes is 1e-5, and a
# gate changes by half of what its logit does.
SUMMED: Bounds = {"x": _X, "bf16": _X, "f32": Bound("abs", 8e-6), "streams": EXACT}
SUMMED_FP32: Bounds = {**SUMMED, "x": Bound("abs", 2e-5)}
BACK: Bounds = {"bf16": _X, "f32": Bound("ulp", 8, floor=2.0**-20)}


def _mixer(rows: int, columns: int, size: float = 0.01) -> Mixer:
    scale = torch.where(torch.arange(rows) % 2 == 0, 0.75, 1.25)
    return Mixer(normal("fn", rows, columns, size=size), normal("base", rows), scale)


def _signs(name: str, *shape: int) -> Tensor:
    return torch.where(normal(name, *shape) < 0, -1.0, 1.0)


def prescribed(tokens: int, m: int, d: int, size: float, dtype: torch.dtype) -> tuple[Tensor, Mixer]:
    """Streams and a mixer whose logits are about `size` large, another set for every token, exact in any order."""
    rows, chosen = m * (2 + m), torch.arange(32) * (m * d) // 32
    fn = torch.zeros(rows, m * d)
    fn[:, chosen] = (normal("few bits", rows, 32) * 12).round() / 16
    return _signs("streams", tokens, m, d).to(dtype), Mixer(fn, torch.zeros(rows), torch.full((rows,), size / 4))


def exact_sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The definition in FP64."""
    a = torch.softmax(logits.double(), -1) + eps
    a = a / (a.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        a = a / (a.sum(-1, keepdim=True) + eps)
        a = a / (a.sum(-2, keepdim=True) + eps)
    return a


def exact_logits(streams: Tensor, mixer: Mixer, norm_eps: float) -> Tensor:
    """In FP64."""
    flat = streams.double().flatten(1)
    root = (flat.square().mean(1, keepdim=True) + norm_eps).sqrt()
    return flat @ mixer.fn.double().T / root * mixer.scale.double() + mixer.base.double()


def exact_pre(given: Arguments, found: Any) -> Mixed:
    """In FP64, rounded once."""
    streams, mixer, iterations, eps, norm_eps = given
    count, m, _ = streams.shape
    pre, post, comb = exact_logits(streams, mixer, norm_eps).split((m, m, m * m), 1)
    x = ((torch.sigmoid(pre) + eps).unsqueeze(2) * streams.double()).sum(1).to(streams.dtype)
    a = exact_sinkhorn(comb.view(count, m, m), iterations, eps)
    return Mixed(x, 2 * torch.sigmoid(post).float(), a.float(), streams)


def stochastic(given: Arguments, found: Any) -> Iterator[Property]:
    """Nothing negative; columns sum to one, and rows do where the definition in FP64 has converged too."""
    mixed = found if isinstance(found, Mixed) else next(part for part in found if isinstance(part, Mixed))
    comb = mixed.comb.double()
    if not comb.numel() or not bool(comb.isfinite().all()):
        return
    streams, mixer, iterations, eps, norm_eps = given[:5]
    m = comb.shape[1]
    exact = exact_sinkhorn(exact_logits(streams, mixer, norm_eps)[:, 2 * m :].view(-1, m, m), iterations, eps)
    yield Property("least entry below 0", float((-comb).clamp(min=0).max()), 0.0)
    for name, dim in (("column sums", 1), ("row sums", 2)):
        settled = (exact.sum(dim) - 1).abs() <= 1.5e-6  # eps alone takes 1e-6 away
        off = (comb.sum(dim) - 1).abs()
        yield Property(f"{name} from 1 where settled", float(off[settled].max()) if settled.any() else 0.0, 2e-6)
        yield Property(f"{name} from 1 elsewhere", float(off[~settled].max()) if not settled.all() else 0.0, None)


def cases() -> Iterator[Case]:
    yield from _pre()
    yield from _post()
    yield from _head()
    yield from _chains()


def _pre() -> Iterator[Case]:
    case = partial(Case, op=mhc_pre, tokens=(0,), oracle=exact_pre, properties=stochastic)
    tight = partial(case, bounds=PRESCRIBED, oracle_bounds=PRESCRIBED)
    for large in (0.0, 0.5, 2.0, 8.0, 30.0, 100.0):
        for iterations in (1, 2, 20):
            make = partial(_sized, 5, 4, 64, large, iterations)
            yield tight(name=f"logits of {large:g}, {iterations} iterations", make=make)
    for m in (1, 2, 3, 5, 8, 16):
        for iterations in (2, 20):
            yield tight(name=f"{m} streams, {iterations} iterations", make=partial(_sized, 3, m, 64, 8.0, iterations))
    for name, change in UNUSUAL.items():
        yield tight(name=name, make=partial(_changed, change))
    for name, bounds in (("bf16", SUMMED), ("fp32", SUMMED_FP32)):
        for tokens, width in ((1, 64), (3, 264), (0, 128), (3, FLASH), (3, PRO)):
            make = partial(_random, tokens, 4, width, DTYPES[name])
            given, size = f"{tokens} x 4 x {width} {name}", size_of(tokens, 4 * width)
            yield case(name=given, make=make, size=size, bounds=bounds, oracle_bounds=bounds)
    loose = partial(case, bounds=SUMMED, oracle_bounds=SUMMED)
    yield loose(name="no multiple of 8", make=partial(_random, 3, 4, 77, BF16), refusable=True)
    yield loose(name="NaN and inf stay with their token", make=_broken, oracle=None)
    for tokens, width, bench in TIMED:
        make, size = partial(_random, tokens, 4, width, BF16), size_of(tokens, 4 * width, bench)
        oracle = exact_pre if tokens == 1 else None
        yield loose(name=f"{bench} {tokens}", make=make, size=size, bench=bench, oracle=oracle)


def _sized(tokens: int, m: int, d: int, size: float, iterations: int) -> Arguments:
    return *prescribed(tokens, m, d, size, BF16), iterations, EPS, 0.0


def _random(tokens: int, m: int, d: int, dtype: torch.dtype) -> Arguments:
    return normal("streams", tokens, m, d, dtype=dtype, size=2), _mixer(m * (2 + m), m * d), 20, EPS, EPS


def _entry(value: float, *where: int) -> Callable[[Tensor], None]:
    def change(base: Tensor) -> None:
        base[[8 + n for n in where]] = value

    return change


# Added to the logits of four streams, whose mixing matrix is rows of four from number 8 on.
UNUSUAL: dict[str, Callable[[Tensor], None]] = {
    "one -inf": _entry(-INF, 5),
    "a column of -inf": _entry(-INF, 1, 5, 9, 13),
    "a row of -inf": _entry(-INF, 4, 5, 6, 7),
    "all -inf": _entry(-INF, *range(16)),
    "one inf": _entry(INF, 5),
    "one huge": _entry(3e38, 5),
    "equal rows": lambda base: None,
}


def _changed(change: Callable[[Tensor], None]) -> Arguments:
    streams, mixer = prescribed(3, 4, 64, 0.0, BF16)
    change(mixer.base)
    return streams, mixer, 20, EPS, 0.0


def _broken() -> Arguments:
    streams, *rest = _random(5, 4, 264, BF16)
    streams[1, 2, 100], streams[3, 0, 7] = NAN, INF
    return streams, *rest


def _post() -> Iterator[Case]:
    case = partial(Case, op=mhc_post, tokens=(0, 1), bounds=BACK, oracle=_exact_post, oracle_bounds=BACK, moved=_moved)
    for name, dtype in DTYPES.items():
        for tokens, m, width in SHAPES:
            make = partial(_back, tokens, m, width, dtype)
            yield case(name=f"{tokens} x {m} x {width} {name}", make=make, size=size_of(tokens, m * width))
    yield case(name="no multiple of 8", make=partial(_back, 3, 4, 77, BF16), refusable=True)
    yield case(name="NaN stays with its token", make=_broken_back)
    for tokens, width, bench in TIMED:
        make, size = partial(_back, tokens, 4, width, BF16), size_of(tokens, 4 * width, bench)
        oracle = _exact_post if tokens == 1 else None
        yield case(name=f"{bench} {tokens}", make=make, size=size, bench=bench, oracle=oracle)
    yield case(name=f"{BIG} x 4 x 256", make=partial(_back, BIG, 4, 256, BF16), size="big", oracle=None)


def _mixed(tokens: int, m: int, d: int, dtype: torch.dtype) -> Mixed:
    comb = torch.softmax(normal("comb", tokens, m, m, size=2), 2)
    post = 2 * torch.sigmoid(normal("post", tokens, m))
    return Mixed(normal("x", tokens, d, dtype=dtype), post, comb, normal("streams", tokens, m, d, dtype=dtype, size=2))


def _back(tokens: int, m: int, d: int, dtype: torch.dtype) -> Arguments:
    return normal("y", tokens, d, dtype=dtype), _mixed(tokens, m, d, dtype)


def _moved(given: Arguments, found: Any) -> int:
    """The sublayer's input, which is in `mixed` too, is not read."""
    y, mixed, *_ = given
    return sum(x.nbytes for x in (y, mixed.post, mixed.comb, mixed.streams)) + found.nbytes  # type: ignore[no-any-return]


def _broken_back() -> Arguments:
    y, mixed = _back(5, 4, 264, BF16)
    y[1, 100], mixed.streams[2, 1, 7], mixed.comb[3, 0, 1] = NAN, INF, NAN
    return y, mixed


def _exact_post(given: Arguments, found: Any) -> Tensor:
    y, mixed = given
    carried = torch.einsum("tjk,tjd->tkd", mixed.comb.double(), mixed.streams.double())
    total: Tensor = mixed.post.double().unsqueeze(2) * y.double().unsqueeze(1) + carried
    return total.to(y.dtype)


def _head() -> Iterator[Case]:
    bounds = {"bf16": _X, "f32": SUMMED_FP32["x"]}  # as the sublayer's input: its gates are sums as long
    case = partial(Case, op=mhc_head, tokens=(0,), bounds=bounds, oracle=_exact_head, oracle_bounds=bounds)
    for name, dtype in DTYPES.items():
        for tokens, m, width in SHAPES:
            make = partial(_reduced, tokens, m, width, dtype)
            yield case(name=f"{tokens} x {m} x {width} {name}", make=make, size=size_of(tokens, m * width))


def _reduced(tokens: int, m: int, d: int, dtype: torch.dtype) -> Arguments:
    return normal("streams", tokens, m, d, dtype=dtype, size=2), _mixer(m, m * d), EPS, EPS


def _exact_head(given: Arguments, found: Any) -> Tensor:
    streams, mixer, eps, norm_eps = given
    pre = torch.sigmoid(exact_logits(streams, mixer, norm_eps)) + eps
    total: Tensor = (pre.unsqueeze(2) * streams.double()).sum(1)
    return total.to(streams.dtype)


def chained(given: Arguments, found: Any) -> Any:
    """Each step's reference, of what the step before it was found to make."""
    back = len(given) > 7 and isinstance(given[1], Mixed)
    y, mixed, *rest = given if back else (None, None, *given)
    streams, (mixer, iterations, eps, norm_eps, weight, fmt, *scale) = (found[0], rest) if back else (rest[0], rest[1:])
    now, normed, _ = found[-3:]
    steps = (
        mhc_pre(streams, mixer, iterations, eps, norm_eps),
        rms_norm(now.x, weight, norm_eps),
        quantize(normed, fmt, *scale),
    )
    return (mhc_post(y, mixed), *steps) if back else steps


def _chains() -> Iterator[Case]:
    bounds = {**SUMMED, "2.global": EXACT, "3.global": EXACT}
    into = partial(Case, op=mhc_pre_norm_quant, tokens=(0,), bounds=bounds, wanted=chained)
    between = partial(Case, op=mhc_post_pre_norm_quant, tokens=(0, 1), bounds=bounds, wanted=chained)
    for label, fmt, scale in FORMATS:
        if scale == "tensor":
            continue
        rest = (fmt,) if scale is None else (fmt, scale)
        for tokens, width in ((1, 256), (3, 272), (0, 128), (3, FLASH), (3, PRO)):
            size = size_of(tokens, 4 * width)
            name = f"{label} {tokens} x 4 x {width}"
            yield into(name=name, make=partial(_into, tokens, width, rest), size=size)
            yield between(name=name, make=partial(_between, tokens, width, rest), size=size)
    for label, fmt, _ in FORMATS[:1]:
        for tokens, width, bench in TIMED:
            size = size_of(tokens, 4 * width, bench)
            for build, make in ((into, _into), (between, _between)):
                given = partial(make, tokens, width, (fmt,))
                yield build(name=f"{bench} {label} {tokens}", make=given, size=size, bench=f"{bench} {label}")


def _into(tokens: int, width: int, rest: tuple[Any, ...]) -> Arguments:
    return *_random(tokens, 4, width, BF16), norm_weight(width), *rest


def _between(tokens: int, width: int, rest: tuple[Any, ...]) -> Arguments:
    _, *mixing = _into(tokens, width, rest)
    return *_back(tokens, 4, width, BF16), *mixing

"""How far one result is from another: names for its tensors, and distances with names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from dsv4.quant.e2m1 import unpack
from dsv4.quant.tensor import QTensor

Kind = Literal["bf16", "f32", "e4m3", "e2m1", "whole"]
_KINDS: Final[Mapping[torch.dtype, Kind]] = {
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float8_e4m3fn: "e4m3",
}
_SIGN: Final[Mapping[Kind, int]] = {"bf16": 1 << 15, "f32": 1 << 31, "e4m3": 1 << 7, "e2m1": 1 << 3}
_INTEGER: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Leaf(NamedTuple):
    """One tensor of a result. "whole" numbers (bytes, indices, scales) have no distance but equal or not."""

    tensor: Tensor
    kind: Kind


class Bound(NamedTuple):
    """How far a tensor may be off.

    metric: a key of METRICS, or "bits". limit: the largest distance. share: the largest part of the numbers that may
    differ at all. floor: distances up to this part of the row's largest magnitude are none, as where numbers cancel.
    """

    metric: str
    limit: float
    share: float = 1.0
    floor: float = 0.0


class Distance(NamedTuple):
    """What was measured. `why` says what is wrong where no number can."""

    metric: str
    value: float
    limit: float
    why: str = ""

    @property
    def ok(self) -> bool:
        return not self.why and self.value <= self.limit


EXACT: Final = Bound("bits", 0)
Bounds = Mapping[str, Bound]  # by the name of a leaf or by its kind


def leaves(found: Any, name: str = "") -> dict[str, Leaf]:
    """The tensors of a result by name: the fields of named tuples, places of others, parts of quantised matrices."""
    if isinstance(found, Tensor):
        return {name or "y": Leaf(found, _KINDS.get(found.dtype, "whole"))}
    if isinstance(found, QTensor):
        packed = found.format.values_per_byte == 2
        data = Leaf(unpack(found.data), "e2m1") if packed else Leaf(found.data, _KINDS[found.data.dtype])
        parts = {"data": data, "scale": Leaf(found.scale.view(torch.uint8), "whole")}
        if found.global_scale is not None:
            parts["global"] = Leaf(found.global_scale, "f32")
        return {f"{name}.{part}".strip("."): leaf for part, leaf in parts.items()}
    if found is None:
        return {}
    names = getattr(found, "_fields", None) or [str(n) for n in range(len(found))]
    pairs = found.items() if isinstance(found, Mapping) else zip(names, found, strict=True)
    return {key: leaf for part, one in pairs for key, leaf in leaves(one, f"{name}.{part}".strip(".")).items()}


def raw(x: Tensor) -> Tensor:
    """The bits of every number as an integer of its width."""
    return x.contiguous().view(_INTEGER[x.element_size()])


def differing(left: Tensor, right: Tensor) -> int:
    """How many numbers differ in any bit, all of them where dtype or shape do. One NaN is as good as another."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return max(left.numel(), right.numel(), 1)
    differs = raw(left) != raw(right := right.to(left.device))
    if left.dtype in (torch.bfloat16, torch.float32):
        differs &= ~(left.isnan() & right.isnan())
    return int(differs.sum())


def distance(found: Leaf, wanted: Leaf, bound: Bound) -> Distance:
    """How far `found` is off. NaN and infinities have to stand at the same places, with any payload of NaN."""
    a, b = found.tensor.to(wanted.tensor.device), wanted.tensor
    if a.dtype != b.dtype or a.shape != b.shape:
        said = [f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in (a, b)]
        return Distance(bound.metric, math.nan, bound.limit, f"{said[0]} where {said[1]} was wanted")
    if wanted.kind not in ("e2m1", "whole") and (why := _other_pattern(a.float(), b.float())):
        return Distance(bound.metric, math.nan, bound.limit, why)
    if wanted.kind in ("bf16", "f32"):
        finite = b.isfinite()
        a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
    differs = raw(a) != raw(b)
    if bound.metric == "bits" or wanted.kind == "whole":
        return Distance("bits", float(differs.sum()), 0.0)
    if bound.floor:
        reach = bound.floor * b.double().abs().amax(-1, keepdim=True) if b.numel() else b
        a = torch.where((a.double() - b.double()).abs() <= reach, b, a)
        differs = raw(a) != raw(b)
    value = METRICS[bound.metric](Leaf(a, wanted.kind), Leaf(b, wanted.kind)) if b.numel() else 0.0
    count = int(differs.sum())
    if count > bound.share * b.numel():
        return Distance(bound.metric, value, bound.limit, f"{count} of {b.numel()} numbers differ")
    return Distance(bound.metric, value, bound.limit)


def _other_pattern(a: Tensor, b: Tensor) -> str:
    for name, here, there in (
        ("NaN", a.isnan(), b.isnan()),
        ("inf", a == math.inf, b == math.inf),
        ("-inf", a == -math.inf, b == -math.inf),
    ):
        if not torch.equal(here, there):
            return f"{int((here != there).sum())} places where one alone is {name}"
    return ""


def ordered(leaf: Leaf) -> Tensor:
    """Numbers as integers in their order, neighbours one apart; both zeros are 0. int64."""
    sign = _SIGN[leaf.kind]
    bits = raw(leaf.tensor).long() & (2 * sign - 1)
    return torch.where(bits >= sign, sign - bits, bits)


def _ulp(a: Leaf, b: Leaf) -> float:
    return float((ordered(a) - ordered(b)).abs().max())


def _absolute(a: Leaf, b: Leaf) -> float:
    return float((a.tensor.double() - b.tensor.double()).abs().max())


def _relative(a: Leaf, b: Leaf) -> float:
    x, y = a.tensor.double(), b.tensor.double()
    return float(torch.where(x == y, 0.0, (x - y).abs() / y.abs()).max())


def _cosine(a: Leaf, b: Leaf) -> float:
    """1 - cos of the angle between the two, taken as vectors; 0 where both vanish."""
    x, y = a.tensor.double().flatten(), b.tensor.double().flatten()
    norms = float(x.norm() * y.norm())
    return 1 - float(x.dot(y)) / norms if norms > 0 else float((x - y).norm())


def _rms(a: Leaf, b: Leaf) -> float:
    """Root mean square of the difference over that of the wanted."""
    x, y = a.tensor.double(), b.tensor.double()
    off, size = float((x - y).norm()), float(y.norm())
    return off / size if size > 0 else math.inf if off else 0.0


def _allowed(a: Leaf, b: Leaf) -> float:
    """The largest distance as a part of what attention is allowed: 1e-3, or 2^-6 of the wanted if that is more."""
    x, y = a.tensor.double(), b.tensor.double()
    return float(((x - y).abs() / (y.abs() * 2.0**-6).clamp(min=1e-3)).max())


METRICS: Final[Mapping[str, Callable[[Leaf, Leaf], float]]] = {
    "ulp": _ulp,
    "abs": _absolute,
    "rel": _relative,
    "cos": _cosine,
    "rms": _rms,
    "allowed": _allowed,
}

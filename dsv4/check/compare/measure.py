"""How far two recordings are apart, result by result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.check.compare.record import Key, Part, Recording
from dsv4.check.study.watch import Sums

FLOORS: Final = 4.0  # times the noise floor, beyond which a difference is more than rounding
ALONE: Final = "not in"
LEAST: Final = 2.0**-8  # of a floor that is smaller: one unit in the last place of BF16


@dataclass(frozen=True)
class Gap:
    """One result in both ways.

    differing: elements whose bits differ, of `elements`; largest: greatest absolute difference; error: |a - b| / |a|;
    `floor`: the error that rounding alone makes here. Integers and packed bytes have no largest, error and cosine.
    `note`: why the two cannot be held against each other.
    """

    layer: int
    name: str
    elements: int = 0
    differing: int = 0
    largest: float | None = None
    error: float | None = None
    cosine: float | None = None
    floor: float | None = None
    note: str = ""

    @property
    def parted(self) -> bool:
        """Whether any bit differs, or one way alone has this."""
        return self.differing > 0 or self.note.startswith(ALONE)

    @property
    def beyond(self) -> bool:
        """Whether the difference is more than rounding makes. NaN on one side alone is."""
        if self.error is None or self.floor is None:
            return False
        return not self.error <= FLOORS * max(self.floor, LEAST)


def gaps(a: Recording, b: Recording, floor: Recording) -> list[Gap]:
    """Every result of either way, in the order of the first; those that one way alone has come last of their layer."""
    keys = sorted({**a.found, **b.found}, key=lambda key: key.layer)
    return [_gap(key, a, b, floor) for key in keys]


def _gap(key: Key, a: Recording, b: Recording, floor: Recording) -> Gap:
    missing = [name for name, side in (("a", a), ("b", b)) if key not in side.found]
    if missing:
        return Gap(*key, note=f"{ALONE} {missing[0]}")
    pair = _aligned(a.found[key], b.found[key])
    if pair is None:
        return Gap(*key, note="rows of other shapes")
    found = _between(key, *pair)
    moved = _aligned(a.found[key], floor.found.get(key, []))
    if found.error is None or moved is None:
        return found
    return Gap(**{**asdict(found), "floor": _sums(*moved)["error"]})


def _aligned(ours: Sequence[Part], theirs: Sequence[Part]) -> tuple[Tensor, Tensor] | None:
    """Rows of both sides that belong together: those of the same tokens, or else all. None where shapes differ."""
    width = max((part.tensor.shape[-1] for part in (*ours, *theirs)), default=0)
    (x, at), (y, there) = (_joined(parts, width) for parts in (ours, theirs))
    if x is not None and y is not None and at is not None and there is not None:
        x, y = x[torch.isin(at, there)], y[torch.isin(there, at)]
    if x is None or y is None or x.shape != y.shape or x.is_floating_point() != y.is_floating_point():
        return None
    return x, y


def _joined(parts: Sequence[Part], width: int) -> tuple[Tensor | None, Tensor | None]:
    """All steps' rows, and the positions of their tokens. Rows of whole numbers are filled up with -1."""
    tensors = [part.tensor for part in parts]
    if tensors and not tensors[0].is_floating_point() and tensors[0].dim() == 2:
        tensors = [pad(tensor, (0, width - tensor.shape[1]), value=-1) for tensor in tensors]
    if not tensors or len({tensor.shape[1:] for tensor in tensors}) > 1:
        return None, None
    firsts = [part.first for part in parts]
    if None in firsts:
        return torch.cat(tensors), None
    spans = zip(firsts, tensors, strict=True)
    return torch.cat(tensors), torch.cat(
        [torch.arange(first, first + len(t)) for first, t in spans if first is not None]
    )


def _between(key: Key, x: Tensor, y: Tensor) -> Gap:
    if not x.is_floating_point():
        return Gap(*key, x.numel(), int((x != y).sum()))
    x, y = x.float(), y.float()
    differing = int(((x != y) & ~(x.isnan() & y.isnan())).sum())
    sums = _sums(x, y)
    largest = float((x - y).abs().max()) if x.numel() else 0.0
    return Gap(*key, x.numel(), differing, largest, sums["error"], sums["cosine"])


def _sums(x: Tensor, y: Tensor) -> dict[str, float]:
    sums = Sums()
    if x.numel():
        sums.add(x, y)
    return sums.values() if x.numel() else {"error": 0.0, "cosine": 1.0}


def ends(a: Recording, b: Recording) -> dict[str, float]:
    """What becomes of the predictions: mean KL of b to a in nats a token, agreement of the most probable token."""
    p, q = (torch.log_softmax(side.logits.double(), -1) for side in (a, b))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    same = (a.logits.argmax(-1) == b.logits.argmax(-1)).double().mean()
    equal = float(torch.equal(a.logits, b.logits))
    return {"kl": float(kl), "same_first": float(same), "bitwise": equal}


def as_json(found: Sequence[Gap]) -> list[dict[str, Any]]:
    """Plain data, None for what is no number."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(g).items()} for g in found
    ]

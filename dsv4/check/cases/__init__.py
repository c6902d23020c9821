"""The one list of cases: it feeds the tests, `dsv4 check` and `dsv4 bench ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from dsv4.check.cases import compress, experts, head, kv, linear, matmul, mhc, norm, quantize, rope, route, swiglu
from dsv4.check.contract import Case

FAMILIES: Final[Mapping[str, Callable[[], Iterator[Case]]]] = {
    "norm": norm.cases,
    "quantize": quantize.cases,
    "swiglu": swiglu.cases,
    "rope": rope.cases,
    "kv": kv.cases,
    "compress": compress.cases,
    "mhc": mhc.cases,
    "linear": linear.cases,
    "matmul": matmul.cases,
    "head": head.cases,
    "route": route.cases,
    "experts": experts.cases,
}


def cases(family: str | None = None) -> list[Case]:
    """The cases of one family, or of all."""
    return [case for name, listed in FAMILIES.items() if family in (None, name) for case in listed()]

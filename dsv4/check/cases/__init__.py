"""The one list of cases: it feeds the tests, `dsv4 check` and `dsv4 bench ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from dsv4.check.cases import (
    attend,
    compress,
    experts,
    grouped,
    head,
    index,
    kv,
    linear,
    matmul,
    mhc,
    mixed,
    norm,
    quantize,
    queries,
    rope,
    route,
    select,
    swiglu,
)
from dsv4.check.contract import Case
from dsv4.errors import RequestError

FAMILIES: Final[Mapping[str, Callable[[], Iterator[Case]]]] = {
    "norm": norm.cases,
    "quantize": quantize.cases,
    "swiglu": swiglu.cases,
    "rope": rope.cases,
    "kv": kv.cases,
    "attend": attend.cases,
    "compress": compress.cases,
    "index": index.cases,
    "queries": queries.cases,
    "select": select.cases,
    "mhc": mhc.cases,
    "linear": linear.cases,
    "grouped": grouped.cases,
    "mixed": mixed.cases,
    "matmul": matmul.cases,
    "head": head.cases,
    "route": route.cases,
    "experts": experts.cases,
}


def cases(*families: str) -> list[Case]:
    """The cases of these families, or of all. RequestError for a name that is none."""
    for name in families:
        if name not in FAMILIES:
            raise RequestError("there is no such family of cases", got=name, wanted=" or ".join(FAMILIES))
    return [case for name in families or FAMILIES for case in FAMILIES[name]()]

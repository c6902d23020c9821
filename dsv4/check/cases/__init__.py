"""The one list of cases: it feeds the tests, `dsv4 check` and `dsv4 bench ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import ModuleType
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
    linear_heads,
    matmul,
    mhc,
    mixed,
    norm,
    prefetch,
    quantize,
    queries,
    rope,
    route,
    select,
    step,
    swiglu,
)
from dsv4.check.contract import Case
from dsv4.errors import RequestError


def _of(*files: ModuleType) -> Callable[[], Iterator[Case]]:
    return lambda: chain.from_iterable(file.cases() for file in files)


FAMILIES: Final[Mapping[str, Callable[[], Iterator[Case]]]] = {
    "norm": _of(norm),
    "quantize": _of(quantize),
    "rope": _of(rope, step),
    "kv": _of(kv),
    "mhc": _of(mhc),
    "linear": _of(linear, linear_heads, grouped, mixed, matmul, prefetch),
    "head": _of(head),
    "moe": _of(swiglu, route, experts),
    "compress": _of(compress),
    "index": _of(queries, index, select),
    "attention": _of(attend),
}


def cases(*families: str) -> list[Case]:
    """The cases of these families, or of all. RequestError for a name that is none."""
    for name in families:
        if name not in FAMILIES:
            raise RequestError("there is no such family of cases", got=name, wanted=" or ".join(FAMILIES))
    return [case for name in families or FAMILIES for case in FAMILIES[name]()]

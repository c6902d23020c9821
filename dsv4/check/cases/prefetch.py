"""What is only asked for: nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from dsv4.check.cases.inputs import normal
from dsv4.check.contract import Arguments, Case
from dsv4.ops.prefetch import prefetch


def cases() -> Iterator[Case]:
    for count in (1, 1023, 1024, 40_000):
        yield Case(op=prefetch, name=f"{count} numbers", make=partial(_given, count), tokens=())


def _given(count: int) -> Arguments:
    return (normal("x", count),)

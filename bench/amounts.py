"""How a picture says numbers of tokens."""

from __future__ import annotations


def short(n: int) -> str:
    """1K, 64K, 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)

"""Arithmetic on paper, a line a step: each line names every digit it needs, so a very small model can follow it."""

from __future__ import annotations

PLACES = ("Ones", "Tens", "Hundreds", "Thousands")


def _columns(top: str, bottom: str) -> list[tuple[str, str, str]]:
    """The name and the two digits of each column, from the right."""
    return list(zip(PLACES, reversed(top), reversed(bottom), strict=False))


def add_steps(a: int, b: int) -> list[str]:
    """Column addition of `a` and `b`, 0 to 9999; the last line ends in the sum."""
    width = max(len(str(a)), len(str(b)))
    top, bottom = str(a).zfill(width), str(b).zfill(width)
    lines = [f"{a} + {b}", f"Digits: {' '.join(top)} and {' '.join(bottom)}."]
    carry, written = 0, ""
    for place, x, y in _columns(top, bottom):
        total = int(x) + int(y) + carry
        step = f"{place}: {x} + {y} + {carry} = {total}"
        carry, written = total // 10, f"{total % 10}{written}"
        lines.append(f"{step}, write {total % 10}, carry {carry}, so {written}.")
    return [*lines, f"Carry {carry} in front: {a + b}." if carry else f"Carry 0: {a + b}."]


def subtract_steps(a: int, b: int) -> list[str]:
    """Column subtraction, 9999 >= `a` >= `b` >= 0; the last line ends in the difference."""
    top, bottom = str(a), str(b).zfill(len(str(a)))
    lines = [f"{a} - {b}", f"Digits: {' '.join(top)} and {' '.join(bottom)}."]
    borrow, written = 0, ""
    for place, x, y in _columns(top, bottom):
        short = int(x) - int(y) - borrow < 0
        upper = f"1{x}" if short else x
        digit = int(upper) - int(y) - borrow
        step = f"{place}: {x} - {y} - {borrow}, {'too small' if short else 'fine'}, {upper} - {y} - {borrow} = {digit}"
        borrow, written = int(short), f"{digit}{written}"
        lines.append(f"{step}, borrow {borrow}, so {written}.")
    return [*lines, f"Borrow 0: {a - b}."]


def multiply_steps(a: int, b: int) -> list[str]:
    """`a`, 0 to 9999, times the digit `b`; the last line ends in the product."""
    lines = [f"{a} x {b}", f"Digits: {' '.join(str(a))} and {b}."]
    carry, written = 0, ""
    for place, x, y in _columns(str(a), str(b) * len(str(a))):
        product = int(x) * int(y)
        total = product + carry
        step = f"{place}: {x} x {b} = {product}, {product} + {carry} = {total}"
        carry, written = total // 10, f"{total % 10}{written}"
        lines.append(f"{step}, write {total % 10}, carry {carry}, so {written}.")
    return [*lines, f"Carry {carry} in front: {a * b}." if carry else f"Carry 0: {a * b}."]


def _long(number: str) -> str:
    return "1 digit" if len(number) == 1 else f"{len(number)} digits"


def compare_steps(a: int, b: int) -> list[str]:
    """Which of two different numbers is larger: by their lengths, then by their digits from the left."""
    top, bottom = str(a), str(b)
    lines = [f"{a}: {_long(top)}, {b}: {_long(bottom)}."]
    for place, x, y in reversed(_columns(top, bottom) if len(top) == len(bottom) else []):
        lines.append(f"{place}: {x} and {y}, {x} {'=' if x == y else '>' if x > y else '<'} {y}.")
        if x != y:
            break
    return [*lines, f"So {max(a, b)} is larger and {min(a, b)} is smaller."]

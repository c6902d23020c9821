"""The marks of a DSML call block, and the small readers that the parser is built of. All are pure functions of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from dsv4.chat.control import DSML, END_THINK

MARK, CLOSING_MARK = f"<{DSML}", f"</{DSML}"
END_REASONING = END_THINK
# The first name is the one taught; the models are known to emit the other two.
BLOCK_NAMES = ("tool_calls", "toolcalls", "tool")
BLOCK_OPEN = tuple(f"{MARK}{name}>" for name in BLOCK_NAMES)
BLOCK_CLOSE = tuple(f"</{DSML}{name}>" for name in BLOCK_NAMES)
INVOKE_OPEN, INVOKE_CLOSE = f"{MARK}invoke", f"</{DSML}invoke>"
PARAMETER_OPEN, PARAMETER_CLOSE = f"{MARK}parameter", f"</{DSML}parameter>"
BEFORE_BLOCK = 2  # newlines that belong to the block, not to the answer before it
LONGEST_TAG = 4096  # a tag without end by then is no tag

_MARK = re.compile(f"</?{DSML}")
_TAG = re.compile(r'(?:[^">\n]|"[^"\n]*")*')
_ATTRIBUTES = re.compile(r'(?:\s+\w+="[^"]*")*\s*')
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class Broken(Exception):
    """The text is no DSML; says why."""


def partial(text: str, *marks: str) -> int:
    """Length of the longest proper prefix of one of `marks` that `text` ends with."""
    starts = (mark[:n] for mark in marks for n in range(1, len(mark)))
    return max((len(start) for start in starts if text.endswith(start)), default=0)


def find_mark(text: str) -> int:
    """Where DSML begins in an answer, opening or closing; -1 if nowhere."""
    match = _MARK.search(text)
    return match.start() if match else -1


def newlines_before(text: str, end: int) -> int:
    """Start of the newlines that stand before `text[end]` and would belong to a block there."""
    start = end
    while start > max(0, end - BEFORE_BLOCK) and text[start - 1] == "\n":
        start -= 1
    return start


def expect(text: str, options: Iterable[str]) -> str | None:
    """The option that `text` starts with; None if more text may yet complete one; else `Broken`."""
    options = tuple(options)
    for option in options:
        if text.startswith(option):
            return option
    if any(option.startswith(text) for option in options):
        return None
    length = next(n for n in range(1, len(text) + 1) if not any(option.startswith(text[:n]) for option in options))
    raise Broken(f"{text[:length]!r} where {' or '.join(options)} belongs")


def read_tag(text: str, opening: str) -> tuple[dict[str, str], int] | None:
    """Attributes of the tag that `text` starts with, and its length; None if it is not yet whole."""
    inside = text[len(opening) : len(opening) + LONGEST_TAG]
    match = _TAG.match(inside)
    end = match.end() if match else 0
    if inside[end : end + 1] == ">":
        return _attributes(inside[:end]), len(opening) + end + 1
    if "\n" in inside[end:] or len(inside) == LONGEST_TAG:
        raise Broken(f"a tag without end, {opening}{inside[: min(end, 40)]}")
    return None


def _attributes(inside: str) -> dict[str, str]:
    pairs = _ATTRIBUTE.findall(inside)
    if not _ATTRIBUTES.fullmatch(inside) or len(dict(pairs)) < len(pairs) or not dict(pairs).get("name"):
        raise Broken(f"a tag with wrong attributes, {inside[:40]!r}")
    return dict(pairs)


def is_string(attributes: Mapping[str, str]) -> bool | None:
    """What the tag says of its value; None if it says nothing."""
    said = attributes.get("string")
    if said not in (None, "true", "false"):
        raise Broken(f"a parameter with string={said!r}")
    return None if said is None else said == "true"


def escaped(text: str) -> str:
    """The inside of a JSON string; pieces escaped apart and joined equal the whole escaped."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def is_json(text: str) -> bool:
    """Whether a value can go into strict JSON as it stands (NaN and Infinity cannot)."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)

"""The only reader of the environment: one table of knobs, at most twelve."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from dsv4.errors import ConfigError


class Knob(NamedTuple):
    """One environment variable: `parse` makes the value of `Settings.<field>`, or raises ValueError."""

    variable: str
    field: str
    parse: Callable[[str], object]
    wanted: str


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


KNOBS = (Knob("DSV4_THREADS", "threads", _count, "a whole number of at least 1"),)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    threads: CPU threads for torch (DSV4_THREADS); None lets the program choose.
    """

    threads: int | None = None


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load(environ: Mapping[str, str] = os.environ, report: Callable[[str], None] = _to_stderr) -> Settings:
    """Read the knobs once; a `DSV4_*` name that is no knob goes to `report`, a bad value raises ConfigError."""
    for name in _unknown(environ):
        report(f"{name} is not a setting{_guess(name)}; it is ignored")
    return Settings(**{knob.field: _value(knob, environ) for knob in KNOBS if knob.variable in environ})  # type: ignore[arg-type]


def _value(knob: Knob, environ: Mapping[str, str]) -> object:
    text = environ[knob.variable]
    try:
        return knob.parse(text)
    except ValueError:
        do = f"unset {knob.variable} for the default"
        raise ConfigError(knob.variable, got=repr(text), wanted=knob.wanted, do=do) from None


def _unknown(environ: Mapping[str, str]) -> list[str]:
    known = {knob.variable for knob in KNOBS}
    return sorted(name for name in environ if name.startswith("DSV4_") and name not in known)


def _guess(name: str) -> str:
    near = get_close_matches(name, [knob.variable for knob in KNOBS], n=1)
    return f" (did you mean {near[0]}?)" if near else ""

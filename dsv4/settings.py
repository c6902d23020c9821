"""The only reader of the environment: one table of knobs, at most twelve."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
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


def _text(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


def _folder(text: str) -> Path:
    if not text:
        raise ValueError(text)
    return Path(text)


def _users(text: str) -> Path | None:
    """The XDG rule: what is empty or relative counts as not set."""
    path = Path(text)
    return path if path.is_absolute() else None


# The last two are other programs' variables: we read them to find the same folders as they do.
KNOBS = (
    Knob("DSV4_THREADS", "threads", _count, "a whole number of at least 1"),
    Knob("DSV4_CACHE", "cache", _folder, "a directory"),
    Knob("DSV4_API_KEY", "api_key", _text, "a text"),
    Knob("TORCH_EXTENSIONS_DIR", "torch_extensions", lambda text: Path(text) if text else None, "a directory"),
    Knob("XDG_CACHE_HOME", "user_cache", _users, "a directory"),
)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    threads: CPU threads for torch (DSV4_THREADS); None lets the program choose.
    cache: where compiled kernels are kept (DSV4_CACHE); None is dsv4 in the user's folder for caches.
    api_key: what clients of `dsv4 serve` must show (DSV4_API_KEY); None asks for nothing.
    torch_extensions: where torch builds its extensions, None for its own default.
    user_cache: the user's folder for caches, None for ~/.cache.
    """

    threads: int | None = None
    cache: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    torch_extensions: Path | None = None
    user_cache: Path | None = None


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

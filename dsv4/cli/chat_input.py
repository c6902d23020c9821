"""What a person types, or a script pipes in, as messages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

Lines = Callable[[str], str | None]
QUOTES: Final = '"""'


def read_message(line: Lines) -> str | None:
    r"""The next message; None where there are no more. `line` shows a prompt and gives a line without its end.

    A line that ends in a backslash goes on in the next; from three quotes on the message goes to the next three quotes.
    Where the input ends inside a message, that much is the message.
    """
    text = line("> ")
    if text is None:
        return None
    if text.lstrip().startswith(QUOTES):
        return _quoted(text.lstrip().removeprefix(QUOTES), line)
    while text.endswith("\\"):
        more = line("… ")
        text = text[:-1] + ("" if more is None else "\n" + more)
        if more is None:
            break
    return text


def _quoted(text: str, line: Lines) -> str:
    while QUOTES not in text:
        more = line("… ")
        if more is None:
            return text.removeprefix("\n")
        text += "\n" + more
    return text.partition(QUOTES)[0].removeprefix("\n").removesuffix("\n")


def interactive() -> bool:
    """Whether somebody types."""
    return sys.stdin.isatty()


def open_lines() -> Lines:
    """Lines of standard input: with line editing on a terminal, as they are from a pipe."""
    if not interactive():
        _reconfigure()
        return lambda prompt: _plain()
    if not sys.stdout.isatty():  # a prompt would end up in the file that the answers go to
        return _beside
    with suppress(ImportError):  # a Python without it reads lines all the same
        import readline  # noqa: F401  importing it is what gives `input` its line editing
    return _edited


def _reconfigure() -> None:
    """Bytes of a pipe that are no UTF-8 become U+FFFD: no reason to end."""
    change = getattr(sys.stdin, "reconfigure", None)
    if change is not None:
        change(encoding="utf-8", errors="replace")


def _plain() -> str | None:
    line = sys.stdin.readline()
    return line.removesuffix("\n").removesuffix("\r") if line else None


def _beside(prompt: str) -> str | None:
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return _plain()


def _edited(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None

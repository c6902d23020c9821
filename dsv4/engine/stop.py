"""When an answer is over. No torch."""

from __future__ import annotations

from collections.abc import Container


def finish_reason(token: int, eos: int, roles: Container[int], output: int, limit: int, room: int) -> str | None:
    """Why generation ends behind `token`, if it does.

    `output` counts tokens so far, this one included; `room` the positions left in the sequence's cache.
    """
    if token == eos:
        return "stop"
    if token in roles:
        return "role_token"
    if output >= limit:
        return "length"
    return "context" if room <= 0 else None


class StopText:
    """Lets text through until a stop string appears, which is cut off; holds back only what may become one."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings, self._held = strings, ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string came.

        Of several the first to be complete counts, so that it does not matter how the text was cut.
        """
        self._held += text
        hits = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        if hits:
            return self._take(min(hits)[1]), True
        return self._take(len(self._held) - self._partial()), False

    def finish(self) -> str:
        """What was held back for a stop string that never came."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(s.startswith(self._held[-n:]) for s in self._strings)), 0)

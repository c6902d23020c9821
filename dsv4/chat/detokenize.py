"""Ids to text one token at a time, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Callable


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: visible Latin-1 characters are themselves, the others follow U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(b): b for b in visible} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


ALPHABET = _byte_alphabet()


def token_bytes(token: str) -> bytes:
    """Bytes of a byte-level vocabulary entry; an entry outside the byte alphabet is taken as plain UTF-8."""
    if all(char in ALPHABET for char in token):
        return bytes(ALPHABET[char] for char in token)
    return token.encode()


class Detokenizer:
    """Feed ids, get text. A character cut by a token border waits for its remaining bytes.

    The pieces joined equal `Tokenizer.decode` of all the ids. Pushes cost the same however long the text already is.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Text that became certain with this id, often the empty string inside a multi-byte character."""
        return self._decoder.decode(self._bytes_of(id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character never got all its bytes."""
        return self._decoder.decode(b"", final=True)

"""What the model said lately, as the ids that it sampled, for the next turns of those conversations."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

ANSWERS = 512


class Said:
    """The last answers, by the prompt that they answered. Threads may share it.

    An answer is found by all tokens before it: nobody gets ids of a conversation that began otherwise.
    """

    def __init__(self, limit: int = ANSWERS) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._answers: OrderedDict[tuple[bytes, int], array[int]] = OrderedDict()
        self._count = 0

    def keep(self, prompt: Sequence[int], ids: Sequence[int]) -> None:
        """An answer to a prompt, which ends with the token that opens the answer: another may stand there next time."""
        with self._lock:
            self._count += 1
            self._answers[_name(prompt[:-1]), self._count] = array("q", ids)
            while len(self._answers) > self._limit:
                self._answers.popitem(last=False)

    def find(self, before: Sequence[int]) -> list[list[int]]:
        """Answers behind `before`, the opening token included, the latest first."""
        name = _name(before[:-1])
        with self._lock:
            found = [ids for (other, _), ids in self._answers.items() if other == name]
        return [ids.tolist() for ids in reversed(found)]


def _name(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=32).digest()

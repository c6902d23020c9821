"""The next prompt of a conversation, with the model's own answers as the ids that it sampled.

Text says too little: the tokenizer need not give back the ids that a text was sampled as. A prompt that begins with
the very ids of the turn before is what the model really said, and what a cache of prefixes recognises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from dsv4.chat.control import ASSISTANT, END_THINK, EOS, Control, Piece, as_text

if TYPE_CHECKING:
    from dsv4.chat.tokenizer import Tokenizer


def replay(pieces: Sequence[Piece], answers: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[int]:
    """Ids of a prompt from `chat.encode`. `answers[n]`: all that was sampled for assistant message n, () if unknown.

    Ids stand in for a message only if they spell exactly what the prompt shows of it: all of the answer, or what
    follows its `</think>` where old reasoning is left out. Anything else (an edited text, another model's ids) is
    encoded as text, as `Tokenizer.encode_prompt` does.
    """
    known = iter(answers)
    return replay_known(pieces, lambda _: (next(known, ()),), tokenizer)


def replay_known(
    pieces: Sequence[Piece], known: Callable[[Sequence[int]], Iterable[Sequence[int]]], tokenizer: Tokenizer
) -> list[int]:
    """The same, asking `known` for all that may have been sampled behind the ids before an answer, in order."""
    ids: list[int] = []
    start = 0
    for end, piece in enumerate(pieces):
        if piece != Control(EOS):  # each finished assistant message has one, and nothing else does
            continue
        opened = _opened(pieces, start, end)
        ids += tokenizer.encode_prompt(pieces[start:opened])
        spelt = (_spelling(pieces[opened:end], sampled, tokenizer) for sampled in known(ids))
        ids += next(filter(None, spelt), []) or tokenizer.encode_prompt(pieces[opened:end])
        ids.append(tokenizer.eos_id)
        start = end + 1
    return ids + tokenizer.encode_prompt(pieces[start:])


def _opened(pieces: Sequence[Piece], start: int, end: int) -> int:
    """Where the answer that ends at `end` begins: behind the assistant token and its sentinel; `end` without these."""
    return next((n + 2 for n in range(end - 1, start - 1, -1) if pieces[n] == Control(ASSISTANT)), end)


def _spelling(shown: Sequence[Piece], sampled: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The sampled ids that spell `shown`, [] if there are none."""
    ends = {tokenizer.eos_id, *tokenizer.role_ids}  # what may have ended the answer is no part of it
    ids = list(sampled[:-1] if sampled and sampled[-1] in ends else sampled)
    mark = tokenizer.control_id(END_THINK)
    after = ids[ids.index(mark) + 1 :] if mark in ids else []
    for candidate in (ids, after):
        # Ids of no token spell nothing, so they would slip through unseen.
        if all(map(tokenizer.token_bytes, candidate)) and tokenizer.decode(candidate) == as_text(shown):
            return candidate
    return []

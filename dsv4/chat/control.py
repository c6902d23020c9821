"""The control tokens by name, and what a prompt is made of before it is tokenised.

Ids are never written down here: the same names have other ids in other tokenizers (`</think>` is 128822 in the
official one and 4121 in the embedded model's), so they are looked up in `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"  # no angle brackets of its own: "<", DSML, "tool_calls" and ">" are separate tokens

TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}

REQUIRED = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)
# A model that is well never samples these inside its own turn. The last two are left from the previous generation.
ROLES = (BOS, USER, ASSISTANT, REMINDER, "<｜begin▁sys｜>", "<|EOT|>")


@dataclass(frozen=True)
class Control:
    """A control token in a prompt, put there by the encoder and never found in somebody's text."""

    name: str


Piece = Control | str


def joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same prompt with neighbouring texts merged and empty ones gone.

    Byte-pair merges cross the border between two texts (`"\\n"` then `"\\n"` is one token), but never a control token.
    """
    out: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and out and isinstance(out[-1], str):
            out[-1] += piece
        elif piece != "":
            out.append(piece)
    return tuple(out)


def as_text(pieces: Iterable[Piece]) -> str:
    """The prompt as one string, as the official encoder returns it. It cannot be tokenised safely any more."""
    return "".join(piece if isinstance(piece, str) else piece.name for piece in pieces)

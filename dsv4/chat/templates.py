"""Filling the dialects' templates, so that markers become control tokens and the user's schemas stay text."""

from __future__ import annotations

import string
from collections.abc import Mapping

from dsv4.chat.control import DSML, END_THINK, THINK, Control, Piece
from dsv4.errors import PromptError

TOOL_SCHEMAS, SCHEMA = "tool_schemas", "schema"
MARKERS = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": END_THINK}


def fill(template: str, texts: Mapping[str, str]) -> list[Piece]:
    """Pieces of a `str.format` template: marker placeholders as control tokens, those in `texts` as plain text."""
    out: list[Piece] = []
    for literal, field, _, _ in string.Formatter().parse(template):
        out.append(literal)
        if field is not None:
            out.append(Control(MARKERS[field]) if field in MARKERS else texts[field])
    return out


def check_template(what: str, template: str, needed: str) -> None:
    """Raise `PromptError` unless `template` has the placeholder `needed` and no others but the markers."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as e:
        raise PromptError(
            f"{what} is no template", got=str(e), wanted="braces in pairs, literal ones doubled"
        ) from None
    fields = {field for _, field, _, _ in parts if field is not None}
    if needed not in fields or not fields <= {needed, *MARKERS}:
        raise PromptError(
            f"{what} has the wrong placeholders",
            got=", ".join(sorted(fields)) or "none",
            wanted=f"{needed}, and of {', '.join(MARKERS)}",
        )
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise PromptError(f"{what} formats a placeholder", wanted="plain {placeholders}")

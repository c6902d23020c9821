"""Grammars in the words of the llguidance library: JSON, regular expressions, choices, Lark, and calls beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsv4.chat.grammar_calls import Calls, call_rules
from dsv4.chat.grammar_json import ANY_TEXT, UNMARKED, Json, guided

AT_ONCE, BEHIND_TEXT = 'BEFORE: "\\n\\n<"', f"BEFORE: /(?s:.*)</ & {UNMARKED}"
_UNESCAPED = {"/": r"\/", "\n": r"\n"}  # what may not stand bare between the slashes of Lark


def json_answer(schema: Mapping[str, Any], strict: bool) -> Json:
    """JSON of a schema, properties in the schema's order. A keyword that cannot be enforced: an error if `strict`."""
    return {"json_schema": guided(schema, strict)}


def regex_answer(pattern: str) -> Json:
    """A text that a regular expression matches from its first character to its last."""
    bare = re.sub(r"(\\.)|[/\n]", lambda found: found[1] or _UNESCAPED[found[0]], pattern)
    return lark_answer(f"start: /{bare}/")


def choice_answer(choices: Sequence[str]) -> Json:
    """One of these texts."""
    return lark_answer(f"start: {' | '.join(map(json.dumps, choices))}")


def lark_answer(grammar: str) -> Json:
    """A text that follows a grammar in the library's dialect of Lark."""
    return {"lark_grammar": grammar}


def grammar_text(answer: Json | None, calls: Calls | None, mark: int) -> str:
    """What `Grammars.compile` takes: an answer (None: any text) and calls, or one of them. `mark`: the id of ｜DSML｜.

    Any text may stand before calls, an answer that follows a grammar stands instead of them.
    """
    if calls is None:
        return json.dumps({"grammars": [answer or lark_answer(f"start: TEXT\nTEXT: {ANY_TEXT}")]})
    if calls.forced:
        rules, side = ["start: BEFORE block", AT_ONCE], []
    elif answer:
        rules, side = ["start: @answer | BEFORE block", AT_ONCE], [{"name": "answer", **answer}]
    else:
        rules, side = ["start: TEXT | BEFORE block", f"TEXT: {ANY_TEXT}", BEHIND_TEXT], []
    main = {"name": "main", **lark_answer("\n".join([*rules, call_rules(calls, mark)]))}
    return json.dumps({"grammars": [main, *side]})

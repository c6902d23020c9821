"""What a case is, and what the cases of several endpoints have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dsv4.check.conform.checks import Check

CHAT, TEXT, RESPONSES, MESSAGES = "/chat/completions", "/completions", "/responses", "/messages"
NOWHERE: Final = (404, 405, 501)  # an endpoint that is not offered
REFUSED: Final = (400, 422, *NOWHERE)  # an option that is not
BAD: Final = (400, 422)  # a request that is wrong
HELLO: Final = [{"role": "user", "content": "Say hello."}]
QUESTION: Final = "How warm is it in Paris? Use the tool."
# A closed list: a weak model that is held to a text of its own may never end it.
CITY: Final = {"type": "string", "enum": ["Paris", "Rome"]}
PARAMETERS: Final = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
SCHEMA: Final = {
    "type": "object",
    "properties": {"city": CITY, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """`body`: None for a GET; bytes go out as they are; `model` is added. `after`: another case, which is asked before;
    the checks find its answer in `Got.before`, and `body` may be a function that makes a body of it. `like`: another
    case whose answer must say the same. `absent`: statuses of a server that does not offer it, which then does not
    fail, and neither do cases after this one. `headers`: "" takes one away that is usually sent, {key} is the user's.
    `leave`: go away after the first event, and see whether the server lives.
    """

    name: str
    group: str
    path: str
    body: Any = None
    checks: tuple[Check, ...] = ()
    method: str = "POST"
    absent: tuple[int, ...] = ()
    after: str | None = None
    like: str | None = None
    leave: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

"""Reading objects that lie inside a body of another protocol: what is wrong is refused by its place, "input.0.role"."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from typing import Any

from dsv4.server.refusal import Refusal

Json = dict[str, Any]

_WANTED = {str: "a text", dict: "an object", int: "a whole number", bool: "true or false"}


def wrong(where: str, got: object, wanted: str, do: str | None = None) -> Refusal:
    """The refusal of what stands at `where`."""
    return Refusal(where, param=where.split(".")[0], code="invalid_value", got=repr(got)[:90], wanted=wanted, do=do)


def only(where: str, given: Mapping[str, Any], *known: str) -> None:
    """Refuse a field that asks for something we do not know."""
    for name, value in given.items():
        if name not in known and value not in (None, False):
            raise wrong(f"{where}.{name[:60]}", value, "no such field", "leave it out")


def of(where: str, given: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that must be there."""
    value = given.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong(f"{where}.{name}", value, _WANTED[kind])
    return value


def as_blocks(where: str, content: Any, kind: str = "text") -> list[Json]:
    """Content as a list of blocks: a text is one, of this kind."""
    if isinstance(content, str):
        return [{"type": kind, "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise wrong(where, content, "a text or a list of objects with a type")
    return content


def need_call(where: str, call_id: object, calls: Container[object]) -> str:
    """The id of a call. Refuse what answers a call that was not made: a model that sees it takes it for anything."""
    if not isinstance(call_id, str) or call_id not in calls:
        do = "send the turn of the model that made it, or leave this out"
        raise wrong(where, call_id, "the id of a call that stands before it", do)
    return call_id


def need_answers(where: str, unanswered: Collection[str], wanted: str) -> None:
    """Refuse calls that nothing answers: the model would go on as if it had seen a result."""
    if unanswered:
        got = f"no answer to {', '.join(map(repr, sorted(unanswered)))}"[:90]
        do = "answer each, if only by saying that it was given up, or leave the call out"
        raise Refusal(where, param=where.split(".")[0], code="invalid_value", got=got, wanted=wanted, do=do)

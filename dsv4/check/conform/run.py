"""Run the cases against a server, one after another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from dsv4.check.conform.cases import CASES, CHAT, TEXT, Case
from dsv4.check.conform.checks import Got, Unclear, Wrong, at, ok, parts
from dsv4.check.wire import Broken, Client, words

NOWHERE: Final = (404, 405, 501)  # an endpoint that is not offered
REFUSED: Final = (400, 422, *NOWHERE)  # an option of the chat endpoint that is not


class Verdict(NamedTuple):
    """`verdict`: pass, FAIL, unclear (the model did not do what it takes), or absent (the server does not offer it)."""

    case: Case
    verdict: str
    got: str = ""
    wanted: str = ""


def conform(client: Client, model: str | None, groups: tuple[str, ...] = (), strict: bool = False) -> Iterator[Verdict]:
    """Verdicts as they come. `strict`: what is not offered is a failure. RequestError if nobody is there."""
    named = model or asyncio.run(client.first_model())
    said: dict[str, list[Any]] = {}
    for case in CASES:
        if not groups or case.group in groups:
            yield asyncio.run(_judged(client, case, named, said, strict))


async def _judged(client: Client, case: Case, model: str, said: dict[str, list[Any]], strict: bool) -> Verdict:
    if case.headers and not client.key:
        return Verdict(case, "unclear", "no key was given: the server asks for none, or would refuse all")
    try:
        if case.leave:
            await _leave(client, case, model)
        got = await _answer(client, case, model)
        absent = REFUSED if case.path == CHAT else NOWHERE
        if not (case.required or strict) and got.status in absent:
            return Verdict(case, "absent", f"{got.status} {words(b' '.join(got.lines))}"[:120])
        for check in case.checks:
            check(got)
        if case.path in (CHAT, TEXT) and case.group != "errors":
            said[case.name] = text(got)
        if case.like:
            if case.like not in said or case.like == case.name:
                said[case.like] = text(await _answer(client, _named(case.like), model))
            if said[case.like] != text(got):
                raise Wrong(text(got), f"{said[case.like]} as in {case.like!r}")
    except Wrong as wrong:
        return Verdict(case, "FAIL", wrong.got, wrong.wanted)
    except Unclear as unclear:
        return Verdict(case, "unclear", str(unclear))
    except Broken as broken:
        return Verdict(case, "FAIL", str(broken)[:200], "a whole answer")
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # a shape that no check foresaw
        return Verdict(case, "FAIL", f"{type(error).__name__}: {error}"[:200], "the protocol's shape")
    return Verdict(case, "pass")


def _named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def _sent(case: Case, model: str) -> tuple[bytes | None, dict[str, Any]]:
    if case.body is None or isinstance(case.body, bytes):
        return case.body, {}
    asked = {"model": model, **case.body}
    return json.dumps(asked).encode(), asked


async def _answer(client: Client, case: Case, model: str) -> Got:
    body, asked = _sent(case, model)
    headers = {"anthropic-version": "2023-06-01", **case.headers}
    async with client.open(case.method, case.path.format(model=model), body, headers) as answer:
        return Got(answer.status, answer.headers, [line async for line in answer.lines()], asked)


async def _leave(client: Client, case: Case, model: str) -> None:
    """Read the first line of the answer and go. What follows shows whether the server lives."""
    async with client.open(case.method, case.path, _sent(case, model)[0]) as answer:
        ok(Got(answer.status, answer.headers, []))
        await anext(answer.lines(), b"")


def text(got: Got) -> list[Any]:
    """What an answer says and why it ends, by choice: the same for a stream and a whole one."""
    streamed = got.headers.get("content-type", "").startswith("text/event-stream")
    choices = list(parts(got)) if streamed else at(got.tree, "choices")
    found: dict[int, list[Any]] = {}
    for choice in choices:
        mine = found.setdefault(choice.get("index", 0), ["", "", None])
        told: Mapping[str, Any] = choice.get("delta") or choice.get("message") or choice
        mine[0] += told.get("reasoning_content") or told.get("reasoning") or ""
        mine[1] += told.get("content") or told.get("text") or ""
        mine[2] = choice.get("finish_reason") or mine[2]
    return [found[index] for index in sorted(found)]

"""Run the cases against a server, one after another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from dsv4.check.conform import message_checks, response_checks
from dsv4.check.conform.case import CHAT, MESSAGES, RESPONSES, TEXT, Case
from dsv4.check.conform.cases import CASES
from dsv4.check.conform.checks import Got, Unclear, Wrong, at, ok, parts
from dsv4.check.wire import Broken, Client, words


class Verdict(NamedTuple):
    """`verdict`: pass, FAIL, unclear (the model did not do what it takes), or absent (the server does not offer it)."""

    case: Case
    verdict: str
    got: str = ""
    wanted: str = ""


def conform(client: Client, model: str | None, groups: tuple[str, ...] = (), strict: bool = False) -> Iterator[Verdict]:
    """Verdicts as they come. `strict`: what is not offered is a failure. RequestError if nobody is there."""
    asking = Asking(client, model or asyncio.run(client.first_model()), strict)
    for case in CASES:
        if not groups or case.group in groups:
            yield asyncio.run(asking.judged(case))


class Absent(Exception):
    """The server does not offer what a case needs."""


class Asking:
    """Cases asked of one server. An answer that other cases need as well is asked for once."""

    def __init__(self, client: Client, model: str, strict: bool = False) -> None:
        self._client, self._model, self._strict = client, model, strict
        self._answers: dict[str, Got] = {}

    async def judged(self, case: Case) -> Verdict:
        """The verdict on one case."""
        if "Authorization" in case.headers and not self._client.key:
            return Verdict(case, "unclear", "no key was given: the server asks for none, or would refuse all")
        try:
            got = self._answers[case.name] = await self._answer(case)
            for check in case.checks:
                check(got)
            if case.like:
                said, wanted = SPOKEN[case.path](got), SPOKEN[case.path](await self._known(case.like, case))
                if said != wanted:
                    raise Wrong(said, f"{wanted} as in {case.like!r}")
        except Absent as absent:
            return Verdict(case, "absent", str(absent))
        except Wrong as wrong:
            return Verdict(case, "FAIL", wrong.got, wrong.wanted)
        except Unclear as unclear:
            return Verdict(case, "unclear", str(unclear))
        except Broken as broken:
            return Verdict(case, "FAIL", str(broken)[:200], "a whole answer")
        except (LookupError, TypeError, AttributeError, ValueError) as error:  # a shape that no check foresaw
            return Verdict(case, "FAIL", f"{type(error).__name__}: {error}"[:200], "the protocol's shape")
        return Verdict(case, "pass")

    async def _known(self, name: str, asking: Case) -> Got:
        """The answer of another case; of the one that asks, a second one."""
        if name not in self._answers or name == asking.name:
            self._answers[name] = await self._answer(next(case for case in CASES if case.name == name))
        return self._answers[name]

    async def _answer(self, case: Case) -> Got:
        """Absent if the server does not offer it, or what it comes after."""
        before = await self._known(case.after, case) if case.after else None
        body, asked = _sent(case, self._model, before)
        headers = {"anthropic-version": "2023-06-01", **case.headers}
        headers = {name: value.format(key=self._client.key) for name, value in headers.items()}
        if case.leave:
            await self._leave(case, body, headers)
        async with self._client.open(case.method, case.path.format(model=self._model), body, headers) as answer:
            got = Got(answer.status, answer.headers, [line async for line in answer.lines()], asked, before)
        if got.status in case.absent and not self._strict:
            raise Absent(f"{got.status} {words(b' '.join(got.lines))}"[:120])
        return got

    async def _leave(self, case: Case, body: bytes | None, headers: Mapping[str, str]) -> None:
        """Read the first line of the answer and go. What follows shows whether the server lives."""
        async with self._client.open(case.method, case.path, body, headers) as answer:
            ok(Got(answer.status, answer.headers, []))
            await anext(answer.lines(), b"")


def _sent(case: Case, model: str, before: Got | None) -> tuple[bytes | None, dict[str, Any]]:
    """A body as it goes out, and as an object."""
    made = case.body(before) if callable(case.body) else case.body
    if made is None or isinstance(made, bytes):
        return made, {}
    asked = {"model": model, **made}
    return json.dumps(asked).encode(), asked


def text(got: Got) -> list[Any]:
    """What an answer says and why it ends, by choice: the same for a stream and a whole one."""
    choices = list(parts(got)) if got.streamed else at(got.tree, "choices")
    found: dict[int, list[Any]] = {}
    for choice in choices:
        mine = found.setdefault(choice.get("index", 0), ["", "", None])
        told: Mapping[str, Any] = choice.get("delta") or choice.get("message") or choice
        mine[0] += told.get("reasoning_content") or told.get("reasoning") or ""
        mine[1] += told.get("content") or told.get("text") or ""
        mine[2] = choice.get("finish_reason") or mine[2]
    return [found[index] for index in sorted(found)]


# What an answer of an endpoint says, apart from what may differ each time.
SPOKEN: Final[Mapping[str, Callable[[Got], Any]]] = {
    CHAT: text,
    TEXT: text,
    MESSAGES: message_checks.spoken,
    RESPONSES: response_checks.spoken,
}

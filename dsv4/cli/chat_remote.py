"""Answers of a chat from a server that speaks OpenAI's chat completions, ours or another's.

By the standard library: one POST whose answer is lines of text needs no client package, so `--url` works wherever
dsv4 does.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from dsv4.chat.events import ContentDelta, Event, ReasoningDelta
from dsv4.check.wire import base, data, words
from dsv4.cli.chat_talk import Talk
from dsv4.cli.chat_turn import Turn
from dsv4.errors import RequestError

PATIENCE: Final = 600.0  # seconds without a byte: a long prompt may take minutes before its first token
LONGEST_LIST: Final = 1 << 20  # bytes of /models
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
SAMPLING: Final = ("temperature", "top_p", "seed", "max_tokens")  # what the protocol has a name for


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to wherever it points."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """None: the redirect becomes an error."""


class Remote:
    """A model behind `url`, which may leave out its /v1. `model` None: the first that the server lists."""

    blocking = True

    def __init__(self, url: str, model: str | None, key: str | None, asked: Mapping[str, Any]) -> None:
        self._base, self._key = base(url), key
        local = urllib.parse.urlsplit(url).hostname in LOOPBACK
        # A proxy cannot know what this machine calls localhost.
        self._opener = urllib.request.build_opener(_Stay, *([urllib.request.ProxyHandler({})] if local else []))
        self._asked = {name: asked[name] for name in SAMPLING if name in asked}
        self._model = model or self._first_model()
        self.name = f"{self._model} at {self._base}"

    def efforts(self) -> None:
        """Only the server knows."""
        return None

    def answer(self, talk: Talk, text: str, turn: Turn, stopped: Callable[[], bool]) -> Iterator[Event]:
        """As `Source.answer`. RequestError for a server that cannot be reached, refuses or breaks off."""
        body = {
            "model": self._model,
            "messages": [_plain(message) for message in talk.asking(text)],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._asked,
            **_wishes(talk),
        }
        with self._open("/chat/completions", body) as response:
            for chunk in _chunks(response, self._base):
                yield from _events(chunk, turn)
                if stopped():
                    return
        if turn.finish is None:
            turn.finish = "the server, which broke off without a reason"

    def _first_model(self) -> str:
        with self._open("/models") as response:
            tree = _json(response.read(LONGEST_LIST), self._base)
        models = tree.get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise RequestError(f"{self._base} lists no model", do="name one: dsv4 chat MODEL --url URL")
        return str(models[0]["id"])

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream" if body else "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._base + path, data, headers)
            return self._opener.open(request, timeout=PATIENCE)  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            raise _refused(self._base, error) from None
        except urllib.error.URLError as error:
            raise RequestError(f"{self._base} cannot be reached", got=error.reason, do="is it running?") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RequestError(f"{self._base} cannot be asked", got=f"{type(error).__name__}: {error}") from None


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Role and text alone: old reasoning is dropped anyway, and the ids are ours."""
    return {"role": message["role"], "content": message["content"]}


def _wishes(talk: Talk) -> dict[str, Any]:
    """Thinking and effort, where somebody asked, in both of the spellings that servers of this family read."""
    wishes: dict[str, Any] = {} if talk.effort is None else {"reasoning_effort": talk.effort}
    if talk.thinking is not None:
        wishes["thinking"] = {"type": "enabled" if talk.thinking else "disabled"}
        wishes["chat_template_kwargs"] = {"thinking": talk.thinking}
    return wishes


def _refused(address: str, error: urllib.error.HTTPError) -> RequestError:
    """The server's own words, cut to one line."""
    try:
        text = words(error.read(1 << 16))
    except (OSError, http.client.HTTPException):
        text = ""
    advice = {401: "--key-file FILE gives it a key", 404: "is this the address of an OpenAI-compatible server?"}
    long = error.code == 413 or (error.code == 400 and "context" in text)
    hint = "the conversation is too long: /clear begins anew" if long else advice.get(error.code)
    return RequestError(f"{address} refused", got=f"{error.code} {text}", do=hint)


def _chunks(response: Iterable[bytes], address: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of an event stream, up to [DONE]. An object with an error in it raises."""
    try:
        for line in response:
            value = data(line)
            if value is None or value == b"[DONE]":
                continue
            chunk = _json(value, address)
            if chunk.get("error"):
                raise RequestError(f"{address} broke off", got=str(chunk["error"])[:300])
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"{address} broke off", got=f"{type(error).__name__}: {error}") from None


def _json(text: bytes, address: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise RequestError(f"{address} sends what is no chat completion", got=repr(text[:60]))
    return tree


def _events(chunk: Mapping[str, Any], turn: Turn) -> Iterator[Event]:
    """What one chunk says; servers disagree on the name of the reasoning."""
    usage: Any = chunk.get("usage")
    if isinstance(usage, dict):
        turn.prompt, turn.count = usage.get("prompt_tokens"), usage.get("completion_tokens")
    choices: Sequence[Any] = chunk.get("choices") or ()
    for choice in choices[:1]:
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning:
            turn.arrived()
            yield ReasoningDelta(str(reasoning))
        if delta.get("content"):
            turn.arrived()
            yield ContentDelta(str(delta["content"]))
        turn.finish = choice.get("finish_reason") or turn.finish

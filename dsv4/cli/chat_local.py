"""Answers of a chat from a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dsv4.chat.events import Event
from dsv4.chat.parse import StreamParser
from dsv4.chat.replay import replay
from dsv4.cli.chat_talk import Talk
from dsv4.cli.chat_turn import Turn
from dsv4.engine.request import Sampling
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.llm import LLM


class Local:
    """A loaded model."""

    blocking = False

    def __init__(self, llm: LLM, sampling: Sampling) -> None:
        self.llm, self.sampling = llm, sampling
        self.name = str(llm.directory)

    def efforts(self) -> Sequence[str]:
        """Those of the model's dialect."""
        return list(self.llm.dialect.efforts)

    def answer(self, talk: Talk, text: str, turn: Turn, stopped: Callable[[], bool]) -> Iterator[Event]:
        """As `Source.answer`. RequestError if the conversation no longer fits."""
        prompt = self.llm.prompt(talk.asking(text), thinking=talk.thinking is not False, effort=talk.effort)
        ids = replay(prompt.pieces, talk.sampled(), self.llm.tokenizer)
        limit = min(self.sampling.max_tokens, self._room(len(ids), bool(talk.messages)))
        turn.prompt, turn.count = len(ids), 0
        parser = StreamParser(in_reasoning=prompt.in_reasoning, tools=False)
        for delta in self.llm.generate(ids, replace(self.sampling, max_tokens=limit)):
            turn.arrived()
            turn.ids.append(delta.token)
            turn.count, turn.finish = len(turn.ids), delta.finish
            yield from parser.feed(delta.text)
            if stopped():
                break
        if turn.finish == "length" and limit < self.sampling.max_tokens:
            turn.finish = "context"
        yield from parser.finish()

    def _room(self, tokens: int, spoken: bool) -> int:
        """How long the answer to a prompt of so many tokens can become."""
        room = self.llm.resolved.options.max_context
        if tokens < room:
            return room - tokens
        shorter = "/clear begins anew (/save FILE before it keeps this)" if spoken else "shorten it"
        raise RequestError(
            f"{'the conversation' if spoken else 'the message'} does not fit into the context any more, and what you"
            " just sent is not kept",
            got=f"{tokens} tokens",
            wanted=f"less than {room}",
            do=f"{shorter}, or start dsv4 chat with a larger --max-context",
        )

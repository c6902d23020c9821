"""Messages to the exact prompt that a V4 model was trained on.

B, U, A, E, T, /T are the tokens begin, user, assistant, end of sentence, `<think>`, `</think>`; nothing stands between:

    chat       B system U user A /T                      the model goes on with its answer and E
    thinking   B effort system U user A T                the model goes on with its reasoning, /T, its answer and E
    history    B system U user A /T answer E U user A T  old reasoning is dropped, unless tools are in play

The opening `T` or `/T` is part of the prompt: a model left at a bare `A` is out of distribution. Grammar and rules are
those of the official encoder, encoding/encoding_dsv4.py of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4.chat import messages as m
from dsv4.chat.control import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    REMINDER,
    TASKS,
    THINK,
    USER,
    Control,
    Piece,
    as_text,
    joined,
)
from dsv4.chat.dialect import Dialect
from dsv4.chat.messages import Message
from dsv4.chat.tools import render_blocks, render_calls, render_instructions
from dsv4.errors import PromptError


@dataclass(frozen=True)
class Prompt:
    """`pieces` for `Tokenizer.encode_prompt`. `in_reasoning`: the model goes on with reasoning, as the parser asks."""

    pieces: tuple[Piece, ...]
    in_reasoning: bool

    @property
    def text(self) -> str:
        """The prompt as one string, for people and for comparing with the official encoder."""
        return as_text(self.pieces)


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    dialect: Dialect,
    *,
    thinking: bool = True,
    effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
    drop_thinking: bool = True,
    continue_final: bool = False,
    generation: bool = True,
) -> Prompt:
    """Render OpenAI-style `messages` in `dialect`.

    `effort` None is the dialect's default; its text appears in thinking mode only. `tools` and `response_format` are
    added to the first system message, made if there is none. `drop_thinking` leaves reasoning of earlier turns out;
    any tools in the conversation switch it off. `continue_final` leaves the last assistant message open for the model
    to go on (as `"prefix": true` or `"wo_eos": true` on it do). `generation=False` renders a finished conversation.

    Raises `PromptError` for messages of a wrong shape, an unknown effort, a text that the dialect lacks, and a
    conversation that leaves the model no turn to take.
    """
    opening = dialect.effort_text(effort) if thinking or effort is not None else ""
    read = _add_instructions(m.read_messages(messages), tools, response_format)
    if continue_final:
        if read[-1].role != "assistant":
            raise PromptError("nothing to continue", got=f"a last message of role {read[-1].role}", wanted="assistant")
        read[-1] = replace(read[-1], open_ended=True)
    read = m.sort_results(m.merge(read))
    drop = drop_thinking and not any(message.tools for message in read)
    if thinking and drop:
        read = m.drop_old(read)
    if generation:
        _check_turn(read[-1])
    mode = _Mode(dialect, thinking, drop, m.last_user(read))
    body = [piece for n in range(len(read)) for piece in _render(n, read, mode)]
    pieces = joined([Control(BOS), opening if thinking else "", *body])
    return Prompt(pieces, pieces[-1] == Control(THINK))


@dataclass(frozen=True)
class _Mode:
    dialect: Dialect
    thinking: bool
    drop: bool
    last_user: int

    def keeps_reasoning(self, index: int) -> bool:
        """Whether an assistant message at `index`, there or about to be opened there, shows its reasoning."""
        return self.thinking and (not self.drop or index > self.last_user)

    def sentinel(self, index: int) -> Control:
        return Control(THINK if self.keeps_reasoning(index + 1) else END_THINK)


def _add_instructions(messages: list[Message], tools: Any, response_format: Any) -> list[Message]:
    """The request's own tools and response format, moved into the leading system message."""
    extra = m.read_tools("request", tools or ())
    if not extra and not response_format:
        return messages
    system, rest = (messages[0], messages[1:]) if messages[0].role == "system" else (Message("system"), messages)
    for name, asked in (("tools", extra), ("response_format", response_format)):
        if asked and getattr(system, name):
            raise PromptError(f"{name} given twice", got="in the system message and in the request", do="leave one out")
    schema = system.response_format or response_format
    return [replace(system, tools=system.tools or extra, response_format=schema), *rest]


def _check_turn(last: Message) -> None:
    if last.role in ("user", "developer") or last.task is not None or (last.role == "assistant" and last.open_ended):
        return
    advice = {
        "assistant": "add a user message, or continue_final_message to go on with it",
        "latest_reminder": "put the reminder before the user message",
    }
    raise PromptError(
        "the conversation leaves the model no turn",
        got=f"a last message of role {last.role}",
        do=advice.get(last.role, "add a user message"),
    )


def _render(index: int, messages: Sequence[Message], mode: _Mode) -> list[Piece]:
    message = messages[index]
    following = messages[index + 1].role if index + 1 < len(messages) else None
    after_task = index > 0 and messages[index - 1].task is not None
    if message.role == "assistant":
        out = _assistant(message, mode.keeps_reasoning(index) and not after_task)
    else:
        out = _other(message, mode)
    return out + (_transition(message, index, mode) if following in (None, "assistant", "latest_reminder") else [])


def _other(message: Message, mode: _Mode) -> list[Piece]:
    instructions = render_instructions(message, mode.dialect) if message.role in ("system", "developer") else []
    openings: dict[str, list[Piece]] = {
        "system": [],
        "user": [Control(USER), render_blocks(message.blocks)],
        "developer": [Control(USER)],
        "latest_reminder": [Control(REMINDER)],
    }
    return [*openings[message.role], message.text, *instructions]


def _assistant(message: Message, reasons: bool) -> list[Piece]:
    reasoning: list[Piece] = [message.reasoning, Control(END_THINK)] if reasons else []
    return [*reasoning, message.text, *render_calls(message.calls), *([] if message.open_ended else [Control(EOS)])]


def _transition(message: Message, index: int, mode: _Mode) -> list[Piece]:
    """What opens the next turn: a quick task's token, or the assistant token with its sentinel."""
    if message.task is not None and message.task != "action":
        return [Control(TASKS[message.task])]
    if message.task is not None:
        return [Control(ASSISTANT), Control(THINK if mode.thinking else END_THINK), Control(TASKS["action"])]
    if message.role in ("user", "developer"):
        return [Control(ASSISTANT), mode.sentinel(index)]
    return []

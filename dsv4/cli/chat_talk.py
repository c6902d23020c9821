"""A conversation: what was said, how the next answer is wanted, and its JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dsv4.chat.messages import read_messages
from dsv4.errors import PromptError

MAX_BYTES: Final = 64 << 20


@dataclass
class Talk:
    """`messages`: user and assistant in turn, OpenAI-style; `token_ids` of an answer is all that was sampled for it.

    `thinking` and `effort` None: as the model or the server does it by default.
    """

    system: str = ""
    thinking: bool | None = None
    effort: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def asking(self, text: str) -> list[dict[str, Any]]:
        """The messages of the next request."""
        return [*self.opening(), *self.messages, {"role": "user", "content": text}]

    def opening(self) -> list[dict[str, Any]]:
        """The system message, if there is one."""
        return [{"role": "system", "content": self.system}] if self.system else []

    def sampled(self) -> list[Sequence[int]]:
        """The ids of each answer so far, () where they are not known."""
        return [message.get("token_ids", ()) for message in self.messages if message["role"] == "assistant"]

    def keep(self, question: str, answer: Mapping[str, Any]) -> None:
        """Add one exchange."""
        self.messages += [{"role": "user", "content": question}, dict(answer)]


def save(talk: Talk, path: Path, model: str) -> None:
    """Write the conversation, whole or not at all. PromptError if there is a file that is no conversation."""
    if path.exists():
        try:
            load(path)
        except PromptError as error:
            raise PromptError(f"{path} is there and no conversation", do="choose another name") from error
    tree = {"model": model, "thinking": talk.thinking, "effort": talk.effort}
    text = json.dumps({**tree, "messages": talk.opening() + talk.messages}, ensure_ascii=False, indent=1)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> Talk:
    """Read what `save` wrote, or any JSON object with OpenAI-style `messages`. PromptError for anything else."""
    if path.stat().st_size > MAX_BYTES:
        raise PromptError(f"{path} is too large", got=f"{path.stat().st_size} bytes", wanted=f"at most {MAX_BYTES}")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON", got=" ".join(str(error).split())) from None
    if not isinstance(tree, dict) or not isinstance(tree.get("messages"), list):
        raise PromptError(f"{path} is no conversation", wanted='a JSON object with "messages"')
    thinking, effort = tree.get("thinking"), tree.get("effort")
    if not isinstance(thinking, bool | None) or not isinstance(effort, str | None):
        raise PromptError(f"{path}: thinking or effort", wanted="true, false or null; a text or null")
    messages = tree["messages"]
    if messages:
        read_messages(messages)
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
    for number, message in enumerate(messages):
        _check(f"{path}: message {number} behind the system message", number, message)
    if len(messages) % 2:
        raise PromptError(f"{path}: the last message has no answer", wanted="user and assistant in turn")
    return Talk(str(system or ""), thinking, effort, messages)


def _check(where: str, number: int, message: Mapping[str, Any]) -> None:
    """User and assistant in turn, plain text; ids that are ids."""
    role = "assistant" if number % 2 else "user"
    if message["role"] != role or not isinstance(message.get("content"), str) or message.get("tool_calls"):
        raise PromptError(where, got=message["role"], wanted=f"a text of {role}: this chat has no tools")
    ids = message.get("token_ids", [])
    if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < 1 << 31 for id in ids):
        raise PromptError(f"{where}: token_ids", wanted="a list of token ids")

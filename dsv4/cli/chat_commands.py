"""What a line that begins with a slash does, one function a command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final, NamedTuple

from dsv4.cli import chat_talk
from dsv4.cli.chat_talk import Talk
from dsv4.cli.chat_turn import Source
from dsv4.errors import RequestError


@dataclass
class Chat:
    """A conversation and who answers in it. `over`: /quit was said."""

    talk: Talk
    source: Source
    over: bool = False


def _think(chat: Chat, argument: str) -> str:
    chat.talk.thinking = True
    return "answers begin with reasoning"


def _nothink(chat: Chat, argument: str) -> str:
    chat.talk.thinking = False
    return "answers come without reasoning"


def _effort(chat: Chat, argument: str) -> str:
    known = chat.source.efforts()
    if not argument:
        offered = f"; there are: {', '.join(known)}" if known else ""
        return f"effort: {chat.talk.effort or 'the default'}{offered}"
    if known is not None and argument not in known:
        raise RequestError("there is no such effort", got=argument, wanted=" or ".join(known))
    chat.talk.effort = argument
    silent = "; it shows when the model thinks: /think" if chat.talk.thinking is False else ""
    return f"effort: {argument}{silent}"


def _system(chat: Chat, argument: str) -> str:
    chat.talk.system = argument
    what = "the system message is set" if argument else "there is no system message now"
    return what + ("; the conversation so far is kept (/clear begins anew)" if chat.talk.messages else "")


def _save(chat: Chat, argument: str) -> str:
    path = _path("/save", argument)
    chat_talk.save(chat.talk, path, chat.source.name)
    return f"saved {_exchanges(chat.talk)} in {path}"


def _load(chat: Chat, argument: str) -> str:
    path = _path("/load", argument)
    talk, known = chat_talk.load(path), chat.source.efforts()
    other = talk.effort is not None and known is not None and talk.effort not in known
    note = f"; this model has no effort {talk.effort}" if other else ""
    if other:
        talk.effort = None
    chat.talk = talk
    return f"loaded {_exchanges(talk)} from {path}{note}"


def _clear(chat: Chat, argument: str) -> str:
    chat.talk.messages.clear()
    return "the conversation begins anew" + ("; the system message stays" if chat.talk.system else "")


def _help(chat: Chat, argument: str) -> str:
    width = max(len(f"/{name} {command.argument}") for name, command in COMMANDS.items())
    lines = [f"{f'/{name} {command.argument}':<{width}}  {command.does}" for name, command in COMMANDS.items()]
    return "\n".join((*lines, *TYPING))


def _quit(chat: Chat, argument: str) -> str:
    chat.over = True
    return ""


class Command(NamedTuple):
    """`run` returns what to tell; `argument` is its name in the help, "" if it takes none."""

    run: Callable[[Chat, str], str]
    argument: str
    does: str


COMMANDS: Final = {
    "think": Command(_think, "", "let the model reason before it answers"),
    "nothink": Command(_nothink, "", "let it answer at once"),
    "effort": Command(_effort, "LEVEL", "how hard it thinks, by the model's own names; alone: which there are"),
    "system": Command(_system, "TEXT", "the system message from now on; alone: none"),
    "save": Command(_save, "FILE", "write the conversation as JSON"),
    "load": Command(_load, "FILE", "go on with a conversation"),
    "clear": Command(_clear, "", "forget the conversation"),
    "help": Command(_help, "", "this"),
    "quit": Command(_quit, "", "end, as Ctrl-D does"),
}
TYPING: Final = (
    'A line that ends in \\ goes on; a message between """ and """ has as many lines as it likes.',
    "A message that begins with a slash needs a space before it. Ctrl-C stops an answer.",
)


def run(chat: Chat, line: str) -> str:
    """Do what the line says and return what to tell. RequestError for no command, a DSV4Error or OSError of its own."""
    name, _, argument = line.removeprefix("/").partition(" ")
    name, _, below = name.partition("\n")  # a text of several lines may follow at once
    argument = "\n".join(filter(None, (below, argument))).strip()
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        guess = f"did you mean /{near[0]}? " if near else ""
        raise RequestError(f"/{name} is no command", do=guess + "/help lists them; a message may begin with a space")
    if argument and not command.argument:
        raise RequestError(f"/{name} stands alone", got=argument[:60])
    return command.run(chat, argument)


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise RequestError(f"{command} needs the name of a file", wanted=f"{command} FILE")
    return Path(argument).expanduser()


def _exchanges(talk: Talk) -> str:
    count = len(talk.messages) // 2
    return f"{count} exchange{'' if count == 1 else 's'}"

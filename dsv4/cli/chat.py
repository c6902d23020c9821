"""`dsv4 chat`: a conversation, with a model in this process or behind a URL."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dsv4.cli.chat_commands import Chat, run
from dsv4.cli.chat_input import Lines, interactive, open_lines, read_message
from dsv4.cli.chat_talk import Talk, load
from dsv4.cli.chat_turn import Source, exchange
from dsv4.cli.options import (
    Device,
    Dialect,
    Draft,
    Dtype,
    Effort,
    Force,
    Graphs,
    Kernels,
    KeyFile,
    MinP,
    ModelName,
    Numerics,
    Stored,
    System,
    Temperature,
    TopK,
    TopP,
    choices,
    key_of,
)
from dsv4.cli.progress import load_bar
from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import DSV4Error


def chat(
    model: ModelName = None,
    url: Annotated[str | None, typer.Option(help="an OpenAI-compatible server, which then runs MODEL")] = None,
    key_file: KeyFile = None,
    system: System = "",
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="let the model reason first")] = None,
    effort: Effort = None,
    resume: Annotated[Path | None, typer.Option("--load", help="go on with a conversation that /save wrote")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer; without it, what fits")] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same answers")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no words at the start")] = False,
    dialect: Dialect = None,
    numerics: Numerics = "official",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    kernels: Kernels = None,
    stored: Stored = None,
    graphs: Graphs = True,
    force: Force = None,
    draft: Draft = None,
    max_context: Annotated[int, typer.Option(help="positions for the whole conversation")] = 4096,
) -> None:
    """Talk with a model; /help lists what can be said beside messages.

    Answers go to stdout and all else to stderr. Standard input may be a pipe, a message a line: then the exit code is 1
    if any of them failed.
    """
    asked: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    asked |= {"seed": seed, "max_tokens": max_tokens}
    asked = {name: value for name, value in asked.items() if value is not None}
    Sampling(**asked)  # a mistake in it should not have to wait for the weights
    talk = Talk() if resume is None else load(resume)
    talk.system, talk.effort = system or talk.system, effort or talk.effort
    talk.thinking = talk.thinking if think is None else think
    err = Console(stderr=True, highlight=False)
    if url is not None:
        from dsv4.cli.chat_remote import Remote

        key = key_of(key_file)
        source: Source = Remote(url, model, key, asked)
        started = [f"model     {source.name}"]
    else:
        options = EngineOptions(
            numerics=numerics,
            dtype=dtype,
            device=device,
            max_context=max_context,
            draft_tokens=draft,
            kernels=choices(kernels, force),
            stored=stored,
            graphs=graphs,
        )
        source, started = _local(model, options, dialect, asked, err)
    session = Chat(talk, source)
    if talk.effort is not None:
        run(session, f"/effort {talk.effort}")  # refused now, if it is none
    if not quiet:
        started.append("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat")
        err.print("\n".join(started), style="dim", markup=False, soft_wrap=True)
    well = converse(session, open_lines(), err)
    raise typer.Exit(not (well or interactive()))


def _local(
    model: str | None, options: EngineOptions, dialect: str | None, asked: dict[str, Any], err: Console
) -> tuple[Source, list[str]]:
    """The model in this process, and what was decided about it."""
    from dsv4.cli.chat_local import Local
    from dsv4.llm import LLM

    with load_bar(err, "loading") as show:
        llm = LLM.load(model, options, dialect, show)
    gc.collect()
    gc.freeze()  # what is loaded stays until the end: the collector need not look through it again and again
    _ = llm.dialect  # a model that cannot chat says so before the first message
    return Local(llm, replace(llm.defaults, **{"max_tokens": options.max_context, **asked})), llm.lines()


def converse(session: Chat, lines: Lines, err: Console) -> bool:
    """Until the input ends or /quit; whether everything went well. An error costs its message, not the conversation."""
    well, typed = True, interactive()
    while not session.over:
        try:
            text = read_message(lines)
        except KeyboardInterrupt:
            if not typed:
                raise
            err.print("\n(Ctrl-D or /quit ends the chat)", style="dim", markup=False)
            continue
        if text is None:
            break
        try:
            _answer(session, text, err)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except (DSV4Error, OSError) as error:
            well = False
            err.print(f"dsv4: {error}", markup=False, soft_wrap=True)
    if typed and not session.over:
        err.print()  # what follows begins on a line of its own
    return well


def _answer(session: Chat, text: str, err: Console) -> None:
    if text.startswith("/"):
        told = run(session, text)
        if told:
            err.print(told, style="dim", markup=False, soft_wrap=True)
    elif text.strip():
        exchange(session.talk, text, session.source, err)

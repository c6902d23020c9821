"""`dsv4 generate`: one prompt, one answer, streamed. The answer goes to stdout and everything else to stderr."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dsv4.chat.grammar_text import json_answer
from dsv4.cli.options import (
    Device,
    Dialect,
    Draft,
    Dtype,
    Effort,
    Force,
    Graphs,
    Kernels,
    MinP,
    ModelPath,
    Numerics,
    Stored,
    System,
    Temperature,
    TopK,
    TopP,
    choices,
)
from dsv4.cli.progress import load_bar
from dsv4.config import EngineOptions, read_json
from dsv4.config_fields import shown
from dsv4.engine.request import Sampling
from dsv4.errors import ConfigError


def generate(
    model: ModelPath = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="what to ask; - reads standard input")] = ...,  # type: ignore[assignment]
    system: System = "",
    think: Annotated[bool, typer.Option("--think/--no-think", help="let the model reason first")] = True,
    effort: Effort = None,
    raw: Annotated[bool, typer.Option("--raw", help="the prompt is the whole text, control tokens included")] = False,
    max_tokens: Annotated[int, typer.Option(help="longest answer, reasoning included")] = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answer")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text, in reasoning too; repeatable")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="hold the answer to the JSON schema in this file")
    ] = None,
    trace: Annotated[int, typer.Option(help="show the distribution behind the first N steps (20 without N)")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but the answer")] = False,
    dialect: Dialect = None,
    numerics: Numerics = "official",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    kernels: Kernels = None,
    stored: Stored = None,
    graphs: Graphs = True,
    force: Force = None,
    draft: Draft = None,
    max_context: Annotated[int, typer.Option(help="positions per sequence")] = 4096,
) -> None:
    """Answer one prompt. Sampling defaults to what the checkpoint recommends."""
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
    asked: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    asked |= {"seed": seed, "max_tokens": max_tokens, "stop": tuple(stop or ()), "trace": trace}
    schema = None if json_schema is None else read_json(json_schema)
    if not isinstance(schema, dict | None):
        raise ConfigError(str(json_schema), got=shown(schema), wanted="a JSON schema that is an object")
    Sampling(**asked)  # a mistake in it should not have to wait for the weights
    from dsv4.cli.answer import Answer  # nor should one in the usage wait for torch
    from dsv4.llm import LLM

    err = Console(stderr=True, highlight=False, quiet=quiet and not trace)
    with load_bar(err, "loading") as show:
        llm = LLM.load(model, options, dialect, show)
    gc.collect()
    gc.freeze()  # what is loaded stays until the end: the collector need not look through it again and again
    sampling = replace(llm.defaults, **asked)
    text = sys.stdin.read() if prompt == "-" else prompt
    if raw:
        ids, in_reasoning = llm.tokenizer.encode_raw(text), None
    else:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        rendered = llm.prompt(turns, thinking=think, effort=effort)
        ids, in_reasoning = llm.tokenizer.encode_prompt(rendered.pieces), rendered.in_reasoning
    if schema is not None:
        answer = json_answer(schema, strict=True)
        sampling = replace(sampling, grammar=llm.grammar(answer, in_reasoning=bool(in_reasoning)))
    deltas = llm.generate(ids, sampling)
    if not as_json:
        err.print("\n".join(llm.lines()), style="dim", markup=False, soft_wrap=True)
    Answer(llm, len(ids), in_reasoning, trace > 0, err, as_json).run(deltas)

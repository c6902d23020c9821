"""`dsv4 generate`: one prompt, one answer, streamed. The answer goes to stdout and everything else to stderr."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dsv4.cli.progress import byte_bar
from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import ConfigError

Numerics = Literal["official", "float"]
Dtype = Literal["bfloat16", "float32"]
Kernels = Literal["reference", "covered", "auto", "unfused"]


def generate(
    model: Annotated[
        Path | None, typer.Argument(help="a checkpoint's directory or ORG/NAME; without it, the embedded model")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="what to ask; - reads standard input")] = ...,  # type: ignore[assignment]
    system: Annotated[str, typer.Option(help="a system message")] = "",
    think: Annotated[bool, typer.Option("--think/--no-think", help="let the model reason first")] = True,
    effort: Annotated[str | None, typer.Option(help="reasoning effort, by the model's own names")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="the prompt is the whole text, control tokens included")] = False,
    max_tokens: Annotated[int, typer.Option(help="longest answer, reasoning included")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0: always the most probable token")] = None,
    top_k: Annotated[int | None, typer.Option(help="choose among so many tokens; 0: all")] = None,
    top_p: Annotated[float | None, typer.Option(help="choose among the head of this mass; 1: all")] = None,
    min_p: Annotated[float | None, typer.Option(help="least probability, as a share of the largest")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answer")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text, in reasoning too; repeatable")] = None,
    trace: Annotated[int, typer.Option(help="show the distribution behind the first N steps (20 without N)")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but the answer")] = False,
    dialect: Annotated[str | None, typer.Option(help="preview, 0731, or the path of a dialect")] = None,
    numerics: Annotated[
        Numerics, typer.Option(help="official: round activations as the model was trained")
    ] = "official",
    dtype: Annotated[Dtype, typer.Option(help="how activations are stored")] = "bfloat16",
    device: Annotated[str, typer.Option(help="where the model runs")] = "cpu",
    kernels: Annotated[Kernels, typer.Option(help="covered: where there are any; auto: nothing else")] = "reference",
    force: Annotated[list[str] | None, typer.Option(help="OP=CHOICE for one op; repeatable")] = None,
    draft: Annotated[int | None, typer.Option(help="tokens to guess each step with the draft; 0: none")] = None,
    max_context: Annotated[int, typer.Option(help="positions per sequence")] = 4096,
) -> None:
    """Answer one prompt. Sampling defaults to what the checkpoint recommends."""
    options = EngineOptions(
        numerics=numerics,
        dtype=dtype,
        device=device,
        max_context=max_context,
        draft_tokens=draft,
        kernels={"*": kernels, **forced(force or ())},
    )
    asked: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    asked = {name: value for name, value in asked.items() if value is not None}
    asked |= {"seed": seed, "max_tokens": max_tokens, "stop": tuple(stop or ()), "trace": trace}
    Sampling(**asked)  # a mistake in it should not have to wait for the weights
    from dsv4.cli.answer import Answer  # nor should one in the usage wait for torch
    from dsv4.llm import LLM

    err = Console(stderr=True, highlight=False, quiet=quiet and not trace)
    with byte_bar(err, "loading") as show:
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
    deltas = llm.generate(ids, sampling)
    if not as_json:
        err.print("\n".join(llm.resolved.lines()), style="dim", markup=False, soft_wrap=True)
    Answer(llm, len(ids), in_reasoning, trace > 0, err, as_json).run(deltas)


def forced(given: Sequence[str]) -> dict[str, str]:
    """Texts "OP=CHOICE" as a table. ConfigError for one that is none."""
    pairs = [text.partition("=") for text in given]
    wrong = [text for text, (op, _, choice) in zip(given, pairs, strict=True) if not op or not choice]
    if wrong:
        raise ConfigError("--force", got=repr(wrong[0]), wanted="OP=CHOICE, as in rms_norm=reference")
    return {op: choice for op, _, choice in pairs}

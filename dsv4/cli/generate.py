"""`dsv4 generate`: one prompt, one answer, streamed. The answer goes to stdout and everything else to stderr."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling

if TYPE_CHECKING:
    from dsv4.llm import LLM

Numerics = Literal["official", "float"]
Dtype = Literal["bfloat16", "float32"]


def generate(
    model: Annotated[
        Path | None, typer.Argument(help="a checkpoint's directory; without it, the embedded model")
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
    stop: Annotated[list[str] | None, typer.Option(help="end the answer before this text (may be given again)")] = None,
    trace: Annotated[int, typer.Option(help="show the distribution behind the first N steps (20 without N)")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print nothing but the answer")] = False,
    dialect: Annotated[str | None, typer.Option(help="preview, 0731, or the path of a dialect")] = None,
    numerics: Annotated[
        Numerics, typer.Option(help="official: round activations as the model was trained")
    ] = "official",
    dtype: Annotated[Dtype, typer.Option(help="how activations are stored")] = "bfloat16",
    device: Annotated[str, typer.Option(help="where the references run")] = "cpu",
    draft: Annotated[int | None, typer.Option(help="tokens to guess each step with the draft; 0: none")] = None,
    max_context: Annotated[int, typer.Option(help="positions per sequence")] = 4096,
) -> None:
    """Answer one prompt. Sampling defaults to what the checkpoint recommends."""
    from dsv4.cli.answer import Answer  # torch takes seconds to import: not before the usage has been checked

    options = EngineOptions(numerics=numerics, dtype=dtype, device=device, max_context=max_context, draft_tokens=draft)
    err = Console(stderr=True, highlight=False, quiet=quiet and not trace)
    llm = _load(model, options, dialect, err)
    usual = llm.defaults
    sampling = Sampling(
        temperature=usual.temperature if temperature is None else temperature,
        top_k=usual.top_k if top_k is None else top_k,
        top_p=usual.top_p if top_p is None else top_p,
        min_p=usual.min_p if min_p is None else min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        trace=trace,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    if raw:
        ids, in_reasoning = llm.tokenizer.encode_raw(text), None
    else:
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        rendered = llm.prompt(turns, thinking=think, effort=effort)
        ids, in_reasoning = llm.tokenizer.encode_prompt(rendered.pieces), rendered.in_reasoning
    if not as_json:
        err.print("\n".join(llm.resolved.lines()), style="dim", markup=False, soft_wrap=True)
    Answer(llm, ids, in_reasoning, sampling, err, as_json).run()


def _load(model: Path | None, options: EngineOptions, dialect: str | None, err: Console) -> LLM:
    from dsv4.llm import LLM, LoadProgress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def show(step: LoadProgress) -> None:
            bar.update(task, description=step.what, completed=step.done, total=step.total)

        llm = LLM.load(model, options, dialect, show)
    gc.collect()
    gc.freeze()  # what is loaded stays until the end: the collector need not look through it again and again
    return llm

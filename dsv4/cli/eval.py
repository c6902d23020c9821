"""`dsv4 eval`: how good a model is, as a table and as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dsv4.checkpoint.hub import find_model
from dsv4.cli.options import Dialect, Dtype, ModelPath, Numerics
from dsv4.cli.progress import load_bar
from dsv4.cli.target import writable
from dsv4.config import EngineOptions, ModelConfig
from dsv4.errors import RequestError


class Size(NamedTuple):
    """How much is asked.

    Items a row, and a row of long prompts; their contexts in tokens; held-out tokens of each source and of each text.
    """

    items: int
    long_items: int
    contexts: tuple[int, ...]
    tokens: int | None
    piece: int


FULL: Final = Size(200, 200, (8192, 16384, 32768), None, 4096)
QUICK: Final = Size(6, 2, (1024, 2048), 400, 400)
NARROW: Final = 512  # below this width one thread is fastest, so that a process a core pays
MOST_JOBS: Final = 8


def evaluate(
    model: ModelPath = None,
    quick: Annotated[bool, typer.Option("--quick", help="few items and contexts to 2K: minutes on a CPU")] = False,
    items: Annotated[
        int | None, typer.Option(min=1, help="held-out items a row (200; 6, or 2 of long prompts, with --quick)")
    ] = None,
    families: Annotated[str, typer.Option(help="only these, with commas between")] = "",
    contexts: Annotated[str, typer.Option(help="needle contexts in tokens, with commas between")] = "",
    texts: Annotated[
        Path | None,
        typer.Option(help='held-out texts, {"source": …, "text": …} a line; without it, the package\'s own'),
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed asks the same items")] = 0,
    json_path: Annotated[str, typer.Option("--json", help="write everything here; - for standard output")] = "",
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 if a bar that was measured is not met")] = False,
    dialect: Dialect = None,
    numerics: Numerics = "official",
    dtype: Dtype = "bfloat16",
    device: Annotated[str, typer.Option(help="where the references run")] = "cpu",
    max_sequences: Annotated[int | None, typer.Option(help="requests side by side (16; 64 on a GPU)")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="processes, shared among GPUs; one a core for a narrow model")
    ] = None,
) -> None:
    """Ask held-out items of every family, read held-out texts, and hold the scores against their bars."""
    size = QUICK if quick else FULL
    lengths = _lengths(contexts) or size.contexts
    on_cpu = device == "cpu"
    asked = EngineOptions(
        numerics=numerics,
        dtype=dtype,
        device=device,
        kernels="reference",
        stored=False,
        max_sequences=(16 if on_cpu else 64) if max_sequences is None else max_sequences,
        prefill_chunk=512 if on_cpu else 4096,
    )
    from dsv4.check import evaluate as check  # a mistake in the usage should not have to wait for torch
    from dsv4.check.evaluate_report import as_json, failed
    from dsv4.check.perplexity import HELDOUT, read_texts
    from dsv4.cli.eval_table import show
    from dsv4.llm import EMBEDDED, LLM

    writable(None if json_path in ("", "-") else Path(json_path))
    directory = find_model(model or EMBEDDED)
    config = ModelConfig.load(directory)
    rows = check.planned(_names(families), lengths)
    options = check.options_for(config, rows, asked)
    plan = check.Plan(
        model=directory,
        options=options,
        dialect=dialect,
        rows=tuple(rows),
        items=items or size.items,
        long_items=items or size.long_items,
        seed=seed,
        texts=texts or HELDOUT,
        tokens=size.tokens,
        piece=size.piece,
    )
    read_texts(plan.texts)
    processes = jobs or (_cores() if on_cpu and config.hidden_size <= NARROW else 1)

    err = Console(stderr=True, highlight=False)
    with load_bar(err, "loading") as bar:
        llm = LLM.load(directory, options, dialect, bar)
    err.print("\n".join(llm.lines()), style="dim", markup=False, soft_wrap=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)
        found = check.evaluate(llm, plan, processes, lambda done, of: progress.update(task, completed=done, total=of))
    show(found, Console(stderr=json_path == "-", highlight=False))
    _write(as_json(found, llm.resolved.facts), json_path)
    if strict and failed(found):
        raise typer.Exit(1)


def _write(report: dict[str, Any], path: str) -> None:
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
    elif path:
        Path(path).write_text(text, encoding="utf-8")


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _lengths(text: str) -> tuple[int, ...]:
    names = _names(text)
    if not all(name.isdecimal() and int(name) for name in names):
        raise RequestError("--contexts", got=text, wanted="numbers of tokens, as 1024,2048")
    return tuple(map(int, names))


def _cores() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_JOBS)

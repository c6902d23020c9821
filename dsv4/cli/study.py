"""`dsv4 study formats`: what number formats do to a model, as a table, JSON and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dsv4.checkpoint.hub import find_model
from dsv4.cli.options import ModelPath
from dsv4.cli.progress import load_bar
from dsv4.cli.target import writable
from dsv4.config import ModelConfig

if TYPE_CHECKING:
    from dsv4.check.study.results import Results

app = typer.Typer(no_args_is_help=True, help="Change one thing in a model and see what it does.")
_COLUMNS: Final = {"kl": "KL", "top1": "same first", "perplexity": "perplexity", "score": "exercises"}
_STYLE: Final = {"worse": "red", "better": "green", "": ""}


@app.callback()
def _several() -> None:
    """A group with one verb so far; without this typer would drop the verb's name."""


@app.command()
def formats(
    model: ModelPath = None,
    formats: Annotated[
        str, typer.Option("--formats", help="only these, with commas between; wrong names list all")
    ] = "",
    places: Annotated[str, typer.Option(help="all, attention, experts, shared or single places, with commas")] = "",
    sweep: Annotated[
        str | None, typer.Option(help="formats for the first n layers, n = 1, 2, 4, …; '' for none")
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens read for each seed, half text and half exercises")] = 1536,
    seeds: Annotated[int, typer.Option(help="disjoint samples, for the spread")] = 3,
    seed: Annotated[int, typer.Option(help="the same seed draws the same samples")] = 0,
    span: Annotated[int, typer.Option(help="tokens of the longest passage, and of a step")] = 512,
    text: Annotated[Path | None, typer.Option(help='other held-out text: {"source": …, "text": …} a line')] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write everything here")] = None,
    report: Annotated[Path | None, typer.Option(help="write a page with pictures here (needs matplotlib)")] = None,
    device: Annotated[str, typer.Option(help="where the references run")] = "cpu",
    jobs: Annotated[int | None, typer.Option(min=1, help="processes; without it, one a core on a CPU")] = None,
) -> None:
    """Run a model under each choice of activation and cache format, the official one as the base.

    Shows KL to official, agreement, perplexity and exercises answered: mean ± spread over the samples, coloured where
    an effect stands beyond it. --json and --report have every layer.
    """
    # A mistake in the usage should not have to wait for torch, nor one in the packages for half an hour of work.
    from dsv4.check.study import formats as known
    from dsv4.check.study import opening, plots
    from dsv4.check.study.parallel import side_by_side
    from dsv4.check.study.study import one_by_one, study
    from dsv4.check.tasks.registry import FAMILIES
    from dsv4.llm import EMBEDDED

    writable(json_path, report)
    if report is not None:
        plots.require()
    directory, err = find_model(model or EMBEDDED), Console(stderr=True, highlight=False)
    config = ModelConfig.load(directory)
    swept = known.SWEPT if sweep is None else _names(sweep)
    plan = known.plan(config.num_hidden_layers, _names(formats), _names(places), swept)
    asked = opening.Asked(seeds, tokens, span, seed)
    samples = opening.open_samples(directory, text or opening.HELDOUT, FAMILIES, asked)
    with load_bar(err, "loading") as show:
        subject = opening.open_subject(directory, device, span, show)
    processes = jobs or (_cores() if device == "cpu" and config.hidden_size <= opening.NARROW else 1)
    through = one_by_one if processes == 1 else side_by_side(directory, processes)
    with _bar(err) as tick:
        tree = study(subject, samples, plan, tick, through)
    _show({"model": _about(config, directory), "asked": asdict(asked), **tree}, json_path, report)


def _about(config: ModelConfig, directory: Path) -> dict[str, Any]:
    place = directory.resolve()
    name = place.parent.name if place.name == "model" else place.name  # as a trainer lays it: RUN/model
    return {"name": name, "layers": config.num_hidden_layers, "width": config.hidden_size}


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _bar(err: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Inside the block, call the function it gives with what runs, tokens done and tokens in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("calibration", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _show(tree: dict[str, Any], json_path: Path | None, report: Path | None) -> None:
    from dsv4.check.study.findings import findings, number
    from dsv4.check.study.report import page
    from dsv4.check.study.results import Results

    results = Results(tree)
    tree["findings"] = findings(results)
    console = Console(highlight=False)
    console.print(_table(results, number))
    console.print(" ".join(tree["findings"]), markup=False)
    if json_path is not None:
        json_path.write_text(json.dumps(tree, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    if report is not None:
        report.write_text(page(results), encoding="utf-8")


def _table(results: Results, number: Callable[[float | None], str]) -> Table:
    table = Table("run", caption="KL in nats a token ± spread between samples; coloured: an effect beyond the spread")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name in results.runs:
        table.add_row(name, *(_cell(results, name, metric, number) for metric in _COLUMNS))
    return table


def _cell(results: Results, name: str, metric: str, number: Callable[[float | None], str]) -> Text:
    if metric not in results.runs[name]["summary"]:
        return Text()
    mean, spread = results.mean(name, metric), results.spread(name, metric)
    shown = f"{100 * mean:.1f} %" if mean is not None and metric in ("top1", "score") else number(mean)
    around = f" ± {number(spread)}" if metric == "kl" and spread is not None else ""
    return Text(shown + around, _STYLE[results.effect(name, metric)])

"""A bar for the stages of a load: how much is done, the rate, time left; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from dsv4.llm import LoadProgress


@contextmanager
def load_bar(err: Console, doing: str) -> Iterator[Callable[[LoadProgress], None]]:
    """Inside the block, call the function it gives with each `LoadProgress`. doing: what stands there before."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(doing, total=None, told="")

        def show(step: LoadProgress) -> None:
            name = f"{step.stage} {step.what}".rstrip()
            bar.update(task, description=name, completed=step.done, total=step.total or None, told=told(step))

        yield show


def told(step: LoadProgress) -> str:
    """How far a stage has come, in words; nothing for one whose end nobody knows."""
    if not step.total:
        return ""
    if step.unit == "bytes":
        done = f"{decimal(step.done)} of {decimal(step.total)}, {decimal(int(step.rate))}/s"
    else:
        done = f"{step.done} of {step.total} {step.unit}"
    return done if step.left is None else f"{done}, {step.left:.0f} s left"

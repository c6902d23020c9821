"""A bar of bytes, rate and what is being read or written; nothing where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from dsv4.llm import LoadProgress


@contextmanager
def byte_bar(err: Console, doing: str) -> Iterator[Callable[[LoadProgress], None]]:
    """Inside the block, call the function it gives with each `LoadProgress`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda step: bar.update(task, description=step.what, completed=step.done, total=step.total)

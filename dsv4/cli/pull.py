"""`dsv4 pull`: a checkpoint from the hub into the local cache."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from dsv4.checkpoint import hub

_MOST_FILES = 1 << 16  # that are looked at: the limit may be a thousand million, and numbers are given from the lowest


def pull(name: Annotated[str, typer.Argument(help="ORG/NAME or ORG/NAME@REVISION", metavar="ORG/NAME")]) -> None:
    """Fetch a checkpoint, check every byte of it, and print its directory; other verbs then take ORG/NAME as MODEL.

    Once more, it goes on with the files that are whole. HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT count as for
    every program that uses huggingface_hub, which this needs: the extra hub of dsv4 brings it.
    """
    err = Console(stderr=True, highlight=False)
    _hush(err.is_terminal)
    columns = (TextColumn("checking {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    tasks: list[TaskID] = []

    def show(file: str, done: int, total: int) -> None:
        if not tasks:  # the library's own bars come before: two that draw at once would overwrite each other
            bar.start()
            tasks.append(bar.add_task(file))
        bar.update(tasks[0], description=file, completed=done, total=total)

    def break_off(number: int, frame: FrameType | None) -> None:
        bar.stop()
        print("\ndsv4: stopped; dsv4 pull again goes on with the files that are whole", file=sys.stderr, flush=True)
        sys.stderr = io.StringIO()  # the library's threads and finalizers fail from here on: that is no news
        _drop_parts()
        os._exit(130)  # at once: an orderly end would wait for every download, however long it stalls

    before = signal.signal(signal.SIGINT, break_off)
    try:
        directory = hub.pull(name, show)
    finally:
        bar.stop()
        signal.signal(signal.SIGINT, before)
        gc.collect()  # the library's bars are drawn once more when they are collected: not below the directory
    print(directory)


def _drop_parts() -> None:
    """Remove the parts of files that this process has open, where the system shows it: nobody can go on with them.

    The library names a part anew each time, so that two processes never write to the same. Its threads go on while
    this one looks: from here on they can open nothing. The second look is for what one of them was just opening.
    """
    with suppress(ImportError):  # Windows has no such limits, and does not show what is open either
        import resource

        most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        for _ in range(2):
            for number in range(min(most, _MOST_FILES)):
                with suppress(OSError):
                    target = Path(os.readlink(f"/proc/self/fd/{number}"))
                    if target.suffix == ".incomplete":
                        target.unlink()
            time.sleep(0.05)


def _hush(bars: bool) -> None:
    """No warnings of the library beside our one line of error, and its bars on a terminal alone."""
    with suppress(ImportError):  # pulling says so
        from huggingface_hub.utils.logging import set_verbosity
        from huggingface_hub.utils.tqdm import disable_progress_bars

        set_verbosity(logging.ERROR)
        if not bars:
            disable_progress_bars()

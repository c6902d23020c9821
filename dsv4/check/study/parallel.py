"""The runs of a study side by side: processes that each hold the model, and share what the official run left."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dsv4.check.study.formats import Run
from dsv4.check.study.opening import open_subject
from dsv4.check.study.study import Session
from dsv4.errors import RequestError


def side_by_side(directory: Path, jobs: int) -> Callable[[Session, Sequence[Run]], Iterator[dict[str, Any]]]:
    """For `study`: its plan in `jobs` processes on the CPU, each of which opens the checkpoint in `directory`."""

    def through(session: Session, plan: Sequence[Run]) -> Iterator[dict[str, Any]]:
        with TemporaryDirectory() as folder:
            left = Path(folder) / "official.pt"
            torch.save((session.work, session.peaks, session.kept, session.logits), left)
            yield from _results(session, plan, jobs, (directory, session.subject.options.prefill_chunk, left))

    return through


def _results(session: Session, plan: Sequence[Run], jobs: int, where: tuple[Path, int, Path]) -> list[dict[str, Any]]:
    """What every run of the plan found, in its order."""
    pool = ProcessPoolExecutor(jobs, get_context("spawn"))
    try:
        futures = {pool.submit(_apart, where, run): number for number, run in enumerate(plan)}
        found: dict[int, dict[str, Any]] = {}
        for future in as_completed(futures):
            run = plan[futures[future]]
            found[futures[future]] = future.result()
            session.tick(run.name, session.tokens(run))
        return [found[number] for number in range(len(plan))]
    except BrokenProcessPool:
        raise RequestError("a process of the study was killed", do="not enough memory? try --jobs 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _apart(where: tuple[Path, int, Path], run: Run) -> dict[str, Any]:
    return _session(*where).run(run)


@cache
def _session(directory: Path, span: int, left: Path) -> Session:
    """One a process. The official run's tensors stay in the file, which all map."""
    work, peaks, kept, logits = torch.load(left, mmap=True, weights_only=False)
    subject = open_subject(directory, "cpu", span)
    gc.collect()
    gc.freeze()  # what is loaded stays: the collector need not look through it again and again
    return Session(subject, work, peaks, lambda *_: None, kept, logits)

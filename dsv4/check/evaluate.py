"""How good a model is: exercises that it was never taught, texts that it has not read, prompts gone wrong, speed.

Nothing here depends on the order of work or on how many processes share it: items are drawn from seeds of their own,
answers are greedy, and a row's bits do not depend on its company.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Final, NamedTuple

import torch

from dsv4.check.answers import WHOLE, Ask, Result, Share, Told, ask, together
from dsv4.check.malformed import Damage, damages
from dsv4.check.perplexity import Loss, encoded, measure, read_texts, unigram_nats
from dsv4.check.questions import rows
from dsv4.check.score import Row
from dsv4.check.tasks.registry import FAMILIES
from dsv4.config import EngineOptions, ModelConfig
from dsv4.engine.request import Sampling
from dsv4.errors import PromptError, RequestError
from dsv4.llm import LLM

SHORT_PROMPTS: Final = 2_048  # positions that suffice where no context is wanted, answers included
ANSWER_ROOM: Final = 1_024  # positions behind the longest prompt
_DAMAGED: Final = 8  # one item in so many is asked with mistakes in its prompt as well
_WAVES: Final = 2  # items of a group, in sequences of the engine
_SPEED_TOKENS: Final = 96
_SPEED_TRIES: Final = 8  # for a model that soon ends its answer
_SPEED_QUESTION: Final = "Tell me a short story about a dog."


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is evaluated.

    `items` a row, `long_items` where a context is wanted; `texts`, the file of held-out ones; `tokens` of each of its
    sources at most (None: all), and at most `piece` of each text.
    """

    model: Path
    options: EngineOptions
    dialect: str | None
    rows: tuple[Row, ...]
    items: int
    long_items: int
    seed: int
    texts: Path
    tokens: int | None
    piece: int

    def items_of(self, row: Row) -> int:
        """How many items of a row are asked."""
        return self.long_items if row.context else self.items


class Part(NamedTuple):
    """A piece of the work: rows whose items are asked side by side, mistakes or none, or the texts of one source.

    `share` of the items of rows without mistakes.
    """

    rows: tuple[Row, ...] = ()
    source: str = ""
    mistaken: bool = False
    share: Share = WHOLE


class Reading(NamedTuple):
    """Texts of one source and the seconds that they took."""

    source: str
    loss: Loss
    seconds: float


class Damaged(NamedTuple):
    """What each mistake in a prompt costs."""

    damages: tuple[Damage, ...]


Found = Told | Reading | Damaged


class Speed(NamedTuple):
    """One request alone: tokens of its answer a second, behind the first."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Evaluation:
    """All that was found. `told` in the order of the plan's rows, `readings` in that of the file's sources."""

    plan: Plan
    told: tuple[Told, ...]
    readings: tuple[Reading, ...]
    damages: tuple[Damage, ...]
    speed: Speed
    seconds: float

    @property
    def results(self) -> tuple[Result, ...]:
        """Every row's."""
        return tuple(result for told in self.told for result in told.results)


def planned(names: Sequence[str], contexts: Sequence[int]) -> list[Row]:
    """The rows of these families, of all if there are none. RequestError for an unknown one."""
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise RequestError("--families", got=", ".join(unknown), wanted="some of " + ", ".join(FAMILIES))
    return rows({name: FAMILIES[name] for name in names or FAMILIES}, contexts)


def options_for(config: ModelConfig, planned: Sequence[Row], asked: EngineOptions) -> EngineOptions:
    """`asked`, with a context that the longest row fits into and one guess a step if there is a draft.

    With one guess a step every guess is a first one, so that the engine's two counts are the first draft's acceptance.
    """
    needed = max([SHORT_PROMPTS, *(row.context + ANSWER_ROOM for row in planned if row.context)])
    context = min(needed, config.max_position_embeddings)
    return replace(asked, max_context=context, draft_tokens=1 if config.draft == "mtp" else 0)


def evaluate(llm: LLM, plan: Plan, jobs: int, show: Callable[[int, int], None]) -> Evaluation:
    """Run a plan on the model loaded for it, or in `jobs` processes that each load it. `show`: parts done, of all.

    The processes are dealt out to the GPUs that there are, if the plan's options say no more than "cuda".
    """
    start = time.perf_counter()
    speed = one_alone(llm)
    sources = dict.fromkeys(text.source for text in read_texts(plan.texts))
    short = tuple(row for row in plan.rows if not row.context)
    groups = shared_out(plan, jobs)
    parts = [*(Part(source=source) for source in sources), *chain.from_iterable(groups)]
    parts += [Part(short, mistaken=True)] if short else []
    done: dict[Part, Found] = {}
    try:
        for part, found in _one_by_one(llm, plan, parts) if jobs == 1 else _side_by_side(plan, parts, jobs):
            done[part] = found
            show(len(done), len(parts))
    except torch.OutOfMemoryError:
        got = f"{jobs} processes with a cache of {plan.options.max_sequences} sequences each"
        raise RequestError("the device's memory is full", got=got, do="lower --jobs or --max-sequences") from None
    ordered = [done[part] for part in parts]
    told = tuple(together([found for part in group if isinstance(found := done[part], Told)]) for group in groups)
    readings = tuple(found for found in ordered if isinstance(found, Reading))
    mistaken = tuple(damage for found in ordered if isinstance(found, Damaged) for damage in found.damages)
    return Evaluation(plan, told, readings, mistaken, speed, time.perf_counter() - start)


def grouped(plan: Plan) -> list[tuple[Row, ...]]:
    """The plan's rows in groups with enough items to keep all sequences of the engine busy most of the time."""
    groups: list[list[Row]] = [[]]
    for row in plan.rows:
        if sum(map(plan.items_of, groups[-1])) >= _WAVES * plan.options.max_sequences:
            groups.append([])
        groups[-1].append(row)
    return [tuple(group) for group in groups if group]


def shared_out(plan: Plan, jobs: int) -> list[list[Part]]:
    """A group of rows each: one part, or several where there are more processes than groups. None is without items."""
    groups = grouped(plan)
    counts = [min(-(-jobs // len(groups)), max(map(plan.items_of, rows))) for rows in groups]
    return [[Part(rows, share=Share(n, of)) for n in range(of)] for rows, of in zip(groups, counts, strict=True)]


def dealt(device: str, jobs: int) -> list[str]:
    """A device for each process: where "cuda" leaves open which of several GPUs, these in turn."""
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    return [f"cuda:{n % gpus}" if gpus > 1 else device for n in range(jobs)]


def work(llm: LLM, plan: Plan, part: Part) -> Found:
    """Do one part of a plan."""
    if part.mistaken:
        asked = [(row, FAMILIES[row.family]) for row in part.rows]
        return Damaged(tuple(damages(llm, asked, -(-plan.items // _DAMAGED), plan.seed)))
    if part.rows:
        wanted = [Ask(row, FAMILIES[row.family], plan.items_of(row)) for row in part.rows]
        return ask(llm, wanted, plan.seed, part.share)
    start = time.perf_counter()
    texts = encoded(read_texts(plan.texts), llm.tokenizer, plan.tokens, plan.piece)
    own = [(text, ids) for text, ids in texts if text.source == part.source]
    loss = measure(llm, own, unigram_nats(ids for _, ids in texts))
    return Reading(part.source, loss, time.perf_counter() - start)


def one_alone(llm: LLM) -> Speed:
    """Speed of one request that nothing else runs beside."""
    try:
        ids = llm.tokenizer.encode_prompt(llm.prompt([{"role": "user", "content": _SPEED_QUESTION}]).pieces)
    except PromptError:
        ids = [llm.tokenizer.bos_id]
    tokens, seconds = 0, 0.0
    for _ in range(_SPEED_TRIES):
        asked = Sampling(temperature=0, max_tokens=_SPEED_TOKENS - tokens + 1)
        stamps = [time.perf_counter() for _ in llm.generate(ids, asked)]
        tokens, seconds = tokens + len(stamps) - 1, seconds + stamps[-1] - stamps[0]
        if tokens >= _SPEED_TOKENS:
            break
    return Speed(tokens, seconds)


def _one_by_one(llm: LLM, plan: Plan, parts: Iterable[Part]) -> Iterator[tuple[Part, Found]]:
    for part in parts:
        yield part, work(llm, plan, part)


def _side_by_side(plan: Plan, parts: Iterable[Part], jobs: int) -> Iterator[tuple[Part, Found]]:
    """The longest parts first, so that no process is left alone with one at the end."""
    spawn = get_context("spawn")
    devices = spawn.SimpleQueue()
    for device in dealt(plan.options.device, jobs):
        devices.put(device)
    pool = ProcessPoolExecutor(jobs, spawn, _settle, (devices,))
    try:
        futures = {pool.submit(_apart, plan, part): part for part in sorted(parts, key=_weight, reverse=True)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise RequestError("a process of the evaluation was killed", do="not enough memory? try --jobs 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


_device = ""  # this process's, one of those that work for another


def _settle(devices: SimpleQueue[str]) -> None:
    """Take a device. It is named to all that loads and runs, because torch's current device is a thread's own."""
    global _device
    _device = devices.get()


def _apart(plan: Plan, part: Part) -> Found:
    return work(_loaded(plan.model, replace(plan.options, device=_device), plan.dialect), plan, part)


@cache
def _loaded(model: Path, options: EngineOptions, dialect: str | None) -> LLM:
    """One model a process; what is loaded stays, so that the collector need not look through it again and again."""
    llm = LLM.load(model, options, dialect)
    gc.collect()
    gc.freeze()
    return llm


def _weight(part: Part) -> tuple[int, int]:
    return max([row.context or 0 for row in part.rows], default=0), sum(row.thinking for row in part.rows)

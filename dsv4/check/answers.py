"""Questions to a model, all side by side and always the most probable token, and the verdicts on its answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Final, NamedTuple

from dsv4.chat.parse import parse_completion
from dsv4.check.questions import Question, Voice, questions
from dsv4.check.score import Row, Score
from dsv4.check.tasks.item import Family
from dsv4.engine.engine import Engine
from dsv4.engine.request import Delta, Sampling
from dsv4.errors import PromptError, RequestError
from dsv4.llm import LLM

_GROUPS: Final = 8  # a fact of more values than these is not worth a split


@dataclass(frozen=True)
class Answer:
    """What a model said to one item. `right` only if it also ended its turn by itself."""

    key: str
    prompt_tokens: int
    text: str
    tokens: int
    finish: str
    right: bool
    facts: Mapping[str, str | int | float]


@dataclass(frozen=True)
class Result:
    """A row, filled in. `why`: the reason that the model cannot be asked at all, with no answers then."""

    row: Row
    answers: tuple[Answer, ...] = ()
    why: str | None = None

    @property
    def score(self) -> Score:
        """Right answers of all."""
        return Score.of([answer.right for answer in self.answers])


class Ask(NamedTuple):
    """So many held-out items of a row."""

    row: Row
    family: Family
    items: int


class Share(NamedTuple):
    """Of the items of each row: number `number`, and every `of`-th behind it."""

    number: int
    of: int


WHOLE: Final = Share(0, 1)


class Told(NamedTuple):
    """Rows whose items were asked side by side, the seconds they took together, and the draft's guesses in these.

    Of rows that were shared out: the seconds of the share that took longest.
    `draft`: all its guesses, of which those are right that the model chose as well; of first guesses alone, if the
    engine makes one a step.
    """

    results: tuple[Result, ...]
    seconds: float
    draft: Score


class Said(NamedTuple):
    """Text, number of tokens, and the reason of the end."""

    text: str
    tokens: int
    finish: str


def ask(llm: LLM, wanted: Sequence[Ask], seed: int, share: Share = WHOLE) -> Told:
    """Put held-out questions, or a share of them, to a model that has nothing else to do."""
    drawn = [_drawn(llm, one, seed, share) for one in wanted]
    start, before = time.perf_counter(), (llm.engine.confirmed, llm.engine.drafted)
    told = iter(say(llm.engine, [question for asked in drawn if isinstance(asked, list) for question in asked]))
    seconds = time.perf_counter() - start
    draft = Score(llm.engine.confirmed - before[0], llm.engine.drafted - before[1])
    results = [
        Result(one.row, why=asked)
        if isinstance(asked, str)
        else Result(one.row, tuple(judged(question, one.family, next(told)) for question in asked))
        for one, asked in zip(wanted, drawn, strict=True)
    ]
    return Told(tuple(results), seconds, draft)


def together(shares: Sequence[Told]) -> Told:
    """What all shares of some rows, in their order, found: as if the rows had been asked at once."""
    results = tuple(map(_dealt_back, *(told.results for told in shares)))
    draft = Score(sum(told.draft.right for told in shares), sum(told.draft.n for told in shares))
    return Told(results, max(told.seconds for told in shares), draft)


def _dealt_back(*shares: Result) -> Result:
    """One row's answers in the order of its items: a share has as many as the one before it, or one less."""
    turns = zip_longest(*(share.answers for share in shares))
    return replace(shares[0], answers=tuple(answer for turn in turns for answer in turn if answer))


def _drawn(llm: LLM, wanted: Ask, seed: int, share: Share) -> list[Question] | str:
    """The questions of a share, or why this model cannot be asked all of the row's: each share gives the same reason.

    All are drawn for every share, since what is drawn depends on what was drawn before.
    """
    try:
        asked = questions(wanted.row, wanted.family, Voice(llm.dialect, llm.tokenizer), wanted.items, seed)
        for question in asked:
            llm.engine.check(question.prompt)
    except (PromptError, RequestError) as error:
        return str(error)
    return asked[share.number :: share.of]


def say(engine: Engine, asked: Iterable[Question]) -> list[Said]:
    """The greedy answer to each question."""
    return [Said("".join(d.text for d in told), len(told), told[-1].finish or "") for told in tell(engine, asked)]


def tell(engine: Engine, asked: Iterable[Question]) -> list[list[Delta]]:
    """The greedy answer to each question, token by token. NumericsError where the model's numbers are not finite."""
    deltas: dict[int, list[Delta]] = {
        engine.add(q.prompt, Sampling(temperature=0, max_tokens=q.limit)): [] for q in asked
    }
    while engine.busy:
        for delta in engine.step():
            if delta.error:
                raise delta.error
            deltas[delta.number].append(delta)
    return list(deltas.values())


def judged(question: Question, family: Family, said: Said) -> Answer:
    """The verdict on an answer; one that was cut off, or ended by a token that has no place in a turn, is wrong."""
    item = question.item
    completion = parse_completion(said.text, in_reasoning=question.in_reasoning, tools=bool(item.tools))
    right = said.finish == "stop" and family.judge(item, completion)
    facts = {name: value for name, value in item.facts.items() if isinstance(value, str | int | float)}
    return Answer(item.key, len(question.prompt), *said, right, facts)


def splits(answers: Sequence[Answer]) -> dict[str, dict[str, Score]]:
    """Scores by prompt length mod 4 (the finer compression ratio) and by each fact of the items that has few values.

    A fact that is a share of a whole, as the depth of a needle, is put into quarters.
    """
    groups = {"prompt_mod_4": [str(answer.prompt_tokens % 4) for answer in answers]}
    names = dict.fromkeys(name for answer in answers for name in answer.facts)
    groups |= {name: [_label(answer.facts.get(name)) for answer in answers] for name in names}
    return {name: _scores(labels, answers) for name, labels in groups.items() if len(set(labels)) <= _GROUPS}


def _label(value: str | int | float | None) -> str:
    if not isinstance(value, float):
        return str(value)
    quarter = min(int(value * 4), 3)
    return f"{quarter / 4} to {(quarter + 1) / 4}"


def _scores(labels: Sequence[str], answers: Sequence[Answer]) -> dict[str, Score]:
    rights = {label: [a.right for a, own in zip(answers, labels, strict=True) if own == label] for label in labels}
    return {label: Score.of(rights[label]) for label in sorted(rights)}

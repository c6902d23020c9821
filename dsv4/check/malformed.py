"""What a prompt gone wrong costs: the mistakes that clients of chat models make, each measured.

A mistake is made in the ids of a prompt. Behind it stands the answer that the model gives to the prompt as it should
be, most probable tokens alone, and each token of it is predicted from the true ones before: how little the model
expects its own words shows the mistake, and nothing that would follow from a first wrong word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from dsv4.chat.control import ASSISTANT, BOS, USER
from dsv4.check.answers import tell
from dsv4.check.forced import losses, served
from dsv4.check.questions import Question, Voice, questions
from dsv4.check.score import Row
from dsv4.check.tasks.item import Family
from dsv4.errors import PromptError
from dsv4.llm import LLM

Ids = list[int]
Controls = Mapping[str, int]
SAID: Final = math.log(2)  # a token of more than half the probability is the most probable one


def _wrong_turn(ids: Ids, controls: Controls) -> Ids:
    at = len(ids) - 1 - ids[::-1].index(controls[ASSISTANT])
    return [*ids[:at], controls[USER], *ids[at + 1 :]]


# Each makes its mistake in the ids of a prompt, which ends in the assistant's mark and the sentinel behind it.
MISTAKES: Final[Mapping[str, Callable[[Ids, Controls], Ids]]] = {
    "none": lambda ids, controls: ids,
    "sentinel missing": lambda ids, controls: ids[:-1],
    "sentence begun twice": lambda ids, controls: [controls[BOS], *ids],
    "sentence not begun": lambda ids, controls: ids[1:],
    "wrong turn token": _wrong_turn,
}


@dataclass(frozen=True)
class Damage:
    """Sums over the answers behind one mistake: nats and tokens, and how many answers would be the same.

    `same` counts answers all of whose tokens have more than half the probability: the model would say them again.
    """

    mistake: str
    nats: float = 0.0
    tokens: int = 0
    same: int = 0
    answers: int = 0

    def after(self, found: Iterable[float]) -> Damage:
        """With one more answer, of these losses a token."""
        each = list(found)
        same = self.same + all(loss < SAID for loss in each)
        return Damage(self.mistake, self.nats + math.fsum(each), self.tokens + len(each), same, self.answers + 1)

    def as_json(self) -> dict[str, str | float | int | None]:
        """Counts, and nats a token."""
        return {
            "mistake": self.mistake,
            "nats_per_token": self.nats / self.tokens if self.tokens else None,
            "same": self.same,
            "answers": self.answers,
            "tokens": self.tokens,
        }


def damages(llm: LLM, asked: Iterable[tuple[Row, Family]], items: int, seed: int) -> list[Damage]:
    """Every mistake, the right prompt first, over `items` held-out items of each row that the model can be asked."""
    model, options = served(llm)
    drawn = [question for row, family in asked for question in _drawn(llm, row, family, items, seed)]
    found = {name: Damage(name) for name in MISTAKES}
    for question, told in zip(drawn, tell(llm.engine, drawn), strict=True):
        answer = [delta.token for delta in told]
        for name, mistake in MISTAKES.items():
            ids = mistake(list(question.prompt), llm.tokenizer.controls)
            behind = losses(model, options, [*ids, *answer])[len(ids) - 1 :]
            found[name] = found[name].after(behind.tolist())
    return list(found.values())


def _drawn(llm: LLM, row: Row, family: Family, items: int, seed: int) -> list[Question]:
    try:
        return questions(row, family, Voice(llm.dialect, llm.tokenizer), items, seed)
    except PromptError:
        return []

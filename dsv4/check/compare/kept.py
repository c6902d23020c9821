"""Way a's answers in a file: made where there is time, held against others where there is a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dsv4.check.compare.answers import Answer, Token, Work
from dsv4.errors import RequestError

KIND: Final = "dsv4 answers 1"


@dataclass(frozen=True)
class Kept:
    """What way a answered, and answered when shaken. digest: `Work.digest` of what was asked."""

    words: str
    digest: str
    answers: Sequence[Answer]
    moved: Sequence[Answer]


def write(path: Path, kept: Kept) -> None:
    """One JSON object: ids, and logits to a millionth of a nat."""
    told = {name: [_plain(one) for one in getattr(kept, name)] for name in ("answers", "moved")}
    path.write_text(json.dumps({"kind": KIND, "way": kept.words, "digest": kept.digest, **told}), encoding="utf-8")


def read(path: Path, work: Work) -> Kept:
    """RequestError for a file that is none, or whose answers are to other prompts than those of `work`."""
    try:
        told = json.loads(path.read_bytes())
        if told["kind"] != KIND:
            raise ValueError(told["kind"])
        kept = Kept(told["way"], told["digest"], *(list(map(_answer, told[name])) for name in ("answers", "moved")))
    except OSError as error:
        raise RequestError("--against", got=f"{path}: {error.strerror}", wanted="a file that --record wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError("--against", got=f"{path}: {error}"[:120], wanted="a file that --record wrote") from None
    if kept.digest != work.digest:
        do = "give --answers, --tokens and --seed as they were, and a model with the same words"
        raise RequestError("--against", got=f"{path}: answers to other prompts", do=do)
    return kept


def _plain(answer: Answer) -> list[Any]:
    return [[token.id, [[id, round(logit, 6)] for id, logit in token.best]] for token in answer]


def _answer(told: list[Any]) -> Answer:
    return tuple(Token(id, tuple((other, float(logit)) for other, logit in best)) for id, best in told)
